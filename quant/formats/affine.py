# SPDX-License-Identifier: Apache-2.0
"""Weights as 4 or 8 bit integers, one fp16 scale per row or group: `int8-row`, `int4-g32`, `int4-g32-asym` …

O outputs, I inputs, K columns of the matrix view, G scales per row.
"""

import torch
from torch import Tensor

from ...ground.bits import packed_bytes
from ..fit.base import Fit
from ..fit.grids import FP16_DIGITS, IntegerGrid, grid_values
from ..fit.hessian import Hessian
from ..names import AffineName
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import pack, unpack


class Affine(AffineName, LayerFormat):
    """value = (code - zero) * scale; `group` columns share a scale, a whole row does when `group` is None.

    Parts: `codes` uint8 [O, ceil(K * bits / 8)] (row-packed, two's complement when symmetric), `scale` fp16
    [O, G], and for asymmetric formats `zero_point` uint8 [O, ceil(G * bits / 8)], packed like the codes.
    """

    @property
    def weight_bits(self) -> float:
        return float(self.bits)

    def fits(self, shape: Shape) -> str | None:
        if len(shape) not in (2, 4) or 0 in shape:
            return f"{self} stores Linear [O, I] and Conv2d [O, I, kh, kw] weights, not shape {list(shape)}"
        if self.group is not None and shape[1] % self.group:
            return f"{shape[1]} input channels are not a multiple of group {self.group} in {self}"
        return None

    def part_specs(self, shape: Shape) -> dict[str, PartSpec]:
        outputs, columns = matrix_shape(shape)
        scales = self._scales_per_row(shape)
        specs = {
            "codes": PartSpec(torch.uint8, (outputs, packed_bytes(columns, self.bits))),
            "scale": PartSpec(torch.float16, (outputs, scales)),
        }
        if not self.symmetric:
            specs["zero_point"] = PartSpec(torch.uint8, (outputs, packed_bytes(scales, self.bits)))
        return specs

    def encode(self, weight: Tensor, fit: Fit, hessian: Hessian | None) -> dict[str, Tensor]:
        weight_OK = matrix_view(weight)
        digits = fit.group_scale_digits if self.group else FP16_DIGITS
        grid = IntegerGrid(self.bits, self.symmetric, self.group or weight_OK.shape[1], digits)
        fitted = fit.choose(weight_OK, grid, hessian)
        parts = {"codes": pack(fitted.codes_OK, self.bits), "scale": fitted.scale_OG.contiguous()}
        if fitted.zero_OG is not None:
            parts["zero_point"] = pack(fitted.zero_OG, self.bits)
        return parts

    def decode(self, compressed: CompressedTensor) -> Tensor:
        return from_matrix_view(grid_values(*self.unpack(compressed)), compressed.shape)

    def unpack(self, compressed: CompressedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [O, K] (int8, or uint8 when asymmetric), scale fp16 [O, G], zero uint8 [O, G] or None."""
        _, columns = matrix_shape(compressed.shape)
        parts = compressed.parts
        codes_OK = unpack(parts["codes"], self.bits, columns, signed=self.symmetric)
        zero_OG = None
        if not self.symmetric:
            scales = self._scales_per_row(compressed.shape)
            zero_OG = unpack(parts["zero_point"], self.bits, scales, signed=False)
        return codes_OK, parts["scale"], zero_OG

    def _scales_per_row(self, shape: Shape) -> int:
        return 1 if self.group is None else matrix_shape(shape)[1] // self.group
