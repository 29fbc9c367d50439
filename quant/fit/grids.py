# SPDX-License-Identifier: Apache-2.0
"""The grids a weight is fitted to, and the codes of a fitted one. Knows numbers only, no storage.

O outputs, K columns of the matrix view, G groups per row (integers) or of rows (tables, codebooks), g columns per group
(K = G * g), M codebooks, P entries of one, D length of a vector, J vectors per row (K = J * D), R rows and C columns of
codes, N vectors that share a codebook.
"""

from abc import ABC
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Codes = TypeVar("Codes")
FP16_DIGITS = 11
"""Significant bits of an fp16 number."""


class Grid(ABC, Generic[Codes]):
    """Which values are legal, and how a matrix [O, K] of them is coded; a solver chooses among them."""


@dataclass(frozen=True)
class IntegerGrid(Grid["IntegerCodes"]):
    """Legal values of one group: (code - zero) * scale for integer codes in [lowest_code, highest_code].

    `group` is the number of neighbouring columns that share a scale, which has `scale_digits` significant bits.
    A symmetric grid has zero = 0.
    """

    bits: int
    symmetric: bool
    group: int
    scale_digits: int = FP16_DIGITS

    @property
    def lowest_code(self) -> int:
        """int8 leaves -128 out, so that its range is the same on both sides; int4 cannot afford to."""
        if not self.symmetric:
            return 0
        return -127 if self.bits == 8 else -(2 ** (self.bits - 1))

    @property
    def highest_code(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8

    def grouped(self, weight_OK: Tensor) -> Tensor:
        """The same values as [O, G, g]."""
        return weight_OK.reshape(weight_OK.shape[0], -1, self.group)


@dataclass(frozen=True)
class IntegerCodes:
    """A fitted matrix: codes int8 [O, K] (uint8 when asymmetric), scale fp16 [O, G], zero uint8 [O, G]."""

    codes_OK: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None

    def values(self) -> Tensor:
        """float32 [O, K], computed with the scale as stored."""
        return grid_values(self.codes_OK, self.scale_OG, self.zero_OG)


@dataclass(frozen=True)
class TableGrid(Grid["TableCodes"]):
    """Legal values: the 2^bits entries of a table, which `rows` neighbouring outputs share, or all when it is None."""

    bits: int
    rows: int | None = None


@dataclass(frozen=True)
class TableCodes:
    """A fitted matrix: codes uint8 [O, K] and ascending tables fp16 [G, P], each for O / G neighbouring outputs."""

    codes_OK: Tensor
    table_GP: Tensor

    def values(self) -> Tensor:
        """float32 [O, K], computed with the table as stored."""
        indices_GN = self.codes_OK.reshape(len(self.table_GP), -1).to(torch.int64)
        return self.table_GP.to(torch.float32).gather(1, indices_GN).reshape(self.codes_OK.shape)


@dataclass(frozen=True)
class VectorGrid(Grid["VectorCodes"]):
    """Legal values of a vector: scale[row] * one of 2^bits codebook entries of `length` weights.

    A vector is `length` neighbouring columns, or with `along_outputs` as many neighbouring outputs of one column.
    `rows` neighbouring outputs share a codebook, or all when it is None.
    """

    bits: int
    length: int
    along_outputs: bool = False
    rows: int | None = None

    def codes_shape(self, outputs: int, columns: int) -> tuple[int, int]:
        """Rows R and columns C of a matrix's codes: [O, K / D], or [O / D, K] along outputs."""
        if self.along_outputs:
            return outputs // self.length, columns
        return outputs, columns // self.length

    def vectors(self, values_OK: Tensor) -> Tensor:
        """The values as [G, N, D], in the order of the codes."""
        outputs, columns = values_OK.shape
        if self.along_outputs:
            values_OK = values_OK.reshape(-1, self.length, columns).transpose(1, 2)
        return values_OK.reshape(outputs // (self.rows or outputs), -1, self.length)

    def rows_of(self, codes_RC: Tensor, codebook_GPD: Tensor) -> Tensor:
        """float32 [O, K]: the codebook's vectors in the matrix's places, not yet scaled."""
        indices = self.entries(codes_RC, codebook_GPD)
        return self.placed(codebook_GPD.to(torch.float32).flatten(0, 1)[indices], *codes_RC.shape)

    def entries(self, codes_RC: Tensor, codebook_GPD: Tensor) -> Tensor:
        """int64 [G * N]: where each code's vector is among those of all codebooks, in the order of the codes."""
        groups, entries, _ = codebook_GPD.shape
        first_entry_G1 = entries * torch.arange(groups).reshape(-1, 1)
        return (codes_RC.reshape(groups, -1) + first_entry_G1).flatten()

    def placed(self, vectors_ND: Tensor, code_rows: int, code_columns: int) -> Tensor:
        """[O, K]: vectors, one for each code in the order of the codes, in the matrix's places."""
        vectors = vectors_ND.reshape(code_rows, code_columns, self.length)
        if self.along_outputs:
            return vectors.transpose(1, 2).reshape(code_rows * self.length, code_columns).contiguous()
        return vectors.reshape(code_rows, code_columns * self.length)


@dataclass(frozen=True)
class VectorCodes:
    """A fitted matrix: codes uint8 [R, C], codebooks fp16 [G, P, D] for R / G rows of codes each, scale fp16 [O]."""

    grid: VectorGrid
    codes_RC: Tensor
    codebook_GPD: Tensor
    scale_O: Tensor

    def values(self) -> Tensor:
        """float32 [O, K], computed with codebook and scale as stored."""
        rows_OK = self.grid.rows_of(self.codes_RC, self.codebook_GPD)
        return rows_OK * self.scale_O.to(torch.float32).unsqueeze(1)


@dataclass(frozen=True)
class AdditiveGrid(Grid["AdditiveCodes"]):
    """Legal values of `length` neighbouring columns: scale[row] * Σ codebook[m][code[m]] over `count` codebooks.

    `universal` codebooks are those of `universal_codebooks`, whatever the matrix; otherwise they are fitted to it.
    """

    count: int
    bits: int
    length: int
    universal: bool = False


@dataclass(frozen=True)
class AdditiveCodes:
    """A fitted matrix: codes uint8 [M, O, J], codebooks fp16 [M, P, D], scale fp16 [O]."""

    codes_MOJ: Tensor
    codebooks_MPD: Tensor
    scale_O: Tensor

    def values(self) -> Tensor:
        """float32 [O, K], computed with codebooks and scale as stored."""
        rows_OK = summed_vectors(self.codebooks_MPD.to(torch.float32), self.codes_MOJ)
        return rows_OK * self.scale_O.to(torch.float32).unsqueeze(1)


def grid_values(codes_OK: Tensor, scale_OG: Tensor, zero_OG: Tensor | None) -> Tensor:
    """float32 [O, K]: (codes - zero) * scale, group by group."""
    outputs, columns = codes_OK.shape
    steps_OGg = codes_OK.to(torch.float32).reshape(outputs, scale_OG.shape[1], -1)
    if zero_OG is not None:
        steps_OGg = steps_OGg - zero_OG.to(torch.float32).unsqueeze(-1)
    return (steps_OGg * scale_OG.to(torch.float32).unsqueeze(-1)).reshape(outputs, columns)


def summed_vectors(codebooks_MPD: Tensor, codes_MOJ: Tensor) -> Tensor:
    """[O, K]: the sum over the codebooks of each code's vector."""
    _, outputs, _ = codes_MOJ.shape
    vectors = [
        codebook_PD.index_select(0, codes_OJ.flatten().to(torch.int32))
        for codebook_PD, codes_OJ in zip(codebooks_MPD, codes_MOJ, strict=True)
    ]
    return torch.stack(vectors).sum(0).reshape(outputs, -1)
