# SPDX-License-Identifier: Apache-2.0
"""Sums of codebook vectors of low tr[(Ŵ - W) H (Ŵ - W)ᵀ]: codes by beam search and codebooks by least squares, in turn.

Egiazarian et al., VQDM (2024), sections 3.1 and 3.2: row scales, a start by residual k-means, alternating updates.
Theirs moves one code at a time; here the beam runs over whole rows first and over windows of each row then, and the
codebooks are solved for, not descended to. O outputs, K columns, M codebooks, P entries of one, D length of a vector,
J vectors per row, C columns of a window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ground.errors import TurbopocketError
from .base import LARGEST_SCALE
from .beam import best_codes
from .codebook_solve import sampled_rows, solved_codebooks
from .grids import AdditiveCodes, AdditiveGrid, summed_vectors
from .hessian import Hessian, factor_in_place, own_hessian
from .residual import residual_kmeans

# Added to the Hessian's diagonal as a share of its mean. A fit this close believes every direction that calibration did
# not drive to be free: by the inputs of other pictures it would be worse than k-means on some layers of `pocket`.
DAMPING = 0.1


@dataclass(frozen=True)
class Search:
    """How hard to look: hypotheses per row, vectors of a window, most rounds.

    A round that takes less than the share `least_gain` off the loss is the last.
    """

    beam: int = 8
    window: int = 16
    rounds: int = 4
    least_gain: float = 0.01

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise TurbopocketError(f"a beam keeps at least 1 hypothesis, not {self.beam}")


QUICK = Search(beam=2, rounds=1)


def vqdm_codes(
    weight_OK: Tensor, grid: AdditiveGrid, hessian: Hessian | None = None, search: Search = Search()
) -> AdditiveCodes:
    """Codes, codebooks and scales; the loss that counts is the one with fp16 codebooks and scales, as stored.

    Runs on the GPU if there is one. TurbopocketError without a Hessian, with one of another size, or with one that
    is not positive semidefinite.
    """
    if hessian is None:
        raise TurbopocketError("vqdm needs the layer's Hessian", hint="calibrate first, or choose the fit `mse`")
    start = residual_kmeans(weight_OK, grid, hessian)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refined = Refinement(weight_OK.to(device), hessian, start, search, fixed_codebooks=grid.universal)
    refined.run()
    return refined.codes()


def quick_vqdm_codes(weight_OK: Tensor, grid: AdditiveGrid, hessian: Hessian | None = None) -> AdditiveCodes:
    """`vqdm_codes` cut short: one round with a narrow beam, for comparing formats. Same errors."""
    return vqdm_codes(weight_OK, grid, hessian, QUICK)


class Refinement:
    """A fitted matrix that gets better: each `improve_…` lowers `loss` or leaves everything as it is.

    `rows_OK` are the sums of vectors before their scale, `loss_O` the rows' losses. `pulled_OK` = (target - rows) H is
    kept up to date, where the target is the weight over its row's scale, or over 1 where that is 0. `hessian_KK` is the
    damped H, whose memory holds its factor instead while whole rows are searched: there is one matrix of K².
    """

    rows_OK: Tensor
    pulled_OK: Tensor
    loss_O: Tensor

    def __init__(
        self,
        weight_OK: Tensor,
        hessian: Hessian,
        start: AdditiveCodes,
        search: Search,
        fixed_codebooks: bool = False,
    ) -> None:
        device = weight_OK.device
        self.fixed_codebooks = fixed_codebooks
        self.given, self.weight_OK, self.search = hessian, weight_OK, search
        self.hessian_KK = damped_in_place(own_hessian(hessian, weight_OK.shape[1], device=device))
        self.weight_pulled_OK = weight_OK @ self.hessian_KK
        self.codes_MOJ = start.codes_MOJ.to(device)
        self.codebooks_MPD = start.codebooks_MPD.to(device, torch.float32)
        self.scale_O1 = start.scale_O.to(device, torch.float32).unsqueeze(1)
        self.random = torch.Generator().manual_seed(0)
        self._measure()

    @property
    def loss(self) -> float:
        """tr[(Ŵ - W) H (Ŵ - W)ᵀ] with the damped H, of what `codes` would give."""
        return float(self.loss_O.sum(dtype=torch.float64))

    def codes(self) -> AdditiveCodes:
        """The matrix as it is now, on the CPU."""
        scale_O = self.scale_O1.squeeze(1).to("cpu", torch.float16)
        return AdditiveCodes(self.codes_MOJ.cpu(), self.codebooks_MPD.to("cpu", torch.float16), scale_O)

    def run(self) -> None:
        """A search over whole rows, then rounds over windows, until a round gains little."""
        vectors = self.codes_MOJ.shape[2]
        for window in [vectors, *[min(self.search.window, vectors)] * (self.search.rounds - 1)]:
            before = self.loss
            self.improve_codes(window)
            if not self.fixed_codebooks:
                self.improve_codebooks()
            self.improve_scales()
            if self.loss >= (1 - self.search.least_gain) * before:
                break

    def improve_codes(self, window: int) -> None:
        """Searches anew for `window` vectors of all rows at a time, drawn by chance, until each had its turn.

        A row takes what is found where that is better; in the end its old codes where rounding errors said so wrongly.
        """
        before = self.codes_MOJ, self.rows_OK, self.pulled_OK, self.loss_O
        vectors = self.codes_MOJ.shape[2]
        if window == vectors:
            self._search_rows()
        else:
            self.codes_MOJ, self.pulled_OK = self.codes_MOJ.clone(), self.pulled_OK.clone()
            for members in torch.randperm(vectors, generator=self.random).to(self.codes_MOJ.device).split(window):
                self._search(members)
            self.rows_OK = summed_vectors(self.codebooks_MPD, self.codes_MOJ)
        worse_O = self._losses() > before[-1]
        now = self.codes_MOJ, self.rows_OK, self.pulled_OK
        self.codes_MOJ, self.rows_OK, self.pulled_OK = (
            torch.where(worse_O.unsqueeze(1), old, new) for old, new in zip(before, now, strict=False)
        )
        self.loss_O = self._losses()

    def improve_codebooks(self) -> None:
        """Solves for the codebooks, rounds them to fp16, and keeps them if the loss is lower."""
        importance_O1 = self.scale_O1.square()
        if not importance_O1.any():
            return
        outputs, columns = self.weight_OK.shape
        rows = sampled_rows(outputs, columns, self.codebooks_MPD.numel(), self.random).to(self.weight_OK.device)
        importance_O1 = importance_O1.index_select(0, rows) / importance_O1.mean()
        codes_MOJ, pulled_OK = self.codes_MOJ.index_select(1, rows), self.pulled_OK.index_select(0, rows)
        solved_MPD = solved_codebooks(self.codebooks_MPD, codes_MOJ, pulled_OK, importance_O1, self.hessian_KK)
        before, earlier = self.loss, (self.codebooks_MPD, self.rows_OK, self.pulled_OK, self.loss_O)
        self.codebooks_MPD = solved_MPD.to(torch.float16).to(torch.float32)
        self._measure()
        if not self.loss < before:
            self.codebooks_MPD, self.rows_OK, self.pulled_OK, self.loss_O = earlier

    def improve_scales(self) -> None:
        """The best scale of each row, w H qᵀ / q H qᵀ for its sum of vectors q, where it is better in fp16."""
        rows_pulled_OK = self.weight_pulled_OK / nonzero(self.scale_O1) - self.pulled_OK
        energy_O1 = (rows_pulled_OK * self.rows_OK).sum(1, keepdim=True)
        best_O1 = (self.weight_pulled_OK * self.rows_OK).sum(1, keepdim=True) / energy_O1
        best_O1 = torch.where(energy_O1 > 0, best_O1, self.scale_O1).clamp(-LARGEST_SCALE, LARGEST_SCALE)
        best_O1 = best_O1.to(torch.float16).to(torch.float32)
        earlier_O1, loss_O = self.scale_O1, self.loss_O
        pulled_OK = self.pulled_OK
        self._rescale(best_O1, pulled_OK, earlier_O1)
        better_O1 = (self.loss_O < loss_O).unsqueeze(1)
        self._rescale(torch.where(better_O1, best_O1, earlier_O1), pulled_OK, earlier_O1)

    def _rescale(self, scale_O1: Tensor, pulled_OK: Tensor, earlier_O1: Tensor) -> None:
        """Takes the scales; `pulled_OK` is of the earlier ones."""
        self.scale_O1 = scale_O1
        moved_O1 = 1 / nonzero(scale_O1) - 1 / nonzero(earlier_O1)
        self.pulled_OK = torch.addcmul(pulled_OK, self.weight_pulled_OK, moved_O1)
        self.loss_O = self._losses()

    def _measure(self) -> None:
        """What the codes, codebooks and scales come to."""
        self.rows_OK = summed_vectors(self.codebooks_MPD, self.codes_MOJ)
        self.pulled_OK = (self.weight_OK / nonzero(self.scale_O1) - self.rows_OK) @ self.hessian_KK
        self.loss_O = self._losses()

    def _losses(self) -> Tensor:
        error_OK = self.weight_OK - self.scale_O1 * self.rows_OK
        pulled_OK = torch.where(self.scale_O1 != 0, self.scale_O1 * self.pulled_OK, self.weight_pulled_OK)
        return (pulled_OK * error_OK).sum(1).clamp(min=0.0)

    def _search_rows(self) -> None:
        """Searches for codes of all vectors; all rows take them."""
        target_OK, factor_KK = self.weight_OK / nonzero(self.scale_O1), factor_in_place(self.hessian_KK, "vqdm")
        self.codes_MOJ = best_codes(target_OK, self.codebooks_MPD, factor_KK, self.search.beam)
        damped_in_place(own_hessian(self.given, len(factor_KK), out_KK=self.hessian_KK))
        self.rows_OK = summed_vectors(self.codebooks_MPD, self.codes_MOJ)
        self.pulled_OK = (target_OK - self.rows_OK) @ self.hessian_KK

    def _search(self, members: Tensor) -> None:
        """Searches for codes of the member vectors, the others as they are; rows for which it is better take them.

        With the others fixed the loss is (t - q) H_SS (t - q)ᵀ + constant for sums of vectors q, where
        t = q₀ + (e H)_S H_SS⁻¹.
        """
        length = self.codebooks_MPD.shape[2]
        columns = (members.unsqueeze(1) * length + torch.arange(length, device=members.device)).flatten()
        hessian_CC = self.hessian_KK.index_select(0, columns).index_select(1, columns)
        lower_CC = lower_factor(hessian_CC)
        pulled_OC = self.pulled_OK.index_select(1, columns)
        moved_OC = torch.cholesky_solve(pulled_OC.T.to(torch.float64), lower_CC).T.to(torch.float32)
        rows_OC = summed_vectors(self.codebooks_MPD, self.codes_MOJ.index_select(2, members))
        found_MOJ = best_codes(rows_OC + moved_OC, self.codebooks_MPD, lower_CC.to(torch.float32), self.search.beam)
        change_OC = summed_vectors(self.codebooks_MPD, found_MOJ) - rows_OC
        gain_O = ((2 * pulled_OC - change_OC @ hessian_CC) * change_OC).sum(1)
        better_O = gain_O > 0
        found_MOJ = torch.where(better_O.unsqueeze(1), found_MOJ, self.codes_MOJ.index_select(2, members))
        self.codes_MOJ.index_copy_(2, members, found_MOJ)
        change_OC *= better_O.unsqueeze(1)
        self.pulled_OK.addmm_(change_OC, self.hessian_KK.index_select(0, columns), alpha=-1)


def nonzero(scale_O1: Tensor) -> Tensor:
    """The scales, and 1 for those that are 0."""
    return torch.where(scale_O1 != 0, scale_O1, 1.0)


def damped_in_place(hessian_KK: Tensor) -> Tensor:
    """H + DAMPING * mean of its diagonal, in its memory; the identity for inputs that were never driven, as k-means
    has it."""
    mean = float(hessian_KK.diagonal().mean())
    if mean <= 0:
        hessian_KK.zero_()
    hessian_KK.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return hessian_KK


def lower_factor(hessian_CC: Tensor) -> Tensor:
    """Lower triangular L in float64 with L Lᵀ = H; TurbopocketError when H has a negative direction."""
    lower_CC, failed_at = torch.linalg.cholesky_ex(hessian_CC.to(torch.float64))
    if int(failed_at):
        raise TurbopocketError(f"vqdm: the Hessian is not positive semidefinite (pivot {int(failed_at)} of its factor)")
    return lower_CC
