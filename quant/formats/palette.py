# SPDX-License-Identifier: Apache-2.0
"""Weights as indices into a table of values: `lut4` with one table for the weight, `lut4-r16` for every 16 rows.

O outputs, I inputs, K columns of the matrix view, G tables, N weights that share one, P = 2^bits entries.
"""

import torch
from torch import Tensor

from ...ground.bits import packed_bytes
from ..fit.base import Fit
from ..fit.grids import TableCodes, TableGrid
from ..fit.hessian import Hessian
from ..names import PaletteName
from .base import CompressedTensor, LayerFormat, PartSpec, Shape, from_matrix_view, matrix_shape, matrix_view
from .bits import pack, unpack


class Palette(PaletteName, LayerFormat):
    """value = table[code]; `rows` neighbouring outputs share a table, the whole weight does when it is None.

    Parts: `codes` uint8 [O, ceil(K * bits / 8)] (row-packed, low bits first) and `table` fp16 [G, 2^bits], sorted.
    """

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


def refused_rows(format: LayerFormat, shape: Shape, rows: int | None) -> str | None:
    """Why no weight of this shape can have one table per `rows` outputs, with its numbers; None when it can."""
    if len(shape) not in (2, 4) or 0 in shape:
        return f"{format} stores Linear [O, I] and Conv2d [O, I, kh, kw] weights, not shape {list(shape)}"
    if rows is not None and shape[0] % rows:
        return f"{shape[0]} output channels are not a multiple of {rows} per table in {format}"
    return None
