# SPDX-License-Identifier: Apache-2.0
"""Memory and seconds of the stages in which runtimes draw with what was built."""

from .forecast_stages import RUNTIME_BYTES, Asked, Stage
from .forecast_work import Work

SESSION_OPERATORS = 800
"""Of a layer, in a runtime that opens a graph."""


def compare(asked: Asked) -> Stage:
    """Pictures by the float model, by the stored weights, each call of it again, and by each runtime twice."""
    weights = sum(each.weights * asked.calls[name] for name, each in asked.components.items())
    made = Work(bytes=16.0 * weights)
    picture, first = asked.rates.seconds(asked.picture), asked.rates.seconds(asked.picture + made)
    again = asked.rates.seconds(asked.picture + made)
    count = asked.parity_pictures
    opened = asked.rates.seconds(Work(operators=SESSION_OPERATORS * len(asked.layers)))
    run = 2 * count * picture + opened
    seconds = (count * picture + first, 2 * count * again, *(run for _ in range(asked.runtimes)))
    return Stage(seconds, asked.compared_bytes)


def self_check(asked: Asked) -> Stage:
    """A picture by the stored weights and by each runtime, for whoever runs the artifact to compare with."""
    weights = sum(each.weights * asked.calls[name] for name, each in asked.components.items())
    drawn = asked.picture * (1 + asked.runtimes) + Work(bytes=16.0 * weights)
    return Stage((asked.rates.seconds(drawn),), asked.compared_bytes)


def memory(asked: Asked) -> Stage:
    """Each component runs once in a process of its own."""
    seconds = [asked.rates.seconds(each.work) + 1.0 for each in asked.components.values()]
    share = asked.stored_bytes / sum(each.weights for each in asked.components.values())
    own = max(each.peak_bytes + share * each.weights for each in asked.components.values())
    return Stage(tuple(seconds), asked.kept_bytes + 2 * RUNTIME_BYTES + own)
