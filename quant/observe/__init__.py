# SPDX-License-Identifier: Apache-2.0
"""Statistics of what layers see while a model runs: a new one is a file here and its entry in `OBSERVATIONS`."""

from typing import Any

from ..fit import Fit
from ..fit.hessian import Hessian
from .base import LayerStats, Observation
from .extremes import Extremes, MinMax
from .identity import InputIdentity
from .moments import Moment, SecondMoment
from .power import InputPower
from .quietest import QuietestOutput

OBSERVATIONS: dict[str, type[Observation[Any]]] = {
    "second_moment": SecondMoment,
    "input_power": InputPower,
    "input_identity": InputIdentity,
    "extremes": Extremes,
    "quietest_output": QuietestOutput,
}
"""What calibration collects of every layer; of those that are `large`, what is asked for."""

__all__ = [
    "OBSERVATIONS",
    "Extremes",
    "InputIdentity",
    "InputPower",
    "LayerStats",
    "MinMax",
    "Moment",
    "Observation",
    "QuietestOutput",
    "SecondMoment",
    "carried_for",
    "hessian_for",
    "needed_by",
]


def needed_by(fit: Fit) -> type[Observation[Any]]:
    """The observation of a layer's inputs that a fit reads."""
    return SecondMoment if fit.whole_hessian else InputPower


def carried_for(fit: Fit, stats: LayerStats) -> LayerStats:
    """What a fit reads of them, in memory."""
    return LayerStats({needed_by(fit): stats[needed_by(fit)]})


def hessian_for(fit: Fit, stats: LayerStats) -> Hessian:
    """H = E[x xᵀ] of a layer's inputs as far as a fit reads it: half of [K, K], or the diagonal [K]."""
    return stats[SecondMoment] if fit.whole_hessian else stats[InputPower]
