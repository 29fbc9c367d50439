# SPDX-License-Identifier: Apache-2.0
"""The codebooks of least loss while all codes stay: a linear least-squares problem, solved by conjugate gradients.

VQDM takes Adam here; the loss is quadratic in the codebooks, so no learning rate has to be chosen. O outputs,
K columns, M codebooks, P entries of one, D length of a vector, J vectors per row.
"""

import torch
from torch import Tensor

from .grids import summed_vectors

# Three times as many gained nothing on the three layers of `pocket` where that was tried.
STEPS = 10
# Weights looked at for each number that is solved for; rows beyond that are left out.
WEIGHTS_PER_NUMBER = 256
# Added to the preconditioner's blocks as a share of their own and of all blocks' mean: entries may go unused.
_DAMPING_OWN, _DAMPING_ALL = 1e-4, 1e-8


def solved_codebooks(
    codebooks_MPD: Tensor, codes_MOJ: Tensor, pulled_OK: Tensor, importance_O1: Tensor, hessian_KK: Tensor
) -> Tensor:
    """float32 [M, P, D] of lower Σ importance[o] * e_o H e_oᵀ with e = target - Σ vectors, from the given ones on.

    `pulled_OK` is e H of the given ones. Rows may be a sample: see `sampled_rows`.
    """
    system = _NormalEquations(codes_MOJ, importance_O1, hessian_KK, codebooks_MPD.shape)
    solution = codebooks_MPD.clone()
    residual = system.gathered(pulled_OK)
    preconditioned = system.preconditioned(residual)
    direction, slope = preconditioned, (residual * preconditioned).sum()
    for _ in range(STEPS):
        changed = system.gathered(summed_vectors(direction, codes_MOJ) @ hessian_KK)
        curvature = (direction * changed).sum()
        step = torch.where(curvature > 0, slope / curvature, 0.0)
        solution += step * direction
        residual = residual - step * changed
        preconditioned = system.preconditioned(residual)
        earlier, slope = slope, (residual * preconditioned).sum()
        direction = preconditioned + torch.where(earlier > 0, slope / earlier, 0.0) * direction
    return solution


def sampled_rows(outputs: int, columns: int, numbers: int, random: torch.Generator) -> Tensor:
    """int64, ascending: as many of the rows, drawn by chance, as have WEIGHTS_PER_NUMBER weights per number; or all."""
    most = -(-WEIGHTS_PER_NUMBER * numbers // columns)
    if most >= outputs:
        return torch.arange(outputs)
    return torch.randperm(outputs, generator=random)[:most].sort().values


class _NormalEquations:
    """Aᵀ S A with A: codebooks → rows; S multiplies by each row's importance and by H."""

    def __init__(self, codes_MOJ: Tensor, importance_O1: Tensor, hessian_KK: Tensor, shape: torch.Size) -> None:
        self.places_MN = codes_MOJ.flatten(1).to(torch.int64)
        self.importance_O1, self.hessian_KK, self.shape = importance_O1, hessian_KK, shape
        self.inverse_MPDD = self._inverse_blocks(codes_MOJ)

    def gathered(self, pulled_OK: Tensor) -> Tensor:
        """[M, P, D]: rows times H, given so, times their importance, summed over the places of every entry."""
        pulls_ND = (pulled_OK * self.importance_O1).reshape(-1, self.shape[2])
        sums_MPD = pulled_OK.new_zeros(self.shape)
        for sums_PD, places_N in zip(sums_MPD, self.places_MN, strict=True):
            sums_PD.index_add_(0, places_N, pulls_ND)
        return sums_MPD

    def preconditioned(self, residual_MPD: Tensor) -> Tensor:
        return (residual_MPD.unsqueeze(2) @ self.inverse_MPDD).squeeze(2)

    def _inverse_blocks(self, codes_MOJ: Tensor) -> Tensor:
        """[M, P, D, D]: the inverse of what of the equations lies between the weights of one vector and themselves."""
        count, entries, length = self.shape
        outputs, vectors = codes_MOJ.shape[1:]
        tiles = self.hessian_KK.reshape(vectors, length, vectors, length)
        blocks_JDD = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).flatten(1)
        uses_MPJ = self.importance_O1.new_zeros(count, entries * vectors)
        place_J = torch.arange(vectors, device=codes_MOJ.device)
        for uses, codes_OJ in zip(uses_MPJ, codes_MOJ, strict=True):
            places = codes_OJ.to(torch.int64) * vectors + place_J
            uses.index_add_(0, places.flatten(), self.importance_O1.expand(outputs, vectors).flatten())
        blocks_MPDD = (uses_MPJ.reshape(count * entries, vectors) @ blocks_JDD).reshape(*self.shape, length)
        own_MP = blocks_MPDD.diagonal(dim1=2, dim2=3).mean(-1)
        damping_MP = _DAMPING_OWN * own_MP + _DAMPING_ALL * own_MP.mean()
        identity_DD = torch.eye(length, device=codes_MOJ.device)
        return torch.linalg.inv(blocks_MPDD + damping_MP[..., None, None] * identity_DD)
