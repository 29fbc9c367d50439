# SPDX-License-Identifier: Apache-2.0
"""The plain fit: each group's scale covers its largest weight, each weight takes the nearest code."""

from torch import Tensor

from .base import as_codes, covering_scale, nearest_steps, value_range
from .grids import IntegerCodes, IntegerGrid
from .hessian import Hessian


def absmax_codes(weight_OK: Tensor, grid: IntegerGrid, hessian: Hessian | None = None) -> IntegerCodes:
    """Codes within half a step of every weight; does not look at the Hessian."""
    weight_OGg = grid.grouped(weight_OK)
    scale_OG, zero_OG = covering_scale(*value_range(weight_OGg), grid)
    return as_codes(nearest_steps(weight_OGg, scale_OG, zero_OG, grid), scale_OG, zero_OG, grid)
