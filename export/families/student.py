# SPDX-License-Identifier: Apache-2.0
"""Few-step students: one UNet for several step counts, told apart by one bias (see `quant.distill.denoiser`)."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...ground.errors import TurbopocketError

STEP_BIASES_FILE = "step_biases.safetensors"
"""In the UNet's folder: for each step count, as a decimal name, the bias of `time_embedding.linear_2`."""


def is_student(folder: Path) -> bool:
    """Whether the UNet in the folder was distilled for several step counts."""
    return (folder / STEP_BIASES_FILE).is_file()


def tell_steps(unet: nn.Module, folder: Path, steps: int) -> None:
    """Sets the UNet for walks of `steps` steps, if it is a student of several counts; else does nothing.

    Raises TurbopocketError when the student was not trained for that count, or its file is broken.
    """
    file = folder / STEP_BIASES_FILE
    if not is_student(folder):
        return
    try:
        biases = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TurbopocketError(f"{file} can not be read: {error}") from error
    if str(steps) not in biases:
        known = ", ".join(sorted(biases, key=int))
        raise TurbopocketError(f"{folder.parent.name} was distilled for {known} steps, {steps} were asked")
    module: Any = unet
    bias, told = module.time_embedding.linear_2.bias, biases[str(steps)]
    if told.shape != bias.shape or not torch.isfinite(told).all():
        raise TurbopocketError(
            f"{file}: {steps} has shape {list(told.shape)}, finite values {list(bias.shape)} are due"
        )
    with torch.no_grad():
        bias.copy_(told)
