# SPDX-License-Identifier: Apache-2.0
"""Each fit against the one before it, and the cases where scales and Hessians go wrong."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import ABSMAX, FITS, GPTQ, MSE, Fit, Grid, IntegerGrid, measuring_fit, parse_fit
from turbopocket.quant.fit.base import Solver, storable_scale
from turbopocket.quant.fit.gptq import DAMPING
from turbopocket.quant.formats import parse_format

GRIDS = [IntegerGrid(bits, symmetric, group) for bits in (4, 8) for symmetric in (True, False) for group in (8, 48)]


def hessian_loss(fit: Fit, weight_OK: Tensor, grid: IntegerGrid, hessian_KK: Tensor) -> float:
    error_OK = fit.choose(weight_OK, grid, hessian_KK).values() - weight_OK
    return float(((error_OK @ hessian_KK) * error_OK).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_beats_mse_beats_absmax_on_correlated_inputs(grid: IntegerGrid, correlated_hessian: Tensor) -> None:
    # A few large weights per row, as real layers have: that is what makes clipping worth while.
    weight_OK = torch.randn(64, 48) ** 3
    losses = [hessian_loss(fit, weight_OK, grid, correlated_hessian) for fit in (GPTQ, MSE, ABSMAX)]
    assert losses[0] < 0.7 * losses[1]
    assert losses[1] < losses[2]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mse_is_never_worse_than_absmax_in_squared_error(grid: IntegerGrid) -> None:
    weight_OK = torch.randn(300, 48) ** 3
    mse_O, absmax_O = (
        (fit.choose(weight_OK, grid, None).values() - weight_OK).square().sum(1) for fit in (MSE, ABSMAX)
    )
    assert (mse_O <= absmax_O * 1.0001).all()


@pytest.mark.parametrize("fit", FITS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_stay_on_the_grid(grid: IntegerGrid, fit: Fit, correlated_hessian: Tensor) -> None:
    fitted = fit.choose(torch.randn(16, 48) ** 3, grid, correlated_hessian)
    assert fitted.codes_OK.dtype == grid.code_dtype
    assert grid.lowest_code <= int(fitted.codes_OK.min())
    assert int(fitted.codes_OK.max()) <= grid.highest_code


@pytest.mark.parametrize("fit", FITS, ids=str)
def test_same_input_gives_the_same_codes(fit: Fit, correlated_hessian: Tensor) -> None:
    weight_OK = torch.randn(16, 48)
    first, second = (fit.choose(weight_OK.clone(), GRIDS[0], correlated_hessian) for _ in range(2))
    assert torch.equal(first.codes_OK, second.codes_OK)
    assert torch.equal(first.scale_OG, second.scale_OG)


@pytest.mark.parametrize("fit", FITS, ids=str)
def test_the_weight_itself_is_left_alone(fit: Fit, correlated_hessian: Tensor) -> None:
    weight_OK = torch.randn(16, 48)
    before = weight_OK.clone()
    fit.choose(weight_OK, GRIDS[1], correlated_hessian)
    assert torch.equal(weight_OK, before)


def test_scale_is_rounded_up_so_that_nothing_falls_off_the_grid() -> None:
    scale = torch.rand(1000) * torch.logspace(-12, 4, 1000)
    stored = storable_scale(scale)
    assert (stored >= scale).all()
    assert torch.equal(stored, stored.half().float())
    normal = scale > 2.0**-14
    assert (stored[normal] <= scale[normal] * (1 + 2.0**-10)).all()


def test_scale_under_the_smallest_fp16_number_becomes_that_number() -> None:
    assert storable_scale(torch.tensor([1e-12])).item() == 2.0**-24


def test_importance_of_a_column_draws_the_scale_to_it() -> None:
    weight_OK = torch.tensor([[0.31, 0.52, -0.43, 10.0]])
    importance = torch.diag(torch.tensor([1e6, 1e6, 1e6, 1.0]))
    grid = IntegerGrid(4, True, 4)
    plain, driven = (MSE.choose(weight_OK, grid, each).values() - weight_OK for each in (None, importance))
    assert driven[0, :3].abs().sum() < plain[0, :3].abs().sum()


def test_gptqs_codes_are_those_of_its_first_algorithm_in_float64(correlated_hessian: Tensor) -> None:
    """Errors sent on by U of (H + damping)⁻¹ = UᵀU, as the paper has it, under the scales that the fit chose."""
    weight_OK = torch.randn(64, 48)
    fitted = GPTQ.choose(weight_OK, IntegerGrid(4, True, 48), correlated_hessian)
    damped_KK, pending_OK, scale_O = correlated_hessian.double(), weight_OK.double(), fitted.scale_OG[:, 0].double()
    damped_KK.diagonal().add_(DAMPING * damped_KK.diagonal().mean())
    feedback_KK = torch.linalg.cholesky(torch.linalg.inv(damped_KK), upper=True)
    codes_OK = torch.empty(64, 48)
    for k in range(48):
        codes_OK[:, k] = (pending_OK[:, k] / scale_O).round().clamp(-8, 7)
        error_O = (pending_OK[:, k] - codes_OK[:, k] * scale_O) / feedback_KK[k, k]
        pending_OK[:, k:] -= error_O.unsqueeze(1) * feedback_KK[k, k:]
    assert float((codes_OK == fitted.codes_OK).float().mean()) > 0.995


@pytest.mark.parametrize("group", [20, 200, 400])
def test_blocks_of_columns_change_nothing(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_NK = torch.randn(600, 400) @ torch.randn(400, 400)
    hessian_KK, weight_OK = x_NK.T @ x_NK / 600, torch.randn(8, 400)
    blocked = GPTQ.choose(weight_OK, IntegerGrid(8, True, group), hessian_KK).values()
    monkeypatch.setattr("turbopocket.quant.fit.gptq.BLOCK_COLUMNS", 400)
    whole = GPTQ.choose(weight_OK, IntegerGrid(8, True, group), hessian_KK).values()
    # Sums run in another order, so now and then a weight on the edge takes the next code.
    assert float((blocked != whole).float().mean()) < 0.05


def test_columns_that_were_never_driven_round_to_nearest(correlated_hessian: Tensor) -> None:
    dead = torch.arange(48) % 3 == 0
    hessian_KK = correlated_hessian * ~dead * ~dead.unsqueeze(1)
    weight_OK = torch.rand(8, 48) - 0.5
    fitted = GPTQ.choose(weight_OK, IntegerGrid(8, True, 48), hessian_KK)
    error_OK = (fitted.values() - weight_OK)[:, dead].abs()
    assert (error_OK <= fitted.scale_OG.float() * 0.5001).all()


def test_hessian_of_zeros_gives_nearest_codes() -> None:
    weight_OK = torch.randn(4, 48)
    flat = GPTQ.choose(weight_OK, IntegerGrid(8, True, 48), torch.zeros(48, 48))
    assert torch.equal(flat.codes_OK, MSE.choose(weight_OK, IntegerGrid(8, True, 48), None).codes_OK)


def test_gptq_without_a_hessian_is_refused_with_a_hint() -> None:
    with pytest.raises(TurbopocketError, match="needs the layer's Hessian") as refusal:
        GPTQ.choose(torch.randn(4, 8), IntegerGrid(4, True, 8), None)
    assert "mse" in str(refusal.value.hint)


@pytest.mark.parametrize("fit", [MSE, GPTQ], ids=str)
@pytest.mark.parametrize(
    ("hessian_KK", "message"),
    [
        (torch.eye(7), r"\[7, 7\] for a weight of 8 columns"),
        (torch.full((8, 8), torch.nan), "NaN or infinite"),
    ],
    ids=["another size", "nan"],
)
def test_hessian_that_is_not_the_layers_is_refused(fit: Fit, hessian_KK: Tensor, message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        fit.choose(torch.randn(4, 8), IntegerGrid(4, True, 8), hessian_KK)


def test_hessian_with_a_negative_direction_is_refused() -> None:
    with pytest.raises(TurbopocketError, match="not positive semidefinite"):
        GPTQ.choose(torch.randn(4, 8), IntegerGrid(4, True, 8), torch.eye(8) - 0.5 * torch.ones(8, 8))


def test_fit_names_parse_back_and_others_are_refused() -> None:
    assert [parse_fit(str(fit)) for fit in FITS] == list(FITS)
    with pytest.raises(TurbopocketError, match="`hqq` is not a fit: known are absmax, mse, gptq"):
        parse_fit("hqq")


@pytest.mark.parametrize("fit", FITS, ids=str)
def test_scales_of_groups_are_as_short_as_asked_and_those_of_rows_are_fp16(fit: Fit) -> None:
    """bfloat16 has 8 significant bits, which XNNPACK keeps of a group's scale."""
    torch.manual_seed(0)
    weight, hessian = torch.randn(16, 64), torch.eye(64)
    short = replace(fit, group_scale_digits=8)
    grouped = parse_format("int4-g32").compress(weight, short, hessian).parts["scale"]
    assert torch.equal(grouped.float(), grouped.bfloat16().float())
    by_row = parse_format("int4-row").compress(weight, short, hessian).parts["scale"]
    assert torch.equal(by_row, parse_format("int4-row").compress(weight, fit, hessian).parts["scale"])
    assert not torch.equal(by_row.float(), by_row.bfloat16().float())


def test_a_short_scale_is_never_under_the_one_that_is_needed() -> None:
    needed = torch.rand(1000) * 10 ** torch.linspace(-4, 4, 1000)
    short = storable_scale(needed, 8)
    assert (short >= needed).all()
    assert (short <= needed * (1 + 2**-7) * (1 + 2**-10) + 2**-21).all()
    with pytest.raises(TurbopocketError, match="fp16 scales end at 65280"):
        storable_scale(torch.tensor([65_400.0]), 8)


@dataclass(frozen=True)
class Signs(Grid[Tensor]):
    """Two values: plus and minus `size`."""

    size: float


def test_a_grid_that_nobody_else_knows_is_fitted_by_its_solver() -> None:
    def solve(weight_OK: Tensor, grid: Signs, hessian_KK: Tensor | None) -> Tensor:
        return torch.where(weight_OK < 0, -grid.size, grid.size)

    fit = Fit("signs", {Signs: solve})
    assert fit.choose(torch.tensor([[-3.0, 2.0]]), Signs(0.5)).tolist() == [[-0.5, 0.5]]
    assert measuring_fit(fit) is fit
    with pytest.raises(TurbopocketError, match="gptq has no solver for a Signs: it has those for IntegerGrid, TableG"):
        GPTQ.choose(torch.ones(1, 2), Signs(0.5))


@pytest.mark.parametrize("name", ["int4-g32", "lut4-r8", "vq4-d4-r8", "avq2x4-d4"])
def test_every_format_takes_its_values_from_the_fit(name: str) -> None:
    """A fit without solvers refuses them all: nothing is chosen behind its back."""
    with pytest.raises(TurbopocketError, match="nothing has no solver for a [A-Z][a-z]+Grid"):
        parse_format(name).compress(torch.randn(16, 64), Fit("nothing", {}))


@pytest.mark.parametrize("fit", FITS, ids=str)
@pytest.mark.parametrize("name", ["int4-g32", "int8-row-asym", "lut4-r8", "vq4-d4-r8", "vq4-d4-out", "avq2x4-d4"])
def test_what_is_stored_has_the_values_of_the_codes(name: str, fit: Fit) -> None:
    found: list[Tensor] = []

    def watched(solver: Solver) -> Solver:
        def solve(weight_OK: Tensor, grid: Grid[Any], hessian_KK: Tensor | None) -> Any:
            codes = solver(weight_OK, grid, hessian_KK)
            found.append(codes.values())
            return codes

        return solve

    watching = replace(fit, solvers={kind: watched(solver) for kind, solver in fit.solvers.items()})
    stored = parse_format(name).compress(torch.randn(16, 64), watching, torch.eye(64))
    assert torch.equal(stored.format.decompress(stored), found[0])


def test_plans_for_absmax_and_vqdm_are_measured_with_them_and_others_with_mse() -> None:
    assert {fit.name: measuring_fit(fit).name for fit in FITS} == {
        "absmax": "absmax",
        "mse": "mse",
        "gptq": "mse",
        "vqdm": "quick vqdm",
        "reconstruct": "mse",
    }
