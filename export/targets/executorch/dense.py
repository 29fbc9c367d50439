# SPDX-License-Identifier: Apache-2.0
"""Floating-point weights in ExecuTorch programs: fp32, which XNNPACK multiplies with fp32 activations."""

import math

import torch
from torch import Tensor

from ....quant.formats import CompressedTensor, Dense, PartSpec, matrix_shape, matrix_view
from .form import FormOptions, ProgramForm
from .size import DENSE_CONVOLUTION_BYTES, LAYER_BYTES


class _DenseForm(ProgramForm):
    @classmethod
    def refusal(cls, format: Dense, shape: tuple[int, ...], options: FormOptions) -> str | None:
        return None if format.bits == 32 else f"XNNPACK would widen {format} to fp32 for fp32 activations"

    def tensors(self) -> list[PartSpec]:
        return [PartSpec(torch.float32, matrix_shape(self.layer.shape))]

    def arrays(self, weight: CompressedTensor) -> list[Tensor]:
        return [matrix_view(weight.parts["weight"]).contiguous()]


class DenseLinear(_DenseForm):
    """Linear with an fp32 weight."""

    summary = "fully connected f32"

    def operators_bytes(self) -> int:
        return LAYER_BYTES


class DenseConv2d(_DenseForm):
    """Conv2d with an fp32 weight."""

    summary = "convolution f32"

    def operators_bytes(self) -> int:
        return LAYER_BYTES + (DENSE_CONVOLUTION_BYTES if math.prod(self.layer.shape[2:]) != 1 else 0)
