# SPDX-License-Identifier: Apache-2.0
"""The multiple-choice knapsack under the planner: one option per item, least loss, bytes and memory within limits."""

import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..ground.errors import TurbopocketError

# A limit of nodes and not of seconds, so that a slow machine finds the same plan as a fast one. A smaller gap costs
# minutes on models whose layers lose alike per byte, and no measured loss is good to four digits.
SOLVER_OPTIONS = {"mip_rel_gap": 1e-4, "node_limit": 1000}
# The largest loss as the solver sees it, far over its absolute tolerance of 1e-6.
LOSS_SCALE = 1e4
# Solve again once the losses still in play have shrunk by this factor.
REFINE_BELOW = 100.0
_INFEASIBLE = 2
NO_ROOMS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Option:
    """One way to take an item: bytes of the budget, loss, and memory of the item's pool: `held` all the while, and
    `peak` beside that for a moment, so that of all items of a pool the largest peak counts."""

    nbytes: int
    loss: float
    held: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Kind:
    """`count` items that share their options, which rise in bytes; `pool` is whose memory they take."""

    options: tuple[Option, ...]
    count: int
    pool: str = ""


class NoneFits(Exception):
    """No options of all items are within every limit."""


def least_loss(kinds: Sequence[Kind], capacity_bytes: int, rooms: Mapping[str, int] = NO_ROOMS) -> list[list[int]]:
    """For each kind, how many of its items take each option.

    `rooms` are the bytes of memory of pools; one that is not named has no limit. Raises NoneFits where the least
    options are over a limit, or the limits together leave none.
    """
    best = [_of_least_loss(kind) for kind in kinds]
    limits = _limits(kinds, capacity_bytes, rooms)
    if any(each.spare < 0 for each in limits):
        raise NoneFits
    if all(each.used(best) <= each.spare for each in limits):
        return best
    counts = _within(kinds, [each for each in limits if each.most(kinds) > each.spare])
    total_loss = _total_loss(kinds, counts)
    # Options that alone lose more than a whole answer that is at hand are hopeless. What is left spans fewer orders of
    # magnitude, so the solver, whose tolerances are absolute, sees the small losses too.
    kept = [[at for at, option in enumerate(kind.options) if option.loss <= total_loss] for kind in kinds]
    rest = [replace(kind, options=tuple(kind.options[at] for at in own)) for kind, own in zip(kinds, kept, strict=True)]
    if _largest_loss(rest) >= _largest_loss(kinds) / REFINE_BELOW:
        return counts
    refined = least_loss(rest, capacity_bytes, rooms)
    return [_spread(row, own, kind) for row, own, kind in zip(refined, kept, kinds, strict=True)]


def _spread(row: Sequence[int], kept: Sequence[int], kind: Kind) -> list[int]:
    """Counts of the options at these places as counts of all."""
    counts = [0] * len(kind.options)
    for at, count in zip(kept, row, strict=True):
        counts[at] = count
    return counts


def _of_least_loss(kind: Kind) -> list[int]:
    best = min(range(len(kind.options)), key=lambda at: kind.options[at].loss)
    return [kind.count * (at == best) for at in range(len(kind.options))]


def _total_loss(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> float:
    return math.fsum(
        count * option.loss
        for kind, row in zip(kinds, counts, strict=True)
        for count, option in zip(row, kind.options, strict=True)
    )


def _largest_loss(kinds: Sequence[Kind]) -> float:
    return max(option.loss for kind in kinds for option in kind.options)


@dataclass(frozen=True)
class _Limit:
    """What may be taken over the least options: `extra` of each item, and `peaks` once if any item takes the option;
    both by option, those of all kinds in a row."""

    extra: tuple[int, ...]
    peaks: tuple[int, ...]
    spare: int

    @property
    def unit(self) -> int:
        """Sizes share a large factor (rows of whole bytes); without it the numbers are small enough to be exact."""
        return math.gcd(*self.extra, *self.peaks) or 1

    def used(self, counts: Sequence[Sequence[int]]) -> int:
        flat = [count for row in counts for count in row]
        taken = max((peak for peak, count in zip(self.peaks, flat, strict=True) if count), default=0)
        return taken + sum(count * extra for count, extra in zip(flat, self.extra, strict=True))

    def most(self, kinds: Sequence[Kind]) -> int:
        """No counts use more."""
        ends = [0, *itertools.accumulate(len(kind.options) for kind in kinds)]
        spans = zip(kinds, itertools.pairwise(ends), strict=True)
        return max(self.peaks) + sum(kind.count * max(self.extra[start:stop]) for kind, (start, stop) in spans)


def _limits(kinds: Sequence[Kind], capacity_bytes: int, rooms: Mapping[str, int]) -> list[_Limit]:
    """Of the budget first, then of each pool that has items."""
    options = [option for kind in kinds for option in kind.options]
    if not options:
        return []
    least = sum(kind.options[0].nbytes * kind.count for kind in kinds)
    extra = tuple(option.nbytes - kind.options[0].nbytes for kind in kinds for option in kind.options)
    pools = {kind.pool for kind in kinds}
    of_pools = [_memory_limit(kinds, pool, room) for pool, room in rooms.items() if pool in pools]
    return [_Limit(extra, (0,) * len(extra), capacity_bytes - least), *of_pools]


def _memory_limit(kinds: Sequence[Kind], pool: str, room: int) -> _Limit:
    extra, peaks, least = [], [], 0
    for kind in kinds:
        inside = kind.pool == pool
        smallest = min(option.held for option in kind.options)
        least += inside * smallest * kind.count
        extra += [inside * (option.held - smallest) for option in kind.options]
        peaks += [inside * option.peak for option in kind.options]
    return _Limit(tuple(extra), tuple(peaks), room - least)


def _within(kinds: Sequence[Kind], limits: Sequence[_Limit]) -> list[list[int]]:
    """The solver's answer, never more than is to spare."""
    units = [each.spare // each.unit for each in limits]
    while True:
        counts = _milp(kinds, limits, units)
        over = [max(0, each.used(counts) - each.spare) for each in limits]
        if not any(over):
            return counts
        # The solver meets constraints to a tolerance; a budget is met to the byte.
        units = [left - -(-more // each.unit) for left, more, each in zip(units, over, limits, strict=True)]


def _milp(kinds: Sequence[Kind], limits: Sequence[_Limit], units: Sequence[int]) -> list[list[int]]:
    """Whole numbers of items by option, and behind them, for each limit and peak, whether any option has it."""
    sizes = [len(kind.options) for kind in kinds]
    item_counts = np.array([kind.count for kind in kinds], dtype=float)
    loss = np.array([option.loss for kind in kinds for option in kind.options])
    kind_of_option = np.repeat(np.arange(len(kinds)), sizes)
    most = np.repeat(item_counts, sizes)
    peaks = [(limit, peak) for limit in limits for peak in sorted(set(limit.peaks) - {0})]
    width = loss.size + len(peaks)
    options_of_kind = csr_array((np.ones(loss.size), (kind_of_option, np.arange(loss.size))), (len(kinds), width))
    constraints = [LinearConstraint(options_of_kind, item_counts, item_counts)]
    for limit, left in zip(limits, units, strict=True):
        extra = np.array(limit.extra, dtype=float) / limit.unit
        largest = max(extra.max(), max(limit.peaks) / limit.unit)
        own = [at for at, (whose, _) in enumerate(peaks) if whose is limit]
        rows = np.zeros((max(1, len(own)), width))
        rows[:, : loss.size] = extra
        for row, at in enumerate(own):
            rows[row, loss.size + at] = peaks[at][1] / limit.unit
        constraints.append(LinearConstraint(rows / largest, -np.inf, left / largest))
    for at, (limit, peak) in enumerate(peaks):
        taken = np.array([each == peak for each in limit.peaks], dtype=float)
        rows = np.zeros((int(taken.sum()), width))
        rows[np.arange(len(rows)), np.flatnonzero(taken)] = 1.0
        rows[:, loss.size + at] = -most[taken > 0]
        constraints.append(LinearConstraint(rows, -np.inf, 0.0))
    with _c_stdout_silenced():
        result = milp(
            np.concatenate([loss / (loss.max() or 1.0) * LOSS_SCALE, np.zeros(len(peaks))]),
            integrality=np.ones(width),
            bounds=Bounds(0, np.concatenate([most, np.ones(len(peaks))])),
            constraints=constraints,
            options=SOLVER_OPTIONS,
        )
    if result.status == _INFEASIBLE:
        raise NoneFits
    if result.x is None:
        raise TurbopocketError(
            f"the solver found no plan within its {SOLVER_OPTIONS['node_limit']} nodes: {result.message}"
        )
    flat = [round(count) for count in result.x[: loss.size]]
    return [flat[start:stop] for start, stop in itertools.pairwise(np.cumsum([0, *sizes]))]


@contextmanager
def _c_stdout_silenced() -> Iterator[None]:
    """HiGHS prints a debug line now and then (1.8 to 1.12, even with `disp` off); stdout is for data."""
    flush_c_streams = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush_c_streams(None)
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush_c_streams(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
