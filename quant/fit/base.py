# SPDX-License-Identifier: Apache-2.0
"""The grids a weight is fitted to, and what a fit hands back. Knows numbers only, no storage.

O outputs, K columns of the matrix view, G groups per row, g columns per group (K = G * g), M codebooks, P entries of
one, D length of a vector, J vectors per row (K = J * D).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError

LARGEST_SCALE = torch.finfo(torch.float16).max
FP16_DIGITS = 11
"""Significant bits of an fp16 number."""


@dataclass(frozen=True)
class Grid:
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
class GridCodes:
    """A fitted matrix: codes int8 [O, K] (uint8 when asymmetric), scale fp16 [O, G], zero uint8 [O, G]."""

    codes_OK: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None

    def values(self) -> Tensor:
        """float32 [O, K], computed with the scale as stored."""
        return grid_values(self.codes_OK, self.scale_OG, self.zero_OG)


@dataclass(frozen=True)
class AdditiveGrid:
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


@dataclass(frozen=True)
class Fit:
    """A way to choose codes, for float32 weights [O, K] and H = E[x xᵀ] of the layer's inputs [K, K].

    `choose(weight_OK, grid, hessian_KK)` is for integers, `choose_vectors` for sums of codebook vectors.
    `group_scale_digits` are the significant bits of a group's scale, for runtimes that keep it shorter than fp16.
    """

    name: str
    needs_hessian: bool
    choose: Callable[[Tensor, Grid, Tensor | None], GridCodes]
    choose_vectors: Callable[[Tensor, AdditiveGrid, Tensor | None], AdditiveCodes]
    group_scale_digits: int = FP16_DIGITS

    def __str__(self) -> str:
        return self.name


def checked_hessian(hessian_KK: Tensor, columns: int) -> Tensor:
    """The Hessian itself; TurbopocketError when it is not [columns, columns] or not finite."""
    if tuple(hessian_KK.shape) != (columns, columns):
        raise TurbopocketError(f"Hessian of shape {list(hessian_KK.shape)} for a weight of {columns} columns")
    if not torch.isfinite(hessian_KK).all():
        raise TurbopocketError("the Hessian has NaN or infinite values")
    return hessian_KK


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


def covering_scale(low_OG: Tensor, high_OG: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The least storable scale whose grid covers [low, high], and the zero (None on a symmetric grid).

    float32 [O, G] both; low <= 0 <= high. Every value in the range is within half a step of the grid.
    """
    if grid.symmetric:
        least_OG = torch.maximum(low_OG / grid.lowest_code, high_OG / grid.highest_code)
        return storable_scale(least_OG, grid.scale_digits), None
    scale_OG = storable_scale((high_OG - low_OG) / grid.highest_code, grid.scale_digits)
    zero_OG = torch.round(-low_OG / scale_OG).clamp_(0, grid.highest_code)
    return scale_OG, zero_OG


def nearest_steps(weight_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid) -> Tensor:
    """float32 [O, G, g]: the nearest code minus zero, so that the value is this times the scale."""
    steps = torch.div(weight_OGg, scale_OG.unsqueeze(-1)).round_()
    if zero_OG is None:
        return steps.clamp_(grid.lowest_code, grid.highest_code)
    zero_OG1 = zero_OG.unsqueeze(-1)
    return torch.minimum(torch.maximum(steps, -zero_OG1), grid.highest_code - zero_OG1)


def as_codes(steps_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, grid: Grid) -> GridCodes:
    """Integer codes, fp16 scales and uint8 zeros from the float32 numbers a fit worked with."""
    codes_OGg = steps_OGg if zero_OG is None else steps_OGg + zero_OG.unsqueeze(-1)
    codes_OK = codes_OGg.reshape(codes_OGg.shape[0], -1).to(grid.code_dtype)
    zero = None if zero_OG is None else zero_OG.to(torch.uint8)
    return GridCodes(codes_OK, scale_OG.to(torch.float16), zero)
