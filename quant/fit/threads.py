# SPDX-License-Identifier: Apache-2.0
"""Threads for work that PyTorch would cut too fine.

PyTorch shares each operator among its threads, which wait for each other after every one of them. Where operators are
of some ten thousand numbers that costs more than it gains, and where another program has one of the cores it costs
twenty times as much as one thread takes (12 s to 0.6 s for the scales of a 2560 x 1280 weight, two threads on two cores
with a load of 9), since all wait for the one that has no core.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operators run in one thread while the block does."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def in_threads(work: Callable[[Chunk], Result], chunks: Sequence[Chunk]) -> list[Result]:
    """`work` of each chunk, in order: whole chunks are shared among as many threads as PyTorch has, not operators.

    Results carry no gradients. Raises what the first chunk raises whose work does.
    """

    def alone(chunk: Chunk) -> Result:
        with torch.no_grad():  # a thread of its own begins with gradients
            return work(chunk)

    threads = min(torch.get_num_threads(), len(chunks))
    with one_thread():
        if threads <= 1:
            return [alone(chunk) for chunk in chunks]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, chunks))
