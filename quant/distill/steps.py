# SPDX-License-Identifier: Apache-2.0
"""Which timesteps a few-step student walks through: a schedule is a plug-in that draws a walk per iteration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import QuantError

CLEAN = -1
"""The timestep after the last step: no noise left."""
MAX_STEPS = 8


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


class FixedIntervals:
    """TDM's schedule: K steps of equal length over all training timesteps, K drawn from `counts` with odds of 1 / K.

    The odds are ours: the fewer the steps, the more is left to learn, and each of them is met more often.

    Timesteps are those of diffusers' DDIM with trailing spacing, so the shipped scheduler config says them whole
    (six and seven steps, which do not divide 1000, end one timestep short of clean, as they do there).
    QuantError for a count outside 1 to 8.
    """

    def __init__(self, train_timesteps: int, counts: Sequence[int]) -> None:
        if not counts or not all(1 <= count <= MAX_STEPS for count in counts):
            raise QuantError(f"step counts {list(counts)}: allowed are 1 to {MAX_STEPS}")
        self.train_timesteps, self.counts = train_timesteps, tuple(counts)
        shares = [1 / count for count in self.counts]
        self.odds = tuple(share / sum(shares) for share in shares)

    def walk(self, count: int) -> tuple[Step, ...]:
        """Returns the steps of the walk in `count` steps."""
        length = self.train_timesteps // count
        starts = [round(self.train_timesteps * (1 - index / count)) - 1 for index in range(count)]
        return tuple(Step(start, start - length) for start in starts)

    def draw(self, generator: torch.Generator) -> tuple[Step, ...]:
        """Returns the walk for a count drawn from `counts`."""
        return self.walk(self.counts[int(torch.multinomial(torch.tensor(self.odds), 1, generator=generator))])
