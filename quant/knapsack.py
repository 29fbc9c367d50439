# SPDX-License-Identifier: Apache-2.0
"""The multiple-choice knapsack under the planner: pick one option per item, least loss, bytes within capacity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

# Nodes and not seconds, so that a slow machine finds the same plan as a fast one.
SOLVER_OPTIONS = {"mip_rel_gap": 1e-6, "node_limit": 20_000}
LOSS_SCALE = 1e4


@dataclass(frozen=True)
class Kind:
    """`count` items that share their options (nbytes, loss), which rise in bytes and fall in loss."""

    options: tuple[tuple[int, float], ...]
    count: int


def least_loss(kinds: Sequence[Kind], capacity_bytes: int) -> list[list[int]]:
    """For each kind, how many of its items take each option; the smallest options must fit the capacity."""
    spare_bytes = capacity_bytes - sum(kind.options[0][0] * kind.count for kind in kinds)
    largest_bytes = sum((kind.options[-1][0] - kind.options[0][0]) * kind.count for kind in kinds)
    if largest_bytes <= spare_bytes:
        return [[0] * (len(kind.options) - 1) + [kind.count] for kind in kinds]
    return _solve(kinds, spare_bytes)


def _solve(kinds: Sequence[Kind], spare_bytes: int) -> list[list[int]]:
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
    rows = np.repeat(np.arange(len(kinds)), sizes)
    one_option_each = csr_array(
        (np.ones(loss.size), (rows, np.arange(loss.size))), shape=(len(kinds), loss.size)
    )
    result = milp(
        loss / loss.max() * LOSS_SCALE,
        integrality=np.ones(loss.size),
        bounds=Bounds(0, np.repeat(item_counts, sizes)),
        constraints=[
            LinearConstraint(one_option_each, item_counts, item_counts),
            LinearConstraint(csr_array(np.array([extra_units], dtype=float)), -np.inf, limit_units),
        ],
        options=SOLVER_OPTIONS,
    )
    flat = [round(count) for count in result.x]
    offsets = np.cumsum([0, *sizes])
    return [flat[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
