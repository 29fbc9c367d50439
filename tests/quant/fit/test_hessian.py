# SPDX-License-Identifier: Apache-2.0
"""Half matrices against whole ones, and the factor in place against a dense one in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.fit import GPTQ, VQDM, AdditiveGrid, Fit, Grid, IntegerGrid
from turbopocket.quant.fit.gptq import DAMPING, upper_factor
from turbopocket.quant.fit.hessian import HalfMatrix, checked_diagonal, factor_in_place, flip_in_place, own_hessian


def matrix(columns: int) -> Tensor:
    """A second moment of few directions, of which some are a thousand times as strong as others."""
    x_NK = torch.randn(columns // 4, columns) * torch.logspace(0, -3, columns)
    moment_KK = x_NK.T @ x_NK
    return (moment_KK + moment_KK.T) / 2


def halved(whole_KK: Tensor, width: int) -> HalfMatrix:
    ends = [*range(width, len(whole_KK), width), len(whole_KK)]
    return HalfMatrix(tuple(whole_KK[:end, start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)))


@pytest.mark.parametrize("width", [1, 7, 20, 64])
def test_half_a_matrix_says_all_of_it(width: int) -> None:
    whole_KK = matrix(20)
    half = halved(whole_KK, width)
    assert torch.equal(own_hessian(half, 20), whole_KK)
    assert torch.equal(half.diagonal(), whole_KK.diagonal())
    assert torch.equal(checked_diagonal(half, 20), whole_KK.diagonal())
    with pytest.raises(TurbopocketError, match=r"\[20, 20\] for a weight of 19 columns"):
        own_hessian(half, 19)


@pytest.mark.parametrize("columns", [1, 255, 256, 600, 769])
def test_the_factor_in_place_is_that_of_dense_algebra(columns: int) -> None:
    whole_KK = matrix(max(columns, 8))[:columns, :columns].clone()
    whole_KK.diagonal().add_(0.01 * whole_KK.diagonal().mean())
    expected_KK = torch.linalg.cholesky(whole_KK.double())
    factor_KK = factor_in_place(whole_KK, "a fit")
    assert factor_KK is whole_KK
    assert not factor_KK.triu(1).any()
    torch.testing.assert_close(factor_KK.double(), expected_KK, rtol=1e-3, atol=1e-5 * float(expected_KK.max()))


@pytest.mark.parametrize("columns", [5, 512, 700])
def test_gptqs_factor_is_of_the_damped_hessian_and_upper(columns: int) -> None:
    whole_KK = matrix(max(columns, 8))[:columns, :columns].clone()
    before_KK = whole_KK.clone()
    factor_KK = upper_factor(halved(whole_KK, 300), columns).double()
    assert torch.equal(whole_KK, before_KK)
    damped_KK = whole_KK.double() + DAMPING * whole_KK.diagonal().double().mean() * torch.eye(columns)
    assert not factor_KK.tril(-1).any()
    torch.testing.assert_close(factor_KK @ factor_KK.T, damped_KK, rtol=1e-4, atol=1e-6 * float(damped_KK.max()))


@pytest.mark.parametrize("columns", [1, 2, 511, 512, 513, 1025])
def test_flipped_in_place(columns: int) -> None:
    values_KK = torch.randn(columns, columns)
    expected_KK = values_KK.flip(0, 1)
    flip_in_place(values_KK)
    assert torch.equal(values_KK, expected_KK)


def test_the_pivot_that_fails_is_counted_from_the_first_column() -> None:
    whole_KK = torch.eye(700)
    whole_KK[600, 600] = -1.0
    with pytest.raises(TurbopocketError, match=r"vqdm: the Hessian is not positive semidefinite \(pivot 601 of"):
        factor_in_place(whole_KK, "vqdm")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_refused(bad: float) -> None:
    whole_KK = matrix(20)
    whole_KK[3, 17] = whole_KK[17, 3] = bad
    for hessian in (whole_KK, halved(whole_KK, 6)):
        with pytest.raises(TurbopocketError, match="NaN or infinite"):
            own_hessian(hessian, 20)


@pytest.mark.parametrize(
    ("fit", "grid"), [(GPTQ, IntegerGrid(4, True, 32)), (VQDM, AdditiveGrid(2, 4, 4))], ids=["gptq", "vqdm"]
)
def test_fits_to_half_a_matrix_are_those_to_all_of_it(fit: Fit, grid: Grid[Any]) -> None:
    weight_OK, whole_KK = torch.randn(24, 96), matrix(96)
    half = halved(whole_KK, 40)
    before = [strip_ES.clone() for strip_ES in half.strips]
    assert torch.equal(fit.choose(weight_OK, grid, half).values(), fit.choose(weight_OK, grid, whole_KK).values())
    assert all(torch.equal(*each) for each in zip(half.strips, before, strict=True))
