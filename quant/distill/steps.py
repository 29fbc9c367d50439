# SPDX-License-Identifier: Apache-2.0
"""Which timesteps a few-step student walks through: a schedule is a plug-in that draws a walk per iteration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...ground.errors import TurbopocketError
from .options import MAX_STEPS

CLEAN = -1
"""The timestep after the last step: no noise left."""


@dataclass(frozen=True)
class Step:
    """One step of a walk: the model is asked at timestep `start`, the solver goes on to `end` (`CLEAN` at last)."""

    start: int
    end: int


class StepSchedule(Protocol):
    """Draws the walk that one training iteration is about; noisiest step first."""

    def draw(self, generator: torch.Generator) -> tuple[Step, ...]:
        """Returns the steps of the next iteration."""
        ...


def even_walk(train_timesteps: int, count: int) -> tuple[Step, ...]:
    """`count` steps of equal length over all training timesteps, where diffusers' DDIM with trailing spacing goes."""
    length = train_timesteps // count
    starts = [round(train_timesteps * (1 - index / count)) - 1 for index in range(count)]
    return tuple(Step(start, start - length) for start in starts)


class FixedIntervals:
    """TDM's schedule: K steps of equal length over all training timesteps, K drawn from `counts`.

    Odds fall with the fourth root of K, which is ours: the fewer the steps, the more each of them has to learn.

    Timesteps are those of diffusers' DDIM with trailing spacing, so the shipped scheduler config says them whole
    (counts that do not divide them end a little short of clean, as they do there).
    TurbopocketError for a count outside 1 to 8.
    """

    def __init__(self, train_timesteps: int, counts: Sequence[int]) -> None:
        if not counts or not all(1 <= count <= MAX_STEPS for count in counts):
            raise TurbopocketError(f"step counts {list(counts)}: allowed are 1 to {MAX_STEPS}")
        self.train_timesteps, self.counts = train_timesteps, tuple(counts)
        shares = [count**-0.25 for count in self.counts]
        self.odds = tuple(share / sum(shares) for share in shares)

    def walk(self, count: int) -> tuple[Step, ...]:
        """Returns the steps of the walk in `count` steps."""
        return even_walk(self.train_timesteps, count)

    def draw(self, generator: torch.Generator) -> tuple[Step, ...]:
        """Returns the walk for a count drawn from `counts`."""
        return self.walk(self.counts[int(torch.multinomial(torch.tensor(self.odds), 1, generator=generator))])
