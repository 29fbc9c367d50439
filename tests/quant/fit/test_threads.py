# SPDX-License-Identifier: Apache-2.0
"""Chunks shared among threads: the same numbers, in order, each operator in one thread."""

import threading
from collections.abc import Iterator

import pytest
import torch

from turbopocket.quant.fit.grids import IntegerGrid
from turbopocket.quant.fit.mse import CHUNK_WEIGHTS, mse_codes
from turbopocket.quant.fit.threads import in_threads, one_thread


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_chunks_are_shared_and_operators_are_not(two_threads: None) -> None:
    met = threading.Barrier(2, timeout=60)  # broken where one thread does all

    def work(chunk: int) -> tuple[int, int]:
        met.wait()
        return chunk, torch.get_num_threads()

    assert in_threads(work, [1, 2, 3, 4]) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert torch.get_num_threads() == 2


def test_one_thread_ends_with_the_block(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_what_a_chunk_raises_is_raised_and_threads_come_back(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda chunk: 1 // chunk, [1, 0, 2])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_a_weight_that_needs_gradients_carry_none(two_threads: None, symmetric: bool) -> None:
    """And are those of one thread, to the bit."""
    weight = torch.randn(1024, 320, generator=torch.Generator().manual_seed(0))
    assert weight.numel() > 2 * CHUNK_WEIGHTS
    grid = IntegerGrid(bits=4, symmetric=symmetric, group=32)
    shared = mse_codes(
        weight.clone().requires_grad_(), grid, torch.rand(320, generator=torch.Generator().manual_seed(1))
    )
    with one_thread():
        alone = mse_codes(weight, grid, torch.rand(320, generator=torch.Generator().manual_seed(1)))
    assert not shared.scale_OG.requires_grad
    assert torch.equal(shared.codes_OK, alone.codes_OK)
    assert torch.equal(shared.scale_OG, alone.scale_OG)
