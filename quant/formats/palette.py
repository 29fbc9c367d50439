# SPDX-License-Identifier: Apache-2.0
"""Weights as indices into a table of values: `lut4` with one table for the weight, `lut4-r16` for every 16 rows.

O outputs, I inputs, K columns of the matrix view, G tables, N weights that share one, P = 2^bits entries.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ...ground.bits import packed_bytes
from ...ground.errors import TurbopocketError
from ..fit.base import Fit
from ..fit.grids import TableCodes, TableGrid
from ..fit.hessian import Hessian
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import WIDTHS, pack, unpack

_NAME = re.compile(r"lut([123468])(?:-r([1-9][0-9]*))?")


@dataclass(frozen=True)
class Palette(LayerFormat):
    """value = table[code]; `rows` neighbouring outputs share a table, the whole weight does when it is None.

    Parts: `codes` uint8 [O, ceil(K * bits / 8)] (row-packed, low bits first) and `table` fp16 [G, 2^bits], sorted.
    """

    bits: int
    rows: int | None = None

    syntax: ClassVar[str] = "lut<1|2|3|4|6|8>, each also with -r<N>"

    def __post_init__(self) -> None:
        require_codes(self.bits, self.rows)

    def __str__(self) -> str:
        return f"lut{self.bits}" + ("" if self.rows is None else f"-r{self.rows}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        bits, rows = match.groups()
        return cls(int(bits), int(rows) if rows else None)

    @property
    def weight_bits(self) -> float:
        return float(self.bits)

    def fits(self, shape: Shape) -> str | None:
        return refused_rows(self, shape, self.rows)

    def part_specs(self, shape: Shape) -> dict[str, PartSpec]:
        outputs, columns = matrix_shape(shape)
        return {
            "codes": PartSpec(torch.uint8, (outputs, packed_bytes(columns, self.bits))),
            "table": PartSpec(torch.float16, (outputs // (self.rows or outputs), 2**self.bits)),
        }

    def encode(self, weight: Tensor, fit: Fit, hessian: Hessian | None) -> dict[str, Tensor]:
        fitted = fit.choose(matrix_view(weight), TableGrid(self.bits, self.rows), hessian)
        return {"codes": pack(fitted.codes_OK, self.bits), "table": fitted.table_GP}

    def decode(self, compressed: CompressedTensor) -> Tensor:
        return from_matrix_view(TableCodes(*self.unpack(compressed)).values(), compressed.shape)

    def unpack(self, compressed: CompressedTensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [O, K] and table fp16 [G, 2^bits]: rows g * O / G up to (g + 1) * O / G read table g."""
        _, columns = matrix_shape(compressed.shape)
        return unpack(compressed.parts["codes"], self.bits, columns, signed=False), compressed.parts["table"]


def require_codes(bits: int, rows: int | None) -> None:
    """TurbopocketError when codes of that width, or tables for that many outputs, do not exist."""
    if bits not in WIDTHS:
        raise TurbopocketError(f"a code has {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} bits, not {bits}")
    if rows is not None and rows < 1:
        raise TurbopocketError(f"a table serves at least 1 output channel, not {rows}")


def refused_rows(format: LayerFormat, shape: Shape, rows: int | None) -> str | None:
    """Why no weight of this shape can have one table per `rows` outputs, with its numbers; None when it can."""
    if len(shape) not in (2, 4) or 0 in shape:
        return f"{format} stores Linear [O, I] and Conv2d [O, I, kh, kw] weights, not shape {list(shape)}"
    if rows is not None and shape[0] % rows:
        return f"{shape[0]} output channels are not a multiple of {rows} per table in {format}"
    return None
