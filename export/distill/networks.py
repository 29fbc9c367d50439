# SPDX-License-Identifier: Apache-2.0
"""The networks of a run: those that its method trains, and the teacher; whether memory suffices for them."""

from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import nn

from ...ground.errors import TurbopocketError
from ...quant.distill.denoiser import Denoiser, lora_copy, student_copy
from ...quant.distill.trainer import METHODS, Networks, Role
from ...quant.layers import materialise
from .recipe import DistillSection

BYTES_PER_TRAINED = 16  # weight, gradient, two moments; fp32
"""Of what the method trains; the teacher and what LoRA shares hold 4."""
_NAMES: Mapping[Role, str] = {"student": "student", "fake": "fake score"}


def networks_of(unet: nn.Module, asked: DistillSection, device: torch.device) -> Networks:
    """The networks that the method trains, copies of the teacher, and the teacher itself, none moved to the device yet.

    The teacher's weights are then in memory, in fp32.

    Raises TurbopocketError when weights, gradients and moments alone are more than is free there.
    """
    roles = METHODS[asked.method].trains
    _require_memory(unet, asked, device)
    materialise(unet)
    trained = {}
    for role in roles:
        copied: Any = student_copy(unet) if asked.lora_rank is None else lora_copy(unet, asked.lora_rank)
        if asked.gradient_checkpointing:
            copied.enable_gradient_checkpointing()
        trained[role] = Denoiser(copied, asked.devices.step_condition)
    return Networks(trained, Denoiser(unet, False))


def _require_memory(unet: nn.Module, asked: DistillSection, device: torch.device) -> None:
    roles = METHODS[asked.method].trains
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    trained = len(roles) * parameters * BYTES_PER_TRAINED if asked.lora_rank is None else 0
    needed = 4 * parameters + trained
    free = _free_bytes(device)
    if needed > free:
        raise TurbopocketError(
            f"teacher and {' and '.join(_NAMES[role] for role in roles)} need {needed / 1e9:.1f} GB before any "
            f"activation, {free / 1e9:.1f} GB are free on {device.type}",
            hint="train LoRA matrices only: --set distill.lora_rank=64" if asked.lora_rank is None else None,
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    return available
