# SPDX-License-Identifier: Apache-2.0
"""PixArt's diffusion transformer (Chen et al. 2023, arXiv 2310.00426) as a graph for one size of latents."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...runtimes.image_size import ImageSize
from .graphs import EXAMPLE_BATCH, TIMESTEP, Component, ComponentModule

ADDED = ("resolution", "aspect_ratio")
"""What Alpha's transformer for 1024 pixels is told beside the prompt, in the order of the graph's inputs."""


class _SizedPatches(nn.Module):
    """A PatchEmbed for latents of one size, whose position embedding is the outer sum of two small tables.

    diffusers keeps it for all positions of one size (19 MB of PixArt-XL at 1024 pixels), and computes it in float64 for
    any other; the tables have the same values. They are parameters, so that every target stores them as it does norms.
    """

    def __init__(self, patches: Any, size: ImageSize) -> None:
        super().__init__()
        self.proj = patches.proj
        device = patches.proj.weight.device
        across, down = (table.to(device) for table in position_tables(patches, size))
        self.across = nn.Parameter(across, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)

    def forward(self, latent: Tensor) -> Tensor:
        height, width = self.down.shape[0], self.across.shape[0]
        across = self.across[None].expand(height, -1, -1)
        down = self.down[:, None].expand(-1, width, -1)
        positions = torch.cat([across, down], dim=-1).flatten(0, 1)
        patches: Tensor = self.proj(latent)
        return patches.flatten(2).transpose(1, 2) + positions


def position_tables(patches: Any, size: ImageSize) -> tuple[Tensor, Tensor]:
    """Returns sines and cosines of each column [width, D/2] and of each row [height, D/2] of patches, on the CPU."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    grid = (size.height // patches.patch_size, size.width // patches.patch_size)
    width = patches.proj.out_channels
    both = get_2d_sincos_pos_embed(
        embed_dim=width,
        grid_size=grid,
        base_size=patches.base_size,
        interpolation_scale=patches.interpolation_scale,
        device=torch.device("cpu"),
    )
    both = both.float().reshape(*grid, width)
    return both[0, :, : width // 2].clone(), both[:, 0, width // 2 :].clone()


def _for_size(model: nn.Module, size: ImageSize) -> nn.Module:
    """The same transformer, whose first module only is another, so that it runs at that size; weights are shared."""
    sized: Any = copy.copy(model)
    sized._modules = dict(model._modules)
    sized.pos_embed = _SizedPatches(sized.pos_embed, size)
    module: nn.Module = sized
    return module


class TransformerModule(ComponentModule):
    """A transformer whose further inputs, beside the four that every one has, are resolution and aspect ratio."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        *added: Tensor,
    ) -> Tensor:
        batch = hidden_states.shape[0]
        for tensor in (encoder_hidden_states, encoder_attention_mask, *added):
            torch._check(tensor.shape[0] == batch)  # one batch size, so that tracing finds one symbol
        told: Mapping[str, Tensor | None] = dict.fromkeys(ADDED) | dict(zip(ADDED, added, strict=False))
        prediction: Tensor = self.model(
            hidden_states,
            encoder_hidden_states,
            timestep=timestep.expand(batch),
            added_cond_kwargs=told,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
        return prediction


def transformer_component(transformer: nn.Module, latent_size: ImageSize, text_tokens: int) -> Component:
    """`hidden_states` [B, C, h, w], `timestep` [] or [B], `encoder_hidden_states` [B, T, D] (all float32) and
    `encoder_attention_mask` [B, T] (int64: 1 for a prompt's ids, 0 for padding) to `out_sample` [B, C', h, w].

    C' is 2C where the transformer was trained to predict a variance too: the first C channels are the prediction.
    One with micro-conditions also takes `resolution` [B, 2] (height, width in pixels) and `aspect_ratio` [B, 1]
    (height / width).
    """
    model: Any = transformer
    config = model.config
    states = config.cross_attention_dim if config.caption_channels is None else config.caption_channels
    inputs = {
        "hidden_states": torch.zeros(EXAMPLE_BATCH, config.in_channels, *latent_size),
        TIMESTEP: torch.tensor(999.0),
        "encoder_hidden_states": torch.zeros(EXAMPLE_BATCH, text_tokens, states),
        "encoder_attention_mask": torch.ones(EXAMPLE_BATCH, text_tokens, dtype=torch.int64),
    }
    if model.use_additional_conditions:
        inputs |= {"resolution": torch.ones(EXAMPLE_BATCH, 2), "aspect_ratio": torch.ones(EXAMPLE_BATCH, 1)}
    module = TransformerModule("transformer", _for_size(transformer, latent_size))
    return Component("transformer", module, inputs, ("out_sample",), role="denoiser")
