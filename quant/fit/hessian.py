# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a layer's loss as fits are given it, and its factor, in the memory of one float32 matrix.

K columns of the matrix view, S of one strip, B of one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError

# Columns that are factored at once, in float64; what lies beside them is changed in matrix products of float32.
_BLOCK = 256


@dataclass(frozen=True)
class HalfMatrix:
    """A symmetric matrix [K, K] (float32) as strips of columns, [end, S] each, from the first row to the strip's last
    column: half of K² numbers."""

    strips: tuple[Tensor, ...]

    @property
    def columns(self) -> int:
        return len(self.strips[-1])

    def diagonal(self) -> Tensor:
        """[K]."""
        return torch.cat([strip_ES.diagonal(strip_ES.shape[1] - len(strip_ES)) for strip_ES in self.strips])

    def write_to(self, whole_KK: Tensor) -> None:
        """Puts all of the matrix there."""
        for strip_ES in self.strips:
            end, start = len(strip_ES), len(strip_ES) - strip_ES.shape[1]
            whole_KK[:end, start:end] = strip_ES
            whole_KK[start:end, :start] = strip_ES[:start].T


Hessian = Tensor | HalfMatrix
"""H = E[x xᵀ] of a layer's inputs: [K, K], whole or half, or its diagonal [K] where a fit reads no more of it."""


def own_hessian(
    hessian: Hessian, columns: int, out_KK: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """A float32 copy [columns, columns], in `out_KK` if given, which the fit may write to.

    TurbopocketError when the Hessian has another size or is not finite.
    """
    _require_size(hessian, columns)
    own_KK = torch.empty(columns, columns, device=device) if out_KK is None else out_KK
    if isinstance(hessian, HalfMatrix):
        hessian.write_to(own_KK)
    else:
        own_KK.copy_(hessian)
    _require_finite(own_KK)
    return own_KK


def checked_diagonal(hessian: Hessian, columns: int) -> Tensor:
    """[K], of a Hessian or of its diagonal alone; TurbopocketError as `own_hessian` raises it, of what is read."""
    if isinstance(hessian, Tensor) and hessian.ndim == 1:
        if len(hessian) != columns:
            raise TurbopocketError(f"Hessian of {len(hessian)} columns for a weight of {columns} columns")
        diagonal_K = hessian
    else:
        _require_size(hessian, columns)
        diagonal_K = hessian.diagonal()
    _require_finite(diagonal_K)
    return diagonal_K


def _require_size(hessian: Hessian, columns: int) -> None:
    shape = [hessian.columns] * 2 if isinstance(hessian, HalfMatrix) else list(hessian.shape)
    if shape != [columns, columns]:
        raise TurbopocketError(f"Hessian of shape {shape} for a weight of {columns} columns")


def _require_finite(values: Tensor) -> None:
    # Not `isfinite(values)`: that is a matrix of its own, and NaN goes through least and largest.
    if not all(torch.isfinite(end) for end in values.aminmax()):
        raise TurbopocketError("the Hessian has NaN or infinite values")


def factor_in_place(matrix_KK: Tensor, fit: str) -> Tensor:
    """Lower triangular L with L Lᵀ = the symmetric matrix, in its memory; zeros above the diagonal.

    Cholesky by blocks, each column's sums in one product of float32 and the blocks on the diagonal in float64. Its
    rounding errors are those of a matrix that differs by about 2⁻²⁴ of each column's own size (Higham, Accuracy and
    Stability of Numerical Algorithms, theorem 10.3), so by less than any damping here as long as that is a share of the
    diagonal's mean. TurbopocketError naming `fit` when the matrix is not positive definite.
    """
    for start, stop in _blocks(len(matrix_KK)):
        panel_KB, done = matrix_KK[start:, start:stop], matrix_KK[:, :start]
        panel_KB.addmm_(done[start:], done[start:stop].T, alpha=-1)
        own_BB, failed_at = torch.linalg.cholesky_ex(panel_KB[: stop - start].to(torch.float64))
        if int(failed_at):
            pivot = start + int(failed_at)
            raise TurbopocketError(f"{fit}: the Hessian is not positive semidefinite (pivot {pivot} of its factor)")
        panel_KB[: stop - start] = own_BB
        identity_BB = torch.eye(stop - start, dtype=torch.float64, device=matrix_KK.device)
        inverse_BB = torch.linalg.solve_triangular(own_BB, identity_BB, upper=False).to(torch.float32)
        panel_KB[stop - start :] = panel_KB[stop - start :] @ inverse_BB.T
        matrix_KK[start:stop, stop:] = 0.0
    return matrix_KK


def flip_in_place(matrix_KK: Tensor) -> None:
    """Rows and columns in reverse order."""
    columns = len(matrix_KK)
    middle = (columns + 1) // 2
    for start, stop in _blocks(middle):
        first, last = matrix_KK[start:stop], matrix_KK[columns - stop : columns - start]
        first_BK, last_BK = first.flip(0, 1), last.flip(0, 1)
        last.copy_(first_BK)
        first.copy_(last_BK)


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))
