# SPDX-License-Identifier: Apache-2.0
"""A diffusers UNet as distillation sees it: noisy latents, timestep, conditions and the number of steps of the walk.

How many steps the student has (TDM-unify, arXiv 2503.06674) enters as one learned vector per count, added to the
time embedding. For a fixed count that is a bias, so a student ships as a plain UNet: see `step_biases`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .options import MAX_STEPS

Conditions = Mapping[str, Tensor]
"""`encoder_hidden_states` (N, T, D), and for SDXL `text_embeds` (N, P) and `time_ids` (N, 6)."""
BIAS = "time_embedding.linear_2.bias"


class Denoiser(nn.Module):
    """A `UNet2DConditionModel` with a vector per step count; the vectors start at zero, which changes nothing.

    Args:
        step_condition: whether the number of steps is told at all.
    """

    unet: Any
    _told: Tensor

    def __init__(self, unet: nn.Module, step_condition: bool = True) -> None:
        super().__init__()
        self.unet = unet
        width = self.unet.time_embedding.linear_2.out_features
        self.steps = nn.Embedding(MAX_STEPS, width, _weight=torch.zeros(MAX_STEPS, width))
        self.steps.requires_grad_(step_condition)
        self._hook = self.unet.time_embedding.register_forward_hook(lambda _, __, embedded: embedded + self._told)

    def forward(self, x_t: Tensor, timesteps_N: Tensor, conditions: Conditions, count: int) -> Tensor:
        """The model's output for x_t (N, C, H, W) in a walk of `count` steps."""
        self._told = self.steps.weight[count - 1]
        added = {name: value for name, value in conditions.items() if name != "encoder_hidden_states"}
        output: Tensor = self.unet(
            x_t, timesteps_N, conditions["encoder_hidden_states"], added_cond_kwargs=added or None, return_dict=False
        )[0]
        return output

    def step_biases(self) -> dict[int, Tensor]:
        """By step count, the bias of `time_embedding.linear_2` that makes the plain UNet the student for it."""
        bias = self.unet.time_embedding.linear_2.bias.detach()
        return {index + 1: bias + told for index, told in enumerate(self.steps.weight.detach())}

    def release(self) -> Any:
        """The UNet without the step vectors; this Denoiser is then of no more use."""
        self._hook.remove()
        return self.unet


def student_copy(unet: nn.Module) -> nn.Module:
    """A trainable copy of the teacher, all of its weights its own."""
    return copy.deepcopy(unet).train().requires_grad_(True)


def lora_copy(unet: nn.Module, rank: int) -> nn.Module:
    """A copy that shares the teacher's frozen weights and trains LoRA matrices on its attention and MLP layers.

    Three networks of an SDXL run then hold one set of base weights. Merge with `fuse_lora()`.
    """
    from peft import LoraConfig

    shared = {id(parameter): parameter for parameter in unet.parameters()}
    twin: Any = copy.deepcopy(unet, memo=dict(shared)).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    twin.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"))
    return twin.train()
