# SPDX-License-Identifier: Apache-2.0
"""What a fit is, and the arithmetic of integer grids that several solvers share.

O outputs, K columns of the matrix view, G groups per row, g columns per group (K = G * g).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from .grids import FP16_DIGITS, Codes, Grid, IntegerCodes, IntegerGrid
from .hessian import Hessian

LARGEST_SCALE = torch.finfo(torch.float16).max


Solver = Callable[[Tensor, Any, Hessian | None], Any]
"""From float32 weights [O, K], a grid, and H = E[x xᵀ] of the layer's inputs if there is one, to codes.

H is [K, K], whole or half, or its diagonal [K] where the fit says that it reads no more of it. It stays as it is.
"""


@dataclass(frozen=True)
class Fit:
    """A way to choose codes: a solver for each kind of grid.

    `measuring` is the fit whose losses a plan compares, as fair to every format as this one, and quick, since it tries
    them all; this one when None. `group_scale_digits` are the significant bits of a group's scale, for runtimes that
    keep it shorter than fp16. `whole_hessian` says that a solver reads more of H than its diagonal: K² numbers of each
    layer have then to be collected, not K.
    """

    name: str
    solvers: Mapping[type[Grid[Any]], Solver]
    measuring: "Fit | None" = None
    group_scale_digits: int = FP16_DIGITS
    whole_hessian: bool = False

    def __str__(self) -> str:
        return self.name

    def choose(self, weight_OK: Tensor, grid: Grid[Codes], hessian: Hessian | None = None) -> Codes:
        """The codes; TurbopocketError when no solver knows the grid, or when its solver needs a Hessian."""
        solver = self.solvers.get(type(grid))
        if solver is None:
            known = ", ".join(kind.__name__ for kind in self.solvers)
            raise TurbopocketError(f"{self.name} has no solver for a {type(grid).__name__}: it has those for {known}")
        codes: Codes = solver(weight_OK, grid, hessian)
        return codes


def storable_scale(scale: Tensor, digits: int = FP16_DIGITS) -> Tensor:
    """float32 copies of the smallest fp16 numbers of so many significant bits that are not under `scale`; 1 for zeros.

    Upwards, so that the largest weight of a group never falls off the grid, and so that a scale under fp16's
    smallest subnormal (6e-8) becomes that number and not a division by zero. TurbopocketError over 65,504.
    """
    largest = float(scale.max()) if scale.numel() else 0.0
    end = LARGEST_SCALE // 2 ** (16 - digits) * 2 ** (16 - digits)
    if largest > end:
        raise TurbopocketError(f"a group needs scale {largest:.6g}, and fp16 scales end at {end:.0f}")
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    nearest = scale.to(torch.float16)
    # Positive floats are ordered like their bits: adding one to the bits is the next fp16 number.
    above = (nearest.view(torch.int16) + 1).view(torch.float16)
    least = torch.where(nearest.to(torch.float32) < scale, above, nearest)
    step = 2 ** (FP16_DIGITS - digits)
    bits = (least.view(torch.int16).to(torch.int32) + (step - 1)) // step * step
    return bits.to(torch.int16).view(torch.float16).to(torch.float32)


def value_range(weight_OGg: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group and 0: [O, G] each. A grid always holds 0."""
    return weight_OGg.amin(-1).clamp(max=0.0), weight_OGg.amax(-1).clamp(min=0.0)


def covering_scale(low_OG: Tensor, high_OG: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor | None]:
    """The least storable scale whose grid covers [low, high], and the zero (None on a symmetric grid).

    float32 [O, G] both; low <= 0 <= high. Every value in the range is within half a step of the grid.
    """
    if grid.symmetric:
        least_OG = torch.maximum(low_OG / grid.lowest_code, high_OG / grid.highest_code)
        return storable_scale(least_OG, grid.scale_digits), None
    scale_OG = storable_scale((high_OG - low_OG) / grid.highest_code, grid.scale_digits)
    zero_OG = torch.round(-low_OG / scale_OG).clamp_(0, grid.highest_code)
    return scale_OG, zero_OG


def nearest_steps(
    weight_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: IntegerGrid, out: Tensor | None = None
) -> Tensor:
    """float32 [O, G, g], `out` if given: the nearest code minus zero, so that the value is this times the scale."""
    steps = torch.div(weight_OGg, scale_OG.unsqueeze(-1), out=out).round_()
    if zero_OG is None:
        return steps.clamp_(grid.lowest_code, grid.highest_code)
    zero_OG1 = zero_OG.unsqueeze(-1)
    return steps.clamp_(-zero_OG1, grid.highest_code - zero_OG1)


def as_codes(steps_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: IntegerGrid) -> IntegerCodes:
    """Integer codes, fp16 scales and uint8 zeros from the float32 numbers a fit worked with."""
    codes_OGg = steps_OGg if zero_OG is None else steps_OGg + zero_OG.unsqueeze(-1)
    codes_OK = codes_OGg.reshape(codes_OGg.shape[0], -1).to(grid.code_dtype)
    zero = None if zero_OG is None else zero_OG.to(torch.uint8)
    return IntegerCodes(codes_OK, scale_OG.to(torch.float16), zero)
