# SPDX-License-Identifier: Apache-2.0
"""Weights as sums of vectors from several codebooks, times a scale per row: `avq2x8-d8`, `avq3x8-d8-shared` …

Additive quantization as in Egiazarian et al., VQDM (2024), section 3. O outputs, K columns of the matrix view,
M codebooks, P = 2^bits entries of one, D length of a vector, J = K / D vectors per row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ground.bits import packed_bytes
from ..fit.base import Fit
from ..fit.grids import AdditiveCodes, AdditiveGrid, VectorCodes, VectorGrid
from ..fit.hessian import Hessian
from ..names import AdditiveName
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import pack, unpack
from .palette import refused_rows


class Additive(AdditiveName, LayerFormat):
    """value = scale[row] * Σ codebook[m][code[m]][place]; a vector is `length` neighbouring input channels at one tap.

    Parts: `codes` uint8 [M, O, ceil(J * bits / 8)] (row-packed, low bits first), `codebooks` fp16 [M, 2^bits, D],
    `scale` fp16 [O]. All rows share the codebooks; with `shared` all layers of a component do.
    """

    @property
    def shared_parts(self) -> tuple[str, ...]:
        return ("codebooks",) if self.shared else ()

    @property
    def weight_bits(self) -> float:
        return self.count * self.bits / self.length

    def fits(self, shape: Shape) -> str | None:
        reason = refused_rows(self, shape, None)
        if reason is None and shape[1] % self.length:
            return f"{shape[1]} input channels are not a multiple of vector length {self.length} in {self}"
        return reason

    def part_specs(self, shape: Shape) -> dict[str, PartSpec]:
        outputs, columns = matrix_shape(shape)
        packed = packed_bytes(columns // self.length, self.bits)
        return {
            "codes": PartSpec(torch.uint8, (self.count, outputs, packed)),
            "codebooks": PartSpec(torch.float16, (self.count, 2**self.bits, self.length)),
            "scale": PartSpec(torch.float16, (outputs,)),
        }

    def encode(self, weight: Tensor, fit: Fit, hessian: Hessian | None) -> dict[str, Tensor]:
        grid = AdditiveGrid(self.count, self.bits, self.length, universal=self.shared)
        fitted = fit.choose(matrix_view(weight), grid, hessian)
        packed_MOb = torch.stack([pack(codes_OJ, self.bits) for codes_OJ in fitted.codes_MOJ])
        return {"codes": packed_MOb, "codebooks": fitted.codebooks_MPD, "scale": fitted.scale_O}

    def decode(self, compressed: CompressedTensor) -> Tensor:
        return from_matrix_view(AdditiveCodes(*self.unpack(compressed)).values(), compressed.shape)

    def unpack(self, compressed: CompressedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [M, O, J], codebooks fp16 [M, 2^bits, D], scale fp16 [O]."""
        _, columns = matrix_shape(compressed.shape)
        parts = compressed.parts
        planes = [unpack(codes_Ob, self.bits, columns // self.length, signed=False) for codes_Ob in parts["codes"]]
        return torch.stack(planes), parts["codebooks"], parts["scale"]

    def vector_codes(self, compressed: CompressedTensor) -> tuple[VectorCodes, ...]:
        grid = VectorGrid(self.bits, self.length)
        codes_MOJ, codebooks_MPD, scale_O = self.unpack(compressed)
        return tuple(
            VectorCodes(grid, codes_OJ, codebook_PD.unsqueeze(0), scale_O)
            for codes_OJ, codebook_PD in zip(codes_MOJ, codebooks_MPD, strict=True)
        )

    def with_vector_codes(self, compressed: CompressedTensor, codes: Sequence[VectorCodes]) -> CompressedTensor:
        parts = {
            "codes": torch.stack([pack(each.codes_RC, self.bits) for each in codes]),
            "codebooks": torch.cat([each.codebook_GPD for each in codes]),
            "scale": codes[0].scale_O,
        }
        return CompressedTensor(self, compressed.shape, parts)
