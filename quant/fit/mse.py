# SPDX-License-Identifier: Apache-2.0
"""Scales that minimise the squared error of each group, weighted by how strongly each column is driven.

O outputs, K columns, G groups per row, g columns per group.
"""

import torch
from torch import Tensor

from .base import as_codes, covering_scale, nearest_steps, storable_scale, value_range
from .grids import IntegerCodes, IntegerGrid
from .hessian import Hessian, checked_diagonal
from .threads import in_threads

# Shares of the full range that a scale may cover, down to a third; a long tail in a 4-bit row is worth clipping far.
# Chosen, not measured: least squares afterwards makes up for the distance between two of them.
SHRINKS = tuple(1.0 - 0.035 * step for step in range(20))
# Weights per pass: the few working copies of one chunk stay in a core's cache.
CHUNK_WEIGHTS = 2**17


def mse_codes(weight_OK: Tensor, grid: IntegerGrid, hessian: Hessian | None = None) -> IntegerCodes:
    """Nearest codes under the best scale of each group; never a larger weighted squared error than `absmax`.

    The weight of column k is H[k, k] when a Hessian is given, else 1.
    """
    importance_Gg = None
    if hessian is not None:
        importance_Gg = column_importance(checked_diagonal(hessian, weight_OK.shape[1])).reshape(-1, grid.group)
    weight_OGg = grid.grouped(weight_OK)
    scale_OG, zero_OG = best_scale(weight_OGg, grid, importance_Gg)
    return as_codes(nearest_steps(weight_OGg, scale_OG, zero_OG, grid), scale_OG, zero_OG, grid)


def column_importance(diagonal_K: Tensor) -> Tensor:
    """[K]: the Hessian's diagonal, with a floor of 1 % of its mean so that no column is free to clip.

    The share is chosen, not measured: calibration sees few pictures, and a column it did not drive may yet be driven.
    """
    diagonal_K = diagonal_K.to(torch.float32).clamp(min=0.0)
    mean = diagonal_K.mean()
    return diagonal_K.clamp(min=0.01 * float(mean)) if mean > 0 else torch.ones_like(diagonal_K)


@torch.no_grad()
def best_scale(weight_OGg: Tensor, grid: IntegerGrid, importance_Gg: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero (float32 [O, G], None when symmetric) of least error: a search, then least squares.

    Scales to try are made for all rows at once, since an operator on those of one chunk would take longer to call than
    to run.
    """
    low_OG, high_OG = value_range(weight_OGg)
    covering = [covering_scale(low_OG * shrink, high_OG * shrink, grid) for shrink in SHRINKS]

    def search(rows: slice) -> tuple[Tensor, Tensor | None]:
        best = _Best(weight_OGg[rows], grid, importance_Gg)
        for scale_OG, zero_OG in covering:
            best.offer(scale_OG[rows], None if zero_OG is None else zero_OG[rows])
        best.offer(best.least_squares_scale(), best.zero_OG)
        return best.scale_OG, best.zero_OG

    count = max(1, CHUNK_WEIGHTS // weight_OGg[0].numel())
    found = in_threads(search, [slice(start, start + count) for start in range(0, len(weight_OGg), count)])
    zeros = [zero_OG for _, zero_OG in found if zero_OG is not None]
    return torch.cat([scale_OG for scale_OG, _ in found]), torch.cat(zeros) if zeros else None


class _Best:
    """The best scale seen so far of every group, each group for itself."""

    scale_OG: Tensor
    zero_OG: Tensor | None

    def __init__(self, weight_OGg: Tensor, grid: IntegerGrid, importance_Gg: Tensor | None) -> None:
        self.weight_OGg, self.grid, self.importance_Gg = weight_OGg, grid, importance_Gg
        self.error_OG = torch.full(weight_OGg.shape[:2], torch.inf)
        self.scale_OG = torch.ones(weight_OGg.shape[:2])
        self.zero_OG = None if grid.symmetric else torch.zeros(weight_OGg.shape[:2])
        self._work_OGg = torch.empty_like(weight_OGg)

    def offer(self, scale_OG: Tensor, zero_OG: Tensor | None) -> None:
        """Takes the offered scale where it lowers the error; the earlier one stays on a tie."""
        residual_OGg = nearest_steps(self.weight_OGg, scale_OG, zero_OG, self.grid, out=self._work_OGg)
        residual_OGg.mul_(scale_OG.unsqueeze(-1)).sub_(self.weight_OGg).square_()
        error_OG = self._sum(residual_OGg)
        better = error_OG < self.error_OG
        self.error_OG = torch.where(better, error_OG, self.error_OG)
        self.scale_OG = torch.where(better, scale_OG, self.scale_OG)
        if zero_OG is not None and self.zero_OG is not None:
            self.zero_OG = torch.where(better, zero_OG, self.zero_OG)

    def least_squares_scale(self) -> Tensor:
        """argmin over scale of Σ d (w - scale * step)² for the best steps: Σ d w step / Σ d step²."""
        steps_OGg = nearest_steps(self.weight_OGg, self.scale_OG, self.zero_OG, self.grid)
        projection_OG = self._sum(steps_OGg * self.weight_OGg)
        energy_OG = self._sum(steps_OGg.square_())
        least_squares_OG = torch.where(energy_OG > 0, projection_OG / energy_OG, self.scale_OG)
        return storable_scale(least_squares_OG, self.grid.scale_digits)

    def _sum(self, values_OGg: Tensor) -> Tensor:
        return (values_OGg if self.importance_Gg is None else values_OGg.mul_(self.importance_Gg)).sum(-1)
