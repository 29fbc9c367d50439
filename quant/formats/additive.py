# SPDX-License-Identifier: Apache-2.0
"""Weights as sums of vectors from several codebooks, times a scale per row: `avq2x8-d8`, `avq3x8-d8-shared` …

Additive quantization as in Egiazarian et al., VQDM (2024), section 3. O outputs, K columns of the matrix view,
M codebooks, P = 2^bits entries of one, D length of a vector, J = K / D vectors per row.
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
from ..fit.grids import AdditiveCodes, AdditiveGrid, VectorCodes, VectorGrid
from ..fit.hessian import Hessian
from ..fit.universal import LENGTHS
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import pack, unpack
from .palette import refused_rows, require_codes

_NAME = re.compile(r"avq([2-4])x([123468])-d([248])(-shared)?")
_LENGTHS = (2, 4, 8)
_MOST_CODEBOOKS = 4
_SHARED_BITS = 8


@dataclass(frozen=True)
class Additive(LayerFormat):
    """value = scale[row] * Σ codebook[m][code[m]][place]; a vector is `length` neighbouring input channels at one tap.

    Parts: `codes` uint8 [M, O, ceil(J * bits / 8)] (row-packed, low bits first), `codebooks` fp16 [M, 2^bits, D],
    `scale` fp16 [O]. All rows share the codebooks; with `shared` all layers of a component do.
    """

    count: int
    bits: int
    length: int
    shared: bool = False

    syntax: ClassVar[str] = "avq<2|3|4>x<1|2|3|4|6|8>-d<2|4|8>, avq<2|3|4>x8-d<4|8>-shared"

    def __post_init__(self) -> None:
        require_codes(self.bits, None)
        if not 2 <= self.count <= _MOST_CODEBOOKS:
            raise TurbopocketError(f"a sum has 2 to {_MOST_CODEBOOKS} codebooks, not {self.count}; vq is for one")
        if self.length not in _LENGTHS:
            raise TurbopocketError(f"a vector has 2, 4 or 8 weights, not {self.length}")
        if self.shared and (self.bits != _SHARED_BITS or self.length not in LENGTHS):
            raise TurbopocketError(
                f"shared codebooks have codes of {_SHARED_BITS} bits and vectors of 4 or 8, not {self}"
            )

    def __str__(self) -> str:
        return f"avq{self.count}x{self.bits}-d{self.length}" + ("-shared" if self.shared else "")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        count, bits, length, shared = match.groups()
        return cls(int(count), int(bits), int(length), shared is not None)

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
