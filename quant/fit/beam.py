# SPDX-License-Identifier: Apache-2.0
"""Rows of values as sums of codebook vectors, by a tree search under a quadratic loss.

With H = L Lᵀ and L lower triangular, the loss e H eᵀ of an error e is ||e L||², and vector j of e L hears of e's
vectors from j on only. So a choice from the last vector down to j has a known loss, which later choices only add to:
the best B of each row are kept and extended. This is the K-best search of lattice decoding (Schnorr and Euchner, 1994);
with B = 1 it is GPTQ's error feedback, a vector at a time.

O outputs, K columns, M codebooks, P entries of one, D length of a vector, J vectors per row, R rows of a chunk,
B hypotheses per row, N = R * B.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .native import search_library

# Losses of candidates that are looked at together: enough to keep the overhead of each operation small.
CHUNK_CANDIDATES = 2**20
# Errors wait for this many vectors until those before them hear of them in one matrix product.
BLOCK_VECTORS = 8
# Candidates that share a first look at their least.
_FOLD = 16


def best_codes(target_OK: Tensor, codebooks_MPD: Tensor, lower_KK: Tensor, beam: int) -> Tensor:
    """uint8 [M, O, J]: for each row the codes of least ||(target - Σ vectors) L||² among those that the search saw.

    All float32 and on one device; `beam` is B. Rows do not depend on each other. In C++ where that was built and the
    device is the CPU.
    """
    library = search_library()
    if library is None or target_OK.device.type != "cpu":
        return torch_best_codes(target_OK, codebooks_MPD, lower_KK, beam)
    return library.best_codes(target_OK, codebooks_MPD, lower_KK, beam)


def torch_best_codes(target_OK: Tensor, codebooks_MPD: Tensor, lower_KK: Tensor, beam: int) -> Tensor:
    """`best_codes` in PyTorch: what the C++ is held against."""
    tree = _Tree(codebooks_MPD, lower_KK, beam)
    rows = max(1, CHUNK_CANDIDATES // (beam * codebooks_MPD.shape[1]))
    return torch.cat([tree.codes(chunk) for chunk in target_OK.split(rows)], dim=1)


@dataclass
class _Paths:
    """B hypotheses of each of R rows, a line each: loss so far [R, B], codes of the vectors passed, and feedback.

    `feedback_NK` is what the errors so far add to the vectors still to come, in terms of e L.
    """

    loss_RB: Tensor
    codes_NJM: Tensor
    feedback_NK: Tensor

    @classmethod
    def start(cls, target_RK: Tensor, vectors: int, count: int) -> Self:
        loss_R1 = target_RK.new_zeros(len(target_RK), 1)
        codes_NJM = torch.zeros(len(target_RK), vectors, count, dtype=torch.uint8, device=target_RK.device)
        return cls(loss_R1, codes_NJM, torch.zeros_like(target_RK))


@dataclass
class _Picked:
    """The hypotheses after one vector: each one's parent (its line), loss, entries [N] by codebook and their sum."""

    parent_N: Tensor
    loss_RB: Tensor
    entries: list[Tensor]
    sum_ND: Tensor


class _Tree:
    """What all rows share: the codebooks as every vector's part of L sees them."""

    def __init__(self, codebooks_MPD: Tensor, lower_KK: Tensor, beam: int) -> None:
        self.codebooks_MPD, self.lower_KK, self.beam = codebooks_MPD, lower_KK, beam
        self.count, self.entries, self.length = codebooks_MPD.shape
        blocks_DDJ = lower_KK.reshape(-1, self.length, len(lower_KK) // self.length, self.length)
        self.blocks_JDD = blocks_DDJ.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.seen_JMPD = torch.einsum("mpd,jde->jmpe", codebooks_MPD, self.blocks_JDD)
        energy_JM1P = self.seen_JMPD.square().sum(-1).unsqueeze(2)
        # ||t - c||² + loss = (t, ||t||² + loss, 1) · (-2 c, 1, ||c||²)
        parts = [-2 * self.seen_JMPD.transpose(2, 3), torch.ones_like(energy_JM1P), energy_JM1P]
        self.features_JMFP = torch.cat(parts, dim=2).contiguous()

    def codes(self, target_RK: Tensor) -> Tensor:
        """uint8 [M, R, J]."""
        vectors = len(self.blocks_JDD)
        paths = _Paths.start(target_RK, vectors, self.count)
        for stop in range(vectors, 0, -BLOCK_VECTORS):
            paths = self._block(target_RK, paths, max(0, stop - BLOCK_VECTORS), stop)
        kept = paths.loss_RB.shape[1]
        best_R = paths.loss_RB.argmin(1) + kept * torch.arange(len(target_RK), device=target_RK.device)
        return paths.codes_NJM.index_select(0, best_R).permute(2, 0, 1)

    def _block(self, target_RK: Tensor, paths: _Paths, start: int, stop: int) -> _Paths:
        """Chooses vectors [start, stop), the last first; all vectors before them then hear of it at once."""
        length, first = self.length, start * self.length
        columns = slice(first, stop * length)
        ancestor_N = torch.arange(len(paths.feedback_NK), device=target_RK.device)
        local = _Paths(paths.loss_RB, paths.codes_NJM[:, start:stop], paths.feedback_NK[:, columns])
        errors_NC = torch.zeros_like(local.feedback_NK)
        for vector in range(stop - 1, start - 1, -1):
            here = slice((vector - start) * length, (vector - start + 1) * length)
            value_R1D = target_RK[:, vector * length : (vector + 1) * length].unsqueeze(1)
            wanted_RBD = local.feedback_NK[:, here].reshape(len(target_RK), -1, length)
            picked = self._extend(wanted_RBD + value_R1D @ self.blocks_JDD[vector], local.loss_RB, vector)
            error_RBD = value_R1D - picked.sum_ND.reshape(len(target_RK), -1, length)
            errors_NC = errors_NC.index_select(0, picked.parent_N)
            errors_NC[:, here] = error_RBD.reshape(-1, length)
            ancestor_N = ancestor_N.index_select(0, picked.parent_N)
            codes_NJM = local.codes_NJM.index_select(0, picked.parent_N)
            codes_NJM[:, vector - start] = torch.stack(picked.entries, dim=-1).to(torch.uint8)
            feedback_NK = local.feedback_NK[:, : here.start].index_select(0, picked.parent_N)
            row_DK = self.lower_KK[vector * length : (vector + 1) * length, first : first + here.start]
            local = _Paths(picked.loss_RB, codes_NJM, feedback_NK.addmm_(errors_NC[:, here], row_DK))
        codes_NJM = paths.codes_NJM.index_select(0, ancestor_N)
        codes_NJM[:, start:stop] = local.codes_NJM
        feedback_NK = paths.feedback_NK[:, :first].index_select(0, ancestor_N)
        return _Paths(local.loss_RB, codes_NJM, feedback_NK.addmm_(errors_NC, self.lower_KK[columns, :first]))

    def _extend(self, wanted_RBD: Tensor, loss_RB: Tensor, vector: int) -> _Picked:
        """Adds an entry of each codebook in turn, keeping the best B sums of each row after every one."""
        rows, kept, length = wanted_RBD.shape
        row_R1 = torch.arange(rows, device=wanted_RBD.device).unsqueeze(1)
        wanted_ND, before_N = wanted_RBD.reshape(-1, length), loss_RB.flatten()
        parent_N = torch.arange(rows * kept, device=wanted_RBD.device)
        sum_ND = torch.zeros_like(wanted_ND)
        entries: list[Tensor] = []
        for book in range(self.count):
            loss_N = before_N + wanted_ND.square().sum(1)
            features_NF = torch.cat([wanted_ND, loss_N.unsqueeze(1), torch.ones_like(loss_N).unsqueeze(1)], dim=1)
            candidates = (features_NF @ self.features_JMFP[vector, book]).reshape(rows, -1)
            loss_RB, chosen_RB = _least(candidates, min(self.beam, candidates.shape[1]))
            hypothesis_RB = torch.div(chosen_RB, self.entries, rounding_mode="floor")
            entry_N = (chosen_RB - hypothesis_RB * self.entries).flatten()
            line_N = (hypothesis_RB + kept * row_R1).flatten()
            kept = loss_RB.shape[1]
            wanted_ND = wanted_ND.index_select(0, line_N) - self.seen_JMPD[vector, book].index_select(0, entry_N)
            sum_ND = sum_ND.index_select(0, line_N) + self.codebooks_MPD[book].index_select(0, entry_N)
            before_N, parent_N = before_N.index_select(0, line_N), parent_N.index_select(0, line_N)
            entries = [*(earlier.index_select(0, line_N) for earlier in entries), entry_N]
        return _Picked(parent_N, loss_RB, entries, sum_ND)


def _least(values_RC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` least of each row and their places, [R, count] each, in no order.

    The least of all lie in the columns of least minimum when a row is folded: one fast look at everything, then a
    sort of few.
    """
    rows, candidates = values_RC.shape
    columns = candidates // _FOLD
    if candidates % _FOLD or columns < 2 * count:
        found = values_RC.topk(count, dim=1, largest=False, sorted=False)
        return found.values, found.indices
    column_RB = values_RC.reshape(rows, _FOLD, columns).amin(1).topk(count, dim=1, largest=False, sorted=False).indices
    step_F1 = columns * torch.arange(_FOLD, device=values_RC.device).unsqueeze(1)
    place_RC = (column_RB.unsqueeze(1) + step_F1).flatten(1)
    row_R1 = candidates * torch.arange(rows, device=values_RC.device).unsqueeze(1)
    few_RC = values_RC.flatten().index_select(0, (place_RC + row_R1).flatten()).reshape(rows, -1)
    found = few_RC.topk(count, dim=1, largest=False, sorted=False)
    return found.values, place_RC.gather(1, found.indices)
