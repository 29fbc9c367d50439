# SPDX-License-Identifier: Apache-2.0
"""Weights as plain floating-point numbers: `fp32` and `fp16`."""

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from ..fit.base import Fit
from ..fit.hessian import Hessian
from ..names import DenseName
from .base import CompressedTensor, LayerFormat, PartSpec, Shape

_DTYPES = {16: torch.float16, 32: torch.float32}


class Dense(DenseName, LayerFormat):
    """One part, `weight`, in the weight's own shape; fits every shape and needs no fit."""

    @property
    def weight_bits(self) -> float:
        return float(self.bits)

    def fits(self, shape: Shape) -> str | None:
        return None

    def part_specs(self, shape: Shape) -> dict[str, PartSpec]:
        return {"weight": PartSpec(_DTYPES[self.bits], shape)}

    def encode(self, weight: Tensor, fit: Fit, hessian: Hessian | None) -> dict[str, Tensor]:
        stored = weight.to(_DTYPES[self.bits], copy=True).contiguous()
        if not torch.isfinite(stored).all():
            largest = float(weight.abs().max())
            raise TurbopocketError(f"the largest weight is {largest:.6g}, and fp16 ends at 65504")
        return {"weight": stored}

    def decode(self, compressed: CompressedTensor) -> Tensor:
        return compressed.parts["weight"].to(torch.float32, copy=True)
