# SPDX-License-Identifier: Apache-2.0
"""The beam search against brute force, the solver against dense algebra, and a loss that never rises."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import GPTQ, MSE, VQDM, AdditiveCodes, AdditiveGrid, measuring_fit
from turbopocket.quant.fit.beam import _least, best_codes, torch_best_codes
from turbopocket.quant.fit.codebook_solve import WEIGHTS_PER_NUMBER, sampled_rows, solved_codebooks
from turbopocket.quant.fit.grids import summed_vectors
from turbopocket.quant.fit.residual import residual_kmeans
from turbopocket.quant.fit.universal import universal_codebooks
from turbopocket.quant.fit.vqdm import Refinement, Search, damped_in_place, lower_factor

GRID = AdditiveGrid(2, 4, 4)


def loss_of(weight_OK: Tensor, fitted: AdditiveCodes, hessian_KK: Tensor) -> float:
    """tr[(Ŵ - W) H (Ŵ - W)ᵀ] in float64 from the stored parts, by nothing that the fit uses."""
    scale_O1 = fitted.scale_O.double().unsqueeze(1)
    books_MOJD = torch.stack([b[c.long()] for b, c in zip(fitted.codebooks_MPD, fitted.codes_MOJ, strict=True)])
    error_OK = scale_O1 * books_MOJD.double().sum(0).flatten(1) - weight_OK.double()
    return float(torch.einsum("ok,kl,ol->", error_OK, hessian_KK.double(), error_OK))


def row_losses(target_OK: Tensor, codebooks_MPD: Tensor, codes_MOJ: Tensor, hessian_KK: Tensor) -> Tensor:
    error_OK = target_OK - summed_vectors(codebooks_MPD, codes_MOJ)
    return ((error_OK @ hessian_KK) * error_OK).sum(1)


def hessian(columns: int, rank: int) -> Tensor:
    x_NK = torch.randn(400, rank) @ (torch.randn(rank, columns) * torch.logspace(0, -1.5, rank).unsqueeze(1))
    return x_NK.T @ x_NK / 400


@pytest.mark.parametrize("rank", [6, 48], ids=["singular", "full"])
@pytest.mark.parametrize("grid", [GRID, AdditiveGrid(3, 2, 8), AdditiveGrid(2, 8, 2)], ids=str)
def test_no_step_ever_raises_the_loss_of_what_is_stored(grid: AdditiveGrid, rank: int) -> None:
    weight_OK, hessian_KK = torch.randn(40, 48) ** 3 * torch.logspace(-3, 3, 40).unsqueeze(1), hessian(48, rank)
    weight_OK[7] = 0.0
    counted_KK = damped_in_place(hessian_KK.clone())
    fitted = Refinement(weight_OK, hessian_KK, residual_kmeans(weight_OK, grid, hessian_KK), Search(beam=3))
    losses = [loss_of(weight_OK, fitted.codes(), counted_KK)]
    # What single precision can tell from nothing, of the loss of a weight that is not stored at all.
    slack = 1e-7 * float(torch.einsum("ok,kl,ol->", weight_OK, counted_KK, weight_OK))
    steps = [lambda w=w: fitted.improve_codes(w) for w in (48 // grid.length, 2, 5, 1)]
    for step in steps:
        for improve in (step, fitted.improve_codebooks, fitted.improve_scales):
            improve()
            losses.append(loss_of(weight_OK, fitted.codes(), counted_KK))
            # What the fit believes is what the stored parts say.
            assert fitted.loss == pytest.approx(losses[-1], rel=1e-3, abs=slack)
    assert all(later <= earlier + slack for earlier, later in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_a_wide_beam_finds_the_best_codes_there_are() -> None:
    target_OK, codebooks_MPD, hessian_KK = torch.randn(9, 6), torch.randn(2, 2, 2), hessian(6, 6)
    lower_KK = lower_factor(hessian_KK).float()
    found_MOJ = best_codes(target_OK, codebooks_MPD, lower_KK, beam=2**6)
    choices = (
        torch.tensor(list(product(range(2), repeat=6)), dtype=torch.uint8).reshape(-1, 2, 1, 3).expand(-1, -1, 9, -1)
    )
    every = torch.stack([row_losses(target_OK, codebooks_MPD, each, hessian_KK) for each in choices])
    found_O = row_losses(target_OK, codebooks_MPD, found_MOJ, hessian_KK)
    torch.testing.assert_close(found_O, every.amin(0), rtol=1e-3, atol=1e-6)


def test_wider_beams_find_lower_losses() -> None:
    target_OK, codebooks_MPD, hessian_KK = torch.randn(200, 96), 0.7 * torch.randn(2, 16, 4), hessian(96, 96)
    lower_KK = lower_factor(damped_in_place(hessian_KK.clone())).float()
    found = [best_codes(target_OK, codebooks_MPD, lower_KK, beam) for beam in (1, 4, 16)]
    losses = [float(row_losses(target_OK, codebooks_MPD, each, hessian_KK).sum()) for each in found]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < 0.95 * losses[1]


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    target_OK, codebooks_MPD = torch.randn(50, 80), torch.randn(2, 16, 4)
    lower_KK = lower_factor(damped_in_place(hessian(80, 80))).float()
    for search in (torch_best_codes, best_codes):
        whole_MOJ = search(target_OK, codebooks_MPD, lower_KK, beam=4)
        monkeypatch.setattr("turbopocket.quant.fit.beam.CHUNK_CANDIDATES", 7 * 4 * 16)
        assert torch.equal(search(target_OK, codebooks_MPD, lower_KK, beam=4), whole_MOJ)
        assert torch.equal(search(target_OK[13:14], codebooks_MPD, lower_KK, beam=4), whole_MOJ[:, 13:14])


@pytest.mark.parametrize(("candidates", "count"), [(2048, 8), (512, 16), (24, 3), (250, 5), (5, 5)])
def test_the_least_are_those_of_a_full_sort(candidates: int, count: int) -> None:
    values = torch.randn(30, candidates)
    found, places = _least(values, count)
    assert torch.equal(found.sort(1).values, values.sort(1).values[:, :count])
    assert torch.equal(values.gather(1, places), found)


def test_solved_codebooks_are_the_least_squares_solution() -> None:
    target_OK, hessian_KK = torch.randn(60, 24), hessian(24, 24)
    codes_MOJ, importance_O1 = torch.randint(0, 4, (2, 60, 6), dtype=torch.uint8), torch.rand(60, 1)
    start_MPD = torch.randn(2, 4, 4)
    units = torch.eye(32).reshape(32, 2, 4, 4)
    design = torch.stack([summed_vectors(unit, codes_MOJ) for unit in units], dim=-1).double()
    root_KK = lower_factor(hessian_KK)
    weighted = importance_O1.sqrt().double().unsqueeze(-1) * torch.einsum("okn,kl->oln", design, root_KK)
    wanted = (importance_O1.sqrt() * target_OK).double() @ root_KK
    # Two codebooks may move a constant from one to the other, so only the loss is unique, not the solution.
    best = torch.linalg.lstsq(weighted.flatten(0, 1), wanted.flatten().unsqueeze(1), driver="gelsd").solution
    least = float((weighted.flatten(0, 1) @ best - wanted.flatten().unsqueeze(1)).square().sum())
    pulled_OK = (target_OK - summed_vectors(start_MPD, codes_MOJ)) @ hessian_KK
    solved_MPD = solved_codebooks(start_MPD, codes_MOJ, pulled_OK, importance_O1, hessian_KK)
    found = float((importance_O1.squeeze(1) * row_losses(target_OK, solved_MPD, codes_MOJ, hessian_KK)).sum())
    assert least * 0.9999 <= found <= least * 1.01


def test_codebooks_of_many_rows_are_solved_for_on_a_sample_of_them() -> None:
    random = torch.Generator().manual_seed(0)
    numbers = 64
    few = sampled_rows(1000, 128, numbers, random)
    assert len(few) * 128 == WEIGHTS_PER_NUMBER * numbers
    assert (few.diff() > 0).all()
    assert not torch.equal(few, sampled_rows(1000, 128, numbers, random)), "another sample each time"
    assert torch.equal(sampled_rows(100, 128, numbers, random), torch.arange(100))


@pytest.mark.parametrize("grid", [GRID, AdditiveGrid(3, 4, 4)], ids=str)
def test_vqdm_is_far_below_residual_kmeans_on_correlated_inputs(grid: AdditiveGrid, correlated_hessian: Tensor) -> None:
    weight_OK = torch.randn(96, 48)
    plain, fitted = (
        loss_of(weight_OK, fit.choose(weight_OK, grid, correlated_hessian), correlated_hessian) for fit in (MSE, VQDM)
    )
    # The authors report 5 to 6.5 dB on trained layers.
    assert fitted < 10 ** (-0.5) * plain


def test_a_fit_to_few_inputs_is_good_for_others_too() -> None:
    """The fit sees 12 inputs of 48 columns: three quarters of all directions look free, and others use them."""
    x_NK = torch.randn(412, 48) @ (torch.randn(48, 48) * torch.logspace(0, -1, 48).unsqueeze(1))
    seen_KK, unseen_KK = (some.T @ some / len(some) for some in x_NK.split([12, 400]))
    weight_OK = torch.randn(128, 48)
    plain, fitted = (loss_of(weight_OK, fit.choose(weight_OK, GRID, seen_KK), unseen_KK) for fit in (MSE, VQDM))
    assert fitted < plain


def test_same_input_gives_the_same_parts(correlated_hessian: Tensor) -> None:
    weight_OK = torch.randn(16, 48)
    first, second = (VQDM.choose(weight_OK.clone(), GRID, correlated_hessian) for _ in range(2))
    assert torch.equal(first.codes_MOJ, second.codes_MOJ)
    assert torch.equal(first.codebooks_MPD, second.codebooks_MPD)
    assert torch.equal(first.scale_O, second.scale_O)


def test_weight_and_hessian_are_left_alone(correlated_hessian: Tensor) -> None:
    weight_OK = torch.randn(16, 48)
    before = weight_OK.clone(), correlated_hessian.clone()
    VQDM.choose(weight_OK, GRID, correlated_hessian)
    assert torch.equal(weight_OK, before[0])
    assert torch.equal(correlated_hessian, before[1])


def test_a_hessian_of_zeros_counts_all_columns_alike() -> None:
    weight_OK = torch.randn(32, 48)
    plain, flat, even = (
        loss_of(weight_OK, fit.choose(weight_OK, GRID, h), torch.eye(48))
        for fit, h in ((MSE, None), (VQDM, torch.zeros(48, 48)), (VQDM, torch.eye(48)))
    )
    assert flat == even < plain


def test_vqdm_without_a_hessian_is_refused_with_a_hint() -> None:
    with pytest.raises(TurbopocketError, match="vqdm needs the layer's Hessian") as refusal:
        VQDM.choose(torch.randn(4, 8), GRID, None)
    assert "mse" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("hessian_KK", "message"),
    [
        (torch.eye(7), r"\[7, 7\] for a weight of 8 columns"),
        (torch.full((8, 8), torch.nan), "NaN or infinite"),
        (torch.eye(8) - 0.5 * torch.ones(8, 8), "vqdm: the Hessian is not positive semidefinite"),
    ],
    ids=["another size", "nan", "indefinite"],
)
def test_hessian_that_is_not_the_layers_is_refused(hessian_KK: Tensor, message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        VQDM.choose(torch.randn(4, 8), GRID, hessian_KK)


def test_a_beam_without_hypotheses_is_refused() -> None:
    with pytest.raises(TurbopocketError, match="a beam keeps at least 1 hypothesis, not 0"):
        Search(beam=0)


def test_what_a_plan_compares_is_nearer_to_the_fit_than_k_means_is() -> None:
    weight_OK, hessian_KK = torch.randn(64, 48), hessian(48, 12)
    grid = AdditiveGrid(2, 4, 4)
    quick, fitted, plain = (
        loss_of(weight_OK, fit.choose(weight_OK, grid, hessian_KK), hessian_KK)
        for fit in (measuring_fit(VQDM), VQDM, measuring_fit(GPTQ))
    )
    # Nearer, in dB, to the fit than to k-means, and never flattering.
    assert fitted < quick
    assert quick / fitted < plain / quick


@pytest.mark.parametrize(("count", "length", "most"), [(2, 8, 0.11), (3, 8, 0.0387), (2, 4, 0.0106)])
def test_universal_codebooks_are_as_good_for_normal_numbers_as_fitted_ones(
    count: int, length: int, most: float
) -> None:
    """The limits are what residual k-means of 16,384 normal vectors reached on others (of length 4: within 5 %)."""
    weight_OK = torch.randn(256, 64, generator=torch.Generator().manual_seed(7))
    fitted = residual_kmeans(weight_OK, AdditiveGrid(count, 8, length, universal=True))
    assert torch.equal(fitted.codebooks_MPD, universal_codebooks(length)[:count])
    assert 4 ** (-8 * count / length) < float((fitted.values() - weight_OK).square().mean()) < most


def test_lengths_without_universal_codebooks_are_refused() -> None:
    with pytest.raises(TurbopocketError, match=r"vectors of \(4, 8\), not of 2"):
        universal_codebooks(2)


def test_a_search_with_universal_codebooks_moves_codes_and_scales_alone() -> None:
    weight_OK, hessian_KK = torch.randn(32, 64) * torch.logspace(-1, 1, 32).unsqueeze(1), hessian(64, 64)
    grid = AdditiveGrid(2, 8, 8, universal=True)
    plain, searched = residual_kmeans(weight_OK, grid, hessian_KK), VQDM.choose(weight_OK, grid, hessian_KK)
    assert torch.equal(searched.codebooks_MPD, plain.codebooks_MPD)
    assert loss_of(weight_OK, searched, hessian_KK) < 0.8 * loss_of(weight_OK, plain, hessian_KK)
