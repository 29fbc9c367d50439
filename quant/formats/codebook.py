# SPDX-License-Identifier: Apache-2.0
"""Weights as indices into a codebook of short vectors, times a scale per row: `vq8-d4`, `vq6-d2-out`, `vq8-d4-r64` …

O outputs, I inputs, K columns of the matrix view, D length of a vector, G codebooks, N vectors that share one,
P = 2^bits entries, R rows and C columns of the codes.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from ..fit.base import Fit
from ..fit.kmeans import kmeans_importance, nearest_vectors, vector_kmeans
from ..fit.residual import least_squares_scale, row_scale
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import pack, packed_columns, unpack
from .palette import refused_rows, require_codes

_NAME = re.compile(r"vq([123468])-d([248])(-out)?(?:-r([1-9][0-9]*))?")
_LENGTHS = (2, 4, 8)


@dataclass(frozen=True)
class Codebook(LayerFormat):
    """value = scale[row] * codebook[code][place]; `rows` neighbouring outputs share a codebook, or all do.

    A vector is `length` neighbouring input channels at one tap, or with `along_outputs` as many neighbouring outputs
    of one column. Parts: `codes` uint8 [R, ceil(C * bits / 8)] (row-packed, low bits first) with R = O and
    C = K / D, or R = O / D and C = K along outputs; `codebook` fp16 [G, 2^bits, D]; `scale` fp16 [O].
    The codebook is made by k-means of the rows over their scales, weighted by the Hessian's diagonal: a `Fit` chooses
    values on integer grids and has no say here.
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
        outputs, _ = matrix_shape(shape)
        code_rows, code_columns = self._codes_shape(shape)
        return {
            "codes": PartSpec(torch.uint8, (code_rows, packed_columns(code_columns, self.bits))),
            "codebook": PartSpec(torch.float16, (outputs // (self.rows or outputs), 2**self.bits, self.length)),
            "scale": PartSpec(torch.float16, (outputs,)),
        }

    def encode(self, weight: Tensor, fit: Fit, hessian_KK: Tensor | None) -> dict[str, Tensor]:
        weight_OK = matrix_view(weight)
        shape, columns = tuple(weight.shape), weight_OK.shape[1]
        importance_K = torch.ones(columns) if hessian_KK is None else kmeans_importance(hessian_KK, columns)
        scale_O1 = row_scale(weight_OK)
        points_GND = self._vectors(weight_OK / torch.where(scale_O1 > 0, scale_O1, 1.0))
        # d (w - s c)² = d s² (w / s - c)²
        importance_GND = self._vectors(scale_O1.square() * importance_K)
        codebook_GPD = vector_kmeans(points_GND, importance_GND, 2**self.bits).to(torch.float16)
        codes_GN = nearest_vectors(points_GND, importance_GND, codebook_GPD.to(torch.float32))
        codes_RC = codes_GN.reshape(self._codes_shape(shape))
        rows_OK = self._rows(codes_RC, codebook_GPD)
        scale_O = least_squares_scale(weight_OK, rows_OK, importance_K, scale_O1.squeeze(1))
        return {"codes": pack(codes_RC, self.bits), "codebook": codebook_GPD, "scale": scale_O}

    def decode(self, compressed: CompressedTensor) -> Tensor:
        codes_RC, codebook_GPD, scale_O = self.unpack(compressed)
        rows_OK = self._rows(codes_RC, codebook_GPD)
        return from_matrix_view(rows_OK * scale_O.to(torch.float32).unsqueeze(1), compressed.shape)

    def unpack(self, compressed: CompressedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [O, K / D] ([O / D, K] along outputs), codebook fp16 [G, 2^bits, D], scale fp16 [O].

        Rows g * R / G up to (g + 1) * R / G of the codes read codebook g.
        """
        parts = compressed.parts
        _, code_columns = self._codes_shape(compressed.shape)
        return unpack(parts["codes"], self.bits, code_columns, signed=False), parts["codebook"], parts["scale"]

    def _codes_shape(self, shape: Shape) -> tuple[int, int]:
        outputs, columns = matrix_shape(shape)
        return (outputs // self.length, columns) if self.along_outputs else (outputs, columns // self.length)

    def _vectors(self, values_OK: Tensor) -> Tensor:
        """The values as [G, N, D], in the order of the codes."""
        outputs, columns = values_OK.shape
        if self.along_outputs:
            values_OK = values_OK.reshape(-1, self.length, columns).transpose(1, 2)
        return values_OK.reshape(outputs // (self.rows or outputs), -1, self.length)

    def _rows(self, codes_RC: Tensor, codebook_GPD: Tensor) -> Tensor:
        """float32 [O, K]: the codebook's vectors in the weight's places, not yet scaled."""
        code_rows, code_columns = codes_RC.shape
        groups, entries, length = codebook_GPD.shape
        first_entry_G11 = entries * torch.arange(groups).reshape(-1, 1, 1)
        indices = (codes_RC.reshape(groups, -1, code_columns) + first_entry_G11).flatten()
        vectors = codebook_GPD.to(torch.float32).reshape(-1, length)[indices]
        if self.along_outputs:
            vectors = vectors.reshape(code_rows, code_columns, length).transpose(1, 2)
            return vectors.reshape(code_rows * length, code_columns).contiguous()
        return vectors.reshape(code_rows, code_columns * length)
