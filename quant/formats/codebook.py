# SPDX-License-Identifier: Apache-2.0
"""Weights as indices into a codebook of short vectors, times a scale per row: `vq8-d4`, `vq6-d2-out`, `vq8-d4-r64` …

O outputs, I inputs, K columns of the matrix view, D length of a vector, G codebooks, N vectors that share one,
P = 2^bits entries, R rows and C columns of the codes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ground.bits import packed_bytes
from ..fit.base import Fit
from ..fit.grids import VectorCodes, VectorGrid
from ..fit.hessian import Hessian
from ..names import CodebookName
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import pack, unpack
from .palette import refused_rows


class Codebook(CodebookName, LayerFormat):
    """value = scale[row] * codebook[code][place]; `rows` neighbouring outputs share a codebook, or all do.

    A vector is `length` neighbouring input channels at one tap, or with `along_outputs` as many neighbouring outputs
    of one column. Parts: `codes` uint8 [R, ceil(C * bits / 8)] (row-packed, low bits first) with R = O and
    C = K / D, or R = O / D and C = K along outputs; `codebook` fp16 [G, 2^bits, D]; `scale` fp16 [O].
    """

    @property
    def weight_bits(self) -> float:
        return self.bits / self.length

    def fits(self, shape: Shape) -> str | None:
        reason = refused_rows(self, shape, self.rows)
        if reason is not None:
            return reason
        if not self.along_outputs and shape[1] % self.length:
            return f"{shape[1]} input channels are not a multiple of vector length {self.length} in {self}"
        if self.along_outputs and (self.rows or shape[0]) % self.length:
            sharing = "output channels" if self.rows is None else "output channels per codebook"
            return f"{self.rows or shape[0]} {sharing} are not a multiple of vector length {self.length} in {self}"
        return None

    def part_specs(self, shape: Shape) -> dict[str, PartSpec]:
        outputs, columns = matrix_shape(shape)
        code_rows, code_columns = self._grid.codes_shape(outputs, columns)
        return {
            "codes": PartSpec(torch.uint8, (code_rows, packed_bytes(code_columns, self.bits))),
            "codebook": PartSpec(torch.float16, (outputs // (self.rows or outputs), 2**self.bits, self.length)),
            "scale": PartSpec(torch.float16, (outputs,)),
        }

    def encode(self, weight: Tensor, fit: Fit, hessian: Hessian | None) -> dict[str, Tensor]:
        fitted = fit.choose(matrix_view(weight), self._grid, hessian)
        codes = pack(fitted.codes_RC, self.bits)
        return {"codes": codes, "codebook": fitted.codebook_GPD, "scale": fitted.scale_O}

    def decode(self, compressed: CompressedTensor) -> Tensor:
        return from_matrix_view(VectorCodes(self._grid, *self.unpack(compressed)).values(), compressed.shape)

    def unpack(self, compressed: CompressedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [O, K / D] ([O / D, K] along outputs), codebook fp16 [G, 2^bits, D], scale fp16 [O].

        Rows g * R / G up to (g + 1) * R / G of the codes read codebook g.
        """
        parts = compressed.parts
        _, code_columns = self._grid.codes_shape(*matrix_shape(compressed.shape))
        return unpack(parts["codes"], self.bits, code_columns, signed=False), parts["codebook"], parts["scale"]

    def vector_codes(self, compressed: CompressedTensor) -> tuple[VectorCodes, ...]:
        return (VectorCodes(self._grid, *self.unpack(compressed)),)

    def with_vector_codes(self, compressed: CompressedTensor, codes: Sequence[VectorCodes]) -> CompressedTensor:
        (own,) = codes
        parts = {"codes": pack(own.codes_RC, self.bits), "codebook": own.codebook_GPD, "scale": own.scale_O}
        return CompressedTensor(self, compressed.shape, parts)

    @property
    def _grid(self) -> VectorGrid:
        return VectorGrid(self.bits, self.length, self.along_outputs, self.rows)
