# SPDX-License-Identifier: Apache-2.0
"""Statistics of what layers see while a model runs: a new one is a file here and its entry in `OBSERVATIONS`."""

from typing import Any

from .base import LayerStats, Observation
from .extremes import Extremes, MinMax
from .moments import Moment, SecondMoment
from .quietest import QuietestOutput

OBSERVATIONS: dict[str, type[Observation[Any]]] = {
    "second_moment": SecondMoment,
    "extremes": Extremes,
    "quietest_output": QuietestOutput,
}
"""What calibration collects of every layer."""

__all__ = [
    "OBSERVATIONS",
    "Extremes",
    "LayerStats",
    "MinMax",
    "Moment",
    "Observation",
    "QuietestOutput",
    "SecondMoment",
]
