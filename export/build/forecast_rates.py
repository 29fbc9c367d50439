# SPDX-License-Identifier: Apache-2.0
"""How fast this machine is, from a fraction of a second of what a build does for hours."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ...quant.observe.vectors import digest_of
from .forecast_work import Work

TRIES = 5
"""Of which the quickest counts, in this thread's own time: whatever else the machine did only adds."""

BETWEEN = 2.5
"""Times what an operator of a plain chain of layers takes: Python between those of a model. By `pocket-turbo`."""


@dataclass(frozen=True)
class Rates:
    """What PyTorch does here in a second with its threads: `flops` of float32 products,
    `conv_flops` of convolutions, `bytes` that operators on single numbers read and write, `hashed_bytes` that are told
    apart by their digest; and the `operator_seconds` that each operator takes before it computes anything."""

    flops: float
    conv_flops: float
    bytes: float
    hashed_bytes: float
    operator_seconds: float

    def seconds(self, work: Work) -> float:
        """How long the work takes."""
        return (
            work.flops / self.flops
            + work.conv_flops / self.conv_flops
            + work.bytes / self.bytes
            + work.operators * self.operator_seconds
        )


@lru_cache(maxsize=1)
def measured_rates(threads: int) -> Rates:
    """Of this machine, with so many threads as PyTorch now has; measured once."""
    with torch.inference_mode():
        x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
        picture, convolution = torch.randn(1, 128, 48, 48), nn.Conv2d(128, 128, 3, padding=1)
        many = torch.randn(2**22)
        layers = nn.Sequential(*(part for _ in range(20) for part in (nn.Linear(16, 16), nn.SiLU(), nn.LayerNorm(16))))
        few = torch.randn(1, 16)
        return Rates(
            flops=2 * x.numel() * 1024 / seconds_of(lambda: x @ weight),
            conv_flops=2 * 48 * 48 * convolution.weight.numel() / seconds_of(lambda: convolution(picture)),
            bytes=2 * many.nbytes / seconds_of(lambda: nn.functional.silu(many)),
            hashed_bytes=many[: 2**18].nbytes / seconds_of(lambda: digest_of(many[: 2**18])),
            operator_seconds=BETWEEN * seconds_of(lambda: layers(few)) / (4 * 20),  # a Linear is two operators
        )


def seconds_of(compute: Callable[[], object], least_seconds: float = 0.0) -> float:
    """The least of `TRIES` runs after a first one; of no more than have taken `least_seconds`, if that is given."""
    compute()
    found: list[float] = []
    while len(found) < TRIES and not (least_seconds and sum(found) > least_seconds):
        start = time.thread_time()
        compute()
        found.append(time.thread_time() - start)
    return max(min(found), 1e-9)
