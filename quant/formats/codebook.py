# SPDX-License-Identifier: Apache-2.0
"""Weights as indices into a codebook of short vectors, times a scale per row: `vq8-d4`, `vq6-d2-out`, `vq8-d4-r64` …

O outputs, I inputs, K columns of the matrix view, D length of a vector, G codebooks, N vectors that share one,
P = 2^bits entries, R rows and C columns of the codes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ...ground.bits import packed_bytes
from ...ground.errors import TurbopocketError
from ..fit.base import Fit
from ..fit.grids import VectorCodes, VectorGrid
from ..fit.hessian import Hessian
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import pack, unpack
from .palette import refused_rows, require_codes

_NAME = re.compile(r"vq([123468])-d([248])(-out)?(?:-r([1-9][0-9]*))?")
_LENGTHS = (2, 4, 8)


@dataclass(frozen=True)
class Codebook(LayerFormat):
    """value = scale[row] * codebook[code][place]; `rows` neighbouring outputs share a codebook, or all do.

    A vector is `length` neighbouring input channels at one tap, or with `along_outputs` as many neighbouring outputs
    of one column. Parts: `codes` uint8 [R, ceil(C * bits / 8)] (row-packed, low bits first) with R = O and
    C = K / D, or R = O / D and C = K along outputs; `codebook` fp16 [G, 2^bits, D]; `scale` fp16 [O].
    """

    bits: int
    length: int
    along_outputs: bool = False
    rows: int | None = None

    syntax: ClassVar[str] = "vq<1|2|3|4|6|8>-d<2|4|8>, each also with -out, -r<N>, -out-r<N>"

    def __post_init__(self) -> None:
        require_codes(self.bits, self.rows)
        if self.length not in _LENGTHS:
            raise TurbopocketError(f"a vector has 2, 4 or 8 weights, not {self.length}")

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"-r{self.rows}"
        return f"vq{self.bits}-d{self.length}" + ("-out" if self.along_outputs else "") + rows

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        bits, length, along_outputs, rows = match.groups()
        return cls(int(bits), int(length), along_outputs is not None, int(rows) if rows else None)

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
