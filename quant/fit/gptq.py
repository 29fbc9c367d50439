# SPDX-License-Identifier: Apache-2.0
"""Codes chosen column by column, each column's rounding error fed forward into the columns still to come.

Frantar et al., GPTQ (2022), algorithm 1, with grouped scales. O outputs, K columns, G groups, g columns per
group, B columns of one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from .base import as_codes, checked_hessian, nearest_steps
from .grids import IntegerCodes, IntegerGrid
from .mse import best_scale

# Added to the Hessian's diagonal as a share of its mean (GPTQ section 3.3, step 3).
DAMPING = 0.01
BLOCK_COLUMNS = 128
# Rows of a matrix that are worked on at once where it is changed in place.
_RUN = 256


def gptq_codes(weight_OK: Tensor, grid: IntegerGrid, hessian_KK: Tensor | None = None) -> IntegerCodes:
    """Codes of low tr[(Ŵ - W) H (Ŵ - W)ᵀ]; the scale of a group is searched when its first column is reached.

    Columns that were never driven (H[k, k] = 0) neither send nor receive error: they round to nearest.
    TurbopocketError without a Hessian, with one of another size, or with one that is not positive semidefinite.
    """
    if hessian_KK is None:
        raise TurbopocketError("gptq needs the layer's Hessian", hint="calibrate first, or choose the fit `mse`")
    outputs, columns = weight_OK.shape
    groups = columns // grid.group
    sweep = _Sweep(
        grid=grid,
        feedback_KK=error_feedback(checked_hessian(hessian_KK, columns)),
        # Columns lead, so that one column of all outputs is one stretch of memory.
        pending_KO=weight_OK.T.contiguous(),
        steps_KO=torch.empty(columns, outputs),
        scale_GO=torch.empty(groups, outputs),
        zero_GO=None if grid.symmetric else torch.empty(groups, outputs),
    )
    for start, stop in _blocks(columns, grid.group):
        sweep.round_block(start, stop)
    zero_OG = None if sweep.zero_GO is None else sweep.zero_GO.T
    return as_codes(grid.grouped(sweep.steps_KO.T), sweep.scale_GO.T, zero_OG, grid)


def error_feedback(hessian_KK: Tensor) -> Tensor:
    """U float32 [K, K], upper triangular, with UᵀU = (H + damping)⁻¹: row k says where column k's error goes.

    One factorisation from the far corner, H = R Rᵀ with R upper, gives U = R⁻¹ without inverting H itself. All of it,
    and the result, lies in the memory of one float64 matrix; rows of the result are not next to each other.
    """
    columns, mean = len(hessian_KK), float(hessian_KK.diagonal().to(torch.float64).mean())
    factor_KK = torch.empty(columns, columns, dtype=torch.float64)
    for start, stop in _runs(columns):
        factor_KK[start:stop] = hessian_KK[columns - stop : columns - start].flip(0, 1)
    factor_KK.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    # H is symmetric, so its transpose is itself in the order of memory that is factored without a copy.
    factor_KK, failed = factor_KK.T, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(factor_KK, out=(factor_KK, failed))
    if int(failed):
        raise TurbopocketError(f"gptq: the Hessian is not positive semidefinite (pivot {int(failed)} of its factor)")
    _invert_lower(factor_KK)
    return _flipped_float32(factor_KK)


def _invert_lower(lower_KK: Tensor) -> None:
    """L⁻¹ in the place of L, a run of rows at a time: [[A, 0], [C, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ C A⁻¹, D⁻¹]]."""
    for start, stop in _runs(len(lower_KK)):
        rows_RK = lower_KK[start:stop]
        own_RR = rows_RK[:, start:stop]
        identity_RR = torch.eye(stop - start, dtype=lower_KK.dtype)
        own_RR.copy_(torch.linalg.solve_triangular(own_RR, identity_RR, upper=False))
        rows_RK[:, :start] = -own_RR @ (rows_RK[:, :start] @ lower_KK[:start, :start])


def _flipped_float32(values_KK: Tensor) -> Tensor:
    """The values in float32 with rows and columns in reverse order, in their own memory, which is transposed."""
    columns = len(values_KK)
    own_KK = values_KK.T
    narrow_KK = own_KK.view(torch.float32)[:, :columns]
    middle = (columns + 1) // 2
    for start in range(0, middle, _RUN):
        stop = min(start + _RUN, middle)
        first, last = (
            own_KK[a:b].flip(0, 1).to(torch.float32) for a, b in ((start, stop), (columns - stop, columns - start))
        )
        narrow_KK[columns - stop : columns - start] = first
        narrow_KK[start:stop] = last
    return narrow_KK.T


def _runs(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _RUN, count)) for start in range(0, count, _RUN))


@dataclass
class _Sweep:
    """The state of one pass over the columns; `pending_KO` already holds the errors of the columns passed."""

    grid: IntegerGrid
    feedback_KK: Tensor
    pending_KO: Tensor
    steps_KO: Tensor
    scale_GO: Tensor
    zero_GO: Tensor | None

    def round_block(self, start: int, stop: int) -> None:
        """Rounds columns [start, stop); later columns hear of the errors once, in one matrix product."""
        errors_BO = torch.empty(stop - start, self.pending_KO.shape[1])
        for column in range(start, stop):
            group = column // self.grid.group
            if column % self.grid.group == 0:
                self._choose_scale(group)
            value_O = self._round_column(column, group)
            row_K = self.feedback_KK[column]
            error_O = (self.pending_KO[column] - value_O) / row_K[column]
            self.pending_KO[column + 1 : stop].addr_(row_K[column + 1 : stop], error_O, alpha=-1)
            errors_BO[column - start] = error_O
        self.pending_KO[stop:].addmm_(self.feedback_KK[start:stop, stop:].T, errors_BO, alpha=-1)

    def _choose_scale(self, group: int) -> None:
        members = slice(group * self.grid.group, (group + 1) * self.grid.group)
        # What rounding column k costs once later columns have absorbed what they can: (error / U[k, k])².
        importance_1g = self.feedback_KK.diagonal()[members].reciprocal().square().unsqueeze(0)
        scale_O1, zero_O1 = best_scale(self.pending_KO[members].T.unsqueeze(1), self.grid, importance_1g)
        self.scale_GO[group] = scale_O1[:, 0]
        if self.zero_GO is not None and zero_O1 is not None:
            self.zero_GO[group] = zero_O1[:, 0]

    def _round_column(self, column: int, group: int) -> Tensor:
        scale_O = self.scale_GO[group]
        zero_O = None if self.zero_GO is None else self.zero_GO[group]
        steps_O = nearest_steps(self.pending_KO[column].unsqueeze(-1), scale_O, zero_O, self.grid).squeeze(-1)
        self.steps_KO[column] = steps_O
        return steps_O * scale_O


def _blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Column ranges of at most about 128 that hold whole groups, or lie within one group."""
    stride = BLOCK_COLUMNS // group * group or group
    for first in range(0, columns, stride):
        last = min(first + stride, columns)
        for start in range(first, last, BLOCK_COLUMNS):
            yield start, min(start + BLOCK_COLUMNS, last)
