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
from .base import as_codes, nearest_steps
from .grids import IntegerCodes, IntegerGrid
from .hessian import Hessian, factor_in_place, flip_in_place, own_hessian
from .mse import best_scale
from .threads import one_thread

# Added to the Hessian's diagonal as a share of its mean (GPTQ section 3.3, step 3).
DAMPING = 0.01
BLOCK_COLUMNS = 128


def gptq_codes(weight_OK: Tensor, grid: IntegerGrid, hessian: Hessian | None = None) -> IntegerCodes:
    """Codes of low tr[(Ŵ - W) H (Ŵ - W)ᵀ]; the scale of a group is searched when its first column is reached.

    Columns that were never driven (H[k, k] = 0) neither send nor receive error: they round to nearest.
    TurbopocketError without a Hessian, with one of another size, or with one that is not positive semidefinite.
    """
    if hessian is None:
        raise TurbopocketError("gptq needs the layer's Hessian", hint="calibrate first, or choose the fit `mse`")
    outputs, columns = weight_OK.shape
    groups = columns // grid.group
    sweep = _Sweep(
        grid=grid,
        factor_KK=upper_factor(hessian, columns),
        # Columns lead, so that one column of all outputs is one stretch of memory.
        pending_KO=weight_OK.T.contiguous(),
        steps_KO=torch.empty(columns, outputs),
        scale_GO=torch.empty(groups, outputs),
        zero_GO=None if grid.symmetric else torch.empty(groups, outputs),
    )
    for start, stop in _blocks(columns, grid.group):
        sweep.round_block(weight_OK[:, start:stop], start, stop)
    zero_OG = None if sweep.zero_GO is None else sweep.zero_GO.T
    return as_codes(grid.grouped(sweep.steps_KO.T), sweep.scale_GO.T, zero_OG, grid)


def upper_factor(hessian: Hessian, columns: int) -> Tensor:
    """R float32 [K, K], upper triangular, with R Rᵀ = H + damping: GPTQ's U of (H + damping)⁻¹ = UᵀU is R⁻¹.

    All of it lies in the memory of the result.
    """
    factor_KK = own_hessian(hessian, columns)
    mean = float(factor_KK.diagonal().mean(dtype=torch.float64))
    factor_KK.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    flip_in_place(factor_KK)
    factor_in_place(factor_KK, "gptq")
    flip_in_place(factor_KK)
    return factor_KK


@dataclass
class _Sweep:
    """The state of one pass over the columns; `pending_KO` already holds the errors of the columns passed.

    With R Rᵀ = H the loss of a row's error e is ||e R||², and column j of e R is e_j R[j, j] + Σ_{i < j} e_i R[i, j]:
    column j is least when it rounds w_j + Σ_{i < j} e_i R[i, j] / R[j, j]. That is what U sends on, from the other
    side: no inverse is needed.
    """

    grid: IntegerGrid
    factor_KK: Tensor
    pending_KO: Tensor
    steps_KO: Tensor
    scale_GO: Tensor
    zero_GO: Tensor | None

    def round_block(self, weight_OB: Tensor, start: int, stop: int) -> None:
        """Rounds columns [start, stop); later columns hear of the errors once, in one matrix product."""
        weight_BO, own_BB = weight_OB.T.contiguous(), self._sent(slice(start, stop), slice(start, stop))
        errors_BO = torch.empty_like(weight_BO)
        with one_thread():
            for column in range(start, stop):
                group, inside = column // self.grid.group, column - start
                if column % self.grid.group == 0:
                    self._choose_scale(group)
                torch.sub(weight_BO[inside], self._round_column(column, group), out=errors_BO[inside])
                self.pending_KO[column + 1 : stop].addr_(own_BB[inside, inside + 1 :], errors_BO[inside])
        self.pending_KO[stop:].addmm_(self._sent(slice(start, stop), slice(stop, None)).T, errors_BO)

    def _sent(self, rows: slice, columns: slice) -> Tensor:
        """R[i, j] / R[j, j]: what columns j hear of errors in columns i."""
        return self.factor_KK[rows, columns] / self.factor_KK.diagonal()[columns]

    def _choose_scale(self, group: int) -> None:
        members = slice(group * self.grid.group, (group + 1) * self.grid.group)
        # What rounding column k costs once later columns have absorbed what they can: (error * R[k, k])².
        importance_1g = self.factor_KK.diagonal()[members].square().unsqueeze(0)
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
