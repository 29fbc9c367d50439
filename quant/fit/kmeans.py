# SPDX-License-Identifier: Apache-2.0
"""Tables and codebooks by weighted k-means: the entries of least Σ importance * (value - nearest entry)².

G groups with an entry list of their own, N values or vectors per group, D vector length, P entries, K columns of
the matrix view, S vectors of a sample.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .base import LARGEST_SCALE
from .hessian import Hessian, checked_diagonal
from .mse import column_importance
from .native import search_library

LARGEST_VALUE = LARGEST_SCALE
"""The end of fp16, in which every table is stored."""
VALUE_ROUNDS = 50
# A round of a sample costs a small share of one of a big layer, and starts the few rounds of all vectors well.
VECTOR_ROUNDS = 15
LAST_ROUNDS = 3
SAMPLES_PER_ENTRY = 256
SEEDS_PER_ENTRY = 16
# Distances per pass: they stay in a core's cache until the least has been found.
CHUNK_DISTANCES = 2**20
# Up to this many borders, comparing with each in turn is faster than a binary search.
MOST_COMPARED = 31
# Candidate cuts of the first runs, and how many times as long as the average one a run may be, counted in cuts.
LEAST_CUTS = 128
CUTS_PER_ENTRY = 4
LONGEST_RUN = 4
# Segments by equal mass, and as many by equal width, in which the density of values is estimated.
DENSITY_SEGMENTS = 256


def kmeans_importance(hessian: Hessian, columns: int) -> Tensor:
    """[K], mean 1: how much each column's squared error counts; TurbopocketError for a Hessian of another size."""
    importance_K = column_importance(checked_diagonal(hessian, columns))
    return importance_K / importance_K.mean()


def value_kmeans(values_GN: Tensor, importance_K: Tensor | None, entries: int, rounds: int = VALUE_ROUNDS) -> Tensor:
    """float32 [G, P], ascending: k-means on a line, where clusters are runs of the sorted values.

    The importance repeats along N, which is whole rows of K columns. The first runs are the best there are between
    a few cuts per entry, so that the rounds only move their borders.
    """
    line = _Line(values_GN, importance_K)
    table_GP = line.best_start(entries)
    for _ in range(rounds):
        moved_GP = line.centred(table_GP)
        if torch.equal(moved_GP, table_GP):
            break
        table_GP = moved_GP
    return table_GP


def nearest_values(values_GN: Tensor, table_GP: Tensor) -> Tensor:
    """uint8 [G, N]: index of the nearest entry of an ascending table."""
    middles_GP = _middles(table_GP)
    if middles_GP.shape[1] > MOST_COMPARED:
        return torch.searchsorted(middles_GP, values_GN.contiguous(), out_int32=True).to(torch.uint8)
    codes_GN = torch.zeros(values_GN.shape, dtype=torch.uint8)
    for middle_G1 in middles_GP.split(1, dim=1):
        codes_GN += values_GN > middle_G1
    return codes_GN


def _middles(table_GP: Tensor) -> Tensor:
    return ((table_GP[:, 1:] + table_GP[:, :-1]) / 2).contiguous()


class _Line:
    """Sorted values with running sums, so that mass and mean of any run of them take two look-ups."""

    def __init__(self, values_GN: Tensor, importance_K: Tensor | None) -> None:
        groups, count = values_GN.shape
        if importance_K is None:
            values, mass = np.sort(values_GN.numpy(), axis=1), np.ones((groups, count), np.float32)
        else:
            values, mass = _sorted_together(values_GN.numpy(), importance_K.numpy())
        self.values_GN = torch.from_numpy(values)
        self.mass_GN1 = _running_sum(mass)
        self.moment_GN1 = _running_sum(mass * values.astype(np.float64))

    def best_start(self, entries: int) -> Tensor:
        """[G, P]: the means of the best P runs that begin and end at candidate cuts."""
        candidates = max(LEAST_CUTS, CUTS_PER_ENTRY * entries)
        cuts_GC = self._with_ends(torch.searchsorted(self.values_GN, self._spread(candidates))).numpy()
        groups = zip(self.mass_GN1.numpy(), self.moment_GN1.numpy(), cuts_GC, strict=True)
        bounds_GP1 = torch.from_numpy(np.stack([_best_cuts(*group, entries) for group in groups]))
        # An empty run stands where the next one begins, until the first round places it.
        next_GP = self.values_GN.gather(1, bounds_GP1[:, :-1].clamp(max=self.values_GN.shape[1] - 1))
        mass_GP, mean_GP = self._means(bounds_GP1)
        return torch.where(mass_GP > 0, mean_GP, next_GP).sort(dim=1).values

    def _means(self, bounds_GP1: Tensor) -> tuple[Tensor, Tensor]:
        """Mass (float64) and mean of the runs between the bounds: [G, P] both, the mean of an empty run is NaN."""
        mass_GP = self.mass_GN1.gather(1, bounds_GP1).diff(dim=1)
        return mass_GP, (self.moment_GN1.gather(1, bounds_GP1).diff(dim=1) / mass_GP).to(torch.float32)

    def _with_ends(self, cuts_GC: Tensor) -> Tensor:
        """The cuts between 0 and N."""
        ends_G1 = torch.full((len(cuts_GC), 1), self.values_GN.shape[1])
        return torch.cat([torch.zeros_like(ends_G1), cuts_GC, ends_G1], dim=1)

    def _spread(self, count: int) -> Tensor:
        """[G, count] at equal steps of ∫ density^(1/3): where the best count are if very many (Panter, Dite, 1951)."""
        low_G1, high_G1 = self.values_GN[:, :1], self.values_GN[:, -1:]
        share = torch.linspace(0, 1, DENSITY_SEGMENTS + 1)
        by_mass = torch.searchsorted(self.mass_GN1, share.to(torch.float64) * self.mass_GN1[:, -1:])
        by_mass = self.values_GN.gather(1, by_mass.clamp_(max=self.values_GN.shape[1] - 1))
        edges_GE = torch.cat([by_mass, low_G1 + share * (high_G1 - low_G1)], dim=1).sort(dim=1).values
        mass_GE = self.mass_GN1.gather(1, torch.searchsorted(self.values_GN, edges_GE)).diff(dim=1)
        # The integral over a segment of constant density mass / width.
        parts_GE = mass_GE.clamp(min=0).pow(1 / 3) * edges_GE.diff(dim=1).pow(2 / 3)
        points_GE = _running_sum(parts_GE.numpy())
        wanted_GC = (torch.arange(count, dtype=torch.float64) + 0.5) / count * points_GE[:, -1:]
        right_GC = torch.searchsorted(points_GE, wanted_GC).clamp_(1, points_GE.shape[1] - 1)
        left_points_GC, right_points_GC = points_GE.gather(1, right_GC - 1), points_GE.gather(1, right_GC)
        width_GC = right_points_GC - left_points_GC
        part_GC = torch.where(width_GC > 0, (wanted_GC - left_points_GC) / width_GC, 0.0).to(torch.float32)
        return torch.lerp(edges_GE.gather(1, right_GC - 1), edges_GE.gather(1, right_GC), part_GC)

    def centred(self, table_GP: Tensor) -> Tensor:
        """The mean of each entry's run; entries without a run take the far ends of the widest and heaviest ones."""
        bounds_GP1 = self._with_ends(torch.searchsorted(self.values_GN, _middles(table_GP)))
        dead_GP = bounds_GP1.diff(dim=1) == 0
        mass_GP, mean_GP = self._means(bounds_GP1)
        mean_GP = torch.where(dead_GP, table_GP, mean_GP)
        if not dead_GP.any():
            return mean_GP
        last = self.values_GN.shape[1] - 1
        first_GP = self.values_GN.gather(1, bounds_GP1[:, :-1].clamp(max=last))
        last_GP = self.values_GN.gather(1, (bounds_GP1[:, 1:] - 1).clamp(min=0))
        spread_GP = torch.where(dead_GP, -1.0, mass_GP * (last_GP - first_GP).square())
        far_GP = torch.where(mean_GP - first_GP > last_GP - mean_GP, first_GP, last_GP)
        widest_GP = spread_GP.argsort(dim=1, descending=True, stable=True)
        place_GP = (dead_GP.cumsum(1) - 1).clamp_(min=0)
        return torch.where(dead_GP, far_GP.gather(1, widest_GP.gather(1, place_GP)), mean_GP).sort(dim=1).values


def _best_cuts(
    mass_N1: npt.NDArray[np.float64], moment_N1: npt.NDArray[np.float64], cuts: npt.NDArray[np.int64], entries: int
) -> npt.NDArray[np.int64]:
    """[P + 1] of the ascending cuts, which include 0 and N: the bounds of the P runs of least squared error.

    By dynamic programming over the last run of the first p; the error is Σ d w² less Σ moment² / mass of the runs.
    A run may be LONGEST_RUN times as long as the average one, counted in cuts.
    """
    cuts_C = np.unique(cuts)
    count = len(cuts_C)
    longest = min(count, -(-LONGEST_RUN * count // entries))
    mass_C, moment_C = mass_N1[cuts_C], moment_N1[cuts_C]
    backs = np.arange(longest, -1, -1)
    first_CL = np.arange(count)[:, None] - backs
    known_CL = np.maximum(first_CL, 0)
    run_mass_CL, run_moment_CL = mass_C[:, None] - mass_C[known_CL], moment_C[:, None] - moment_C[known_CL]
    gain_CL = np.square(run_moment_CL) / np.where(run_mass_CL > 0, run_mass_CL, np.inf)
    gain_CL[first_CL < 0] = -np.inf
    padded = np.full(longest + count, -np.inf)
    padded[longest] = 0.0
    before_CL = np.lib.stride_tricks.sliding_window_view(padded, longest + 1)
    choices_PC = np.empty((entries, count), np.int64)
    for entry in range(entries):
        total_CL = before_CL + gain_CL
        choices_PC[entry] = total_CL.argmax(axis=1)
        padded[longest:] = np.take_along_axis(total_CL, choices_PC[entry][:, None], axis=1)[:, 0]
    chosen = [count - 1]
    for choice_C in choices_PC[::-1]:
        chosen.append(chosen[-1] - backs[choice_C[chosen[-1]]])
    return cuts_C[chosen[::-1]]


def _running_sum(values_GN: npt.NDArray[Any]) -> Tensor:
    """float64 [G, N + 1], from 0 to the sum of all."""
    sums_GN1 = np.zeros((values_GN.shape[0], values_GN.shape[1] + 1))
    np.cumsum(values_GN, axis=1, dtype=np.float64, out=sums_GN1[:, 1:])
    return torch.from_numpy(sums_GN1)


def _sorted_together(
    values_GN: npt.NDArray[np.float32], importance_K: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Values sorted within their groups, and each one's importance: both [G, N].

    One sort of 64-bit integers, the value above and the importance's bits below it: half the time of an argsort.
    """
    bits_GN = values_GN.view(np.int32)
    # Floats are ordered like their bits where they are positive, and the other way round where they are negative.
    rising_GN = (bits_GN ^ ((bits_GN >> 31) & 0x7FFFFFFF)).astype(np.int64)
    keys_GN = (rising_GN << 32).reshape(-1, len(importance_K)) | importance_K.view(np.uint32).astype(np.int64)
    keys_GN = np.sort(keys_GN.reshape(values_GN.shape), axis=1)
    rising = (keys_GN >> 32).astype(np.int32)
    values = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(np.float32)
    return values, (keys_GN & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def vector_kmeans(points_GND: Tensor, importance_GND: Tensor, entries: int, rounds: int = VECTOR_ROUNDS) -> Tensor:
    """float32 [G, P, D]: k-means++ (Arthur and Vassilvitskii, 2007), rounds on a sample, then a few on all.

    Every coordinate has an importance of its own. The random choices are the same in every call.
    """
    random = torch.Generator().manual_seed(0)
    order_N = torch.randperm(points_GND.shape[1], generator=random)
    few = order_N[: SEEDS_PER_ENTRY * entries]
    codebook_GPD = _seeds(points_GND[:, few], importance_GND[:, few], entries, random)
    some = order_N[: SAMPLES_PER_ENTRY * entries]
    for points_ND, importance_ND, codebook_PD in zip(points_GND, importance_GND, codebook_GPD, strict=True):
        sample = _Cloud(points_ND[some], importance_ND[some])
        for _ in range(rounds):
            sample.centre(codebook_PD)
        if len(some) < len(order_N):
            cloud = _Cloud(points_ND, importance_ND)
            for _ in range(LAST_ROUNDS):
                cloud.centre(codebook_PD)
    return codebook_GPD


def nearest_vectors(points_GND: Tensor, importance_GND: Tensor, codebook_GPD: Tensor) -> Tensor:
    """uint8 [G, N]: index of the entry of least Σ importance * (point - entry)², the first of equals."""
    groups = zip(points_GND, importance_GND, codebook_GPD, strict=True)
    return torch.stack([_Cloud(points, importance).nearest(codebook) for points, importance, codebook in groups])


class _Cloud:
    """Vectors that share a codebook; d importance, x point, c entry."""

    def __init__(self, points_ND: Tensor, importance_ND: Tensor) -> None:
        self.points_ND, self.importance_ND = points_ND, importance_ND
        self.pulls_N2D = torch.cat([importance_ND, importance_ND * points_ND], dim=1)

    def nearest(self, codebook_PD: Tensor) -> Tensor:
        """uint8 [N]. Σ d (x - c)² = Σ (d, d x) · (c², -2 c) + Σ d x², where the last is the same for every c."""
        features_2DP = torch.cat([codebook_PD.square(), -2 * codebook_PD], dim=1).T
        if (library := search_library()) is not None:
            return library.nearest(self.pulls_N2D, features_2DP)
        codes_N = torch.empty(len(self.pulls_N2D), dtype=torch.uint8)
        size = max(1, CHUNK_DISTANCES // len(codebook_PD))
        for start in range(0, len(codes_N), size):
            distances_NP = self.pulls_N2D[start : start + size] @ features_2DP
            # NumPy's argmin is three times as fast as PyTorch's.
            codes_N[start : start + size] = torch.from_numpy(distances_NP.numpy().argmin(axis=1))
        return codes_N

    def centre(self, codebook_PD: Tensor) -> None:
        """One round of k-means, in place; entries that attract nothing go to the vectors of greatest error."""
        codes_N = self.nearest(codebook_PD).to(torch.int64)
        pulls_P2D = torch.zeros(len(codebook_PD), self.pulls_N2D.shape[1]).index_add_(0, codes_N, self.pulls_N2D)
        mass_PD, moment_PD = pulls_P2D.chunk(2, dim=1)
        codebook_PD.copy_(torch.where(mass_PD > 0, moment_PD / mass_PD, codebook_PD))
        dead = (mass_PD.sum(1) <= 0).nonzero().squeeze(1)
        if len(dead):
            error_N = (self.importance_ND * (self.points_ND - codebook_PD[codes_N]).square()).sum(1)
            worst = error_N.topk(min(len(dead), len(error_N))).indices
            codebook_PD[dead[: len(worst)]] = self.points_ND[worst]


def _seeds(points_GSD: Tensor, importance_GSD: Tensor, entries: int, random: torch.Generator) -> Tensor:
    """[G, P, D]: points drawn one by one, each with a chance as large as its distance to those drawn before."""
    groups, count, length = points_GSD.shape
    # All groups share the draws, so that a group's entries do not depend on how many others there are.
    draws_P = torch.rand(entries, generator=random, dtype=torch.float64)
    seeds_GPD = torch.empty(groups, entries, length)
    cost_GS = importance_GSD.sum(-1)
    for entry, draw in enumerate(draws_P):
        running_GS = cost_GS.cumsum(1, dtype=torch.float64)
        chosen_G1 = torch.searchsorted(running_GS, draw * running_GS[:, -1:], right=True).clamp_(max=count - 1)
        seed_G1D = points_GSD.gather(1, chosen_G1.unsqueeze(-1).expand(-1, -1, length))
        seeds_GPD[:, entry] = seed_G1D.squeeze(1)
        away_GS = (importance_GSD * (points_GSD - seed_G1D).square()).sum(-1)
        cost_GS = away_GS if entry == 0 else torch.minimum(cost_GS, away_GS)
    return seeds_GPD
