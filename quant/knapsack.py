# SPDX-License-Identifier: Apache-2.0
"""The multiple-choice knapsack under the planner: one option per item, least loss, bytes within capacity."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True)
class Kind:
    """`count` items that share their options (nbytes, loss), which rise in bytes and fall in loss."""

    options: tuple[tuple[int, float], ...]
    count: int


def least_loss(kinds: Sequence[Kind], capacity_bytes: int) -> list[list[int]]:
    """For each kind, how many of its items take each option; the smallest options must fit the capacity."""
    spare_bytes = capacity_bytes - sum(kind.options[0][0] * kind.count for kind in kinds)
    most_bytes = sum((kind.options[-1][0] - kind.options[0][0]) * kind.count for kind in kinds)
    if most_bytes <= spare_bytes:
        return [[0] * (len(kind.options) - 1) + [kind.count] for kind in kinds]
    counts = _within(kinds, spare_bytes)
    rest = _without_hopeless_options(kinds, _total_loss(kinds, counts))
    if _largest_loss(rest) > _largest_loss(kinds) / REFINE_BELOW:
        return counts
    refined = least_loss(rest, capacity_bytes)
    return [[0] * (len(kind.options) - len(row)) + row for kind, row in zip(kinds, refined, strict=True)]


def _without_hopeless_options(kinds: Sequence[Kind], total_loss: float) -> list[Kind]:
    """The kinds without the options that alone lose more than a whole answer that is at hand.

    What is left spans fewer orders of magnitude, so the solver, whose tolerances are absolute, sees the small
    losses too.
    """
    return [Kind(tuple(option for option in kind.options if option[1] <= total_loss), kind.count) for kind in kinds]


def _total_loss(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> float:
    return math.fsum(
        count * loss
        for kind, row in zip(kinds, counts, strict=True)
        for count, (_, loss) in zip(row, kind.options, strict=True)
    )


def _largest_loss(kinds: Sequence[Kind]) -> float:
    return max(kind.options[0][1] for kind in kinds)


def _within(kinds: Sequence[Kind], spare_bytes: int) -> list[list[int]]:
    """The solver's answer, never more than `spare_bytes` above the smallest options."""
    extra_bytes = [nbytes - kind.options[0][0] for kind in kinds for nbytes, _ in kind.options]
    # Sizes share a large factor (rows of whole bytes); without it the numbers are small enough to be exact.
    unit_bytes = math.gcd(*extra_bytes)
    limit_units = spare_bytes // unit_bytes
    while True:
        counts = _milp(kinds, [extra // unit_bytes for extra in extra_bytes], limit_units)
        flat = [count for kind_counts in counts for count in kind_counts]
        used_bytes = sum(count * extra for count, extra in zip(flat, extra_bytes, strict=True))
        if used_bytes <= spare_bytes:
            return counts
        # The solver meets constraints to a tolerance; a budget is met to the byte.
        limit_units -= -(-(used_bytes - spare_bytes) // unit_bytes)


def _milp(kinds: Sequence[Kind], extra_units: Sequence[int], limit_units: int) -> list[list[int]]:
    sizes = [len(kind.options) for kind in kinds]
    item_counts = np.array([kind.count for kind in kinds], dtype=float)
    loss = np.array([loss for kind in kinds for _, loss in kind.options])
    kind_of_option = np.repeat(np.arange(len(kinds)), sizes)
    options_of_kind = csr_array((np.ones(loss.size), (kind_of_option, np.arange(loss.size))))
    largest_units = max(extra_units)
    shares = np.array([extra_units], dtype=float) / largest_units
    with _c_stdout_silenced():
        result = milp(
            loss / loss.max() * LOSS_SCALE,
            integrality=np.ones(loss.size),
            bounds=Bounds(0, np.repeat(item_counts, sizes)),
            constraints=[
                LinearConstraint(options_of_kind, item_counts, item_counts),
                LinearConstraint(shares, -np.inf, limit_units / largest_units),
            ],
            options=SOLVER_OPTIONS,
        )
    if result.x is None:
        raise TurbopocketError(
            f"the solver found no plan within its {SOLVER_OPTIONS['node_limit']} nodes: {result.message}"
        )
    flat = [round(count) for count in result.x]
    return [flat[start:stop] for start, stop in pairwise(np.cumsum([0, *sizes]))]


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
