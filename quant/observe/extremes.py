# SPDX-License-Identifier: Apache-2.0
"""The least and the greatest number at both ends of a layer."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ...ground.names import CallPlace
from .base import Observation

_NOTHING = (math.inf, -math.inf)


@dataclass(frozen=True)
class MinMax:
    """Least and greatest input and output over all calls."""

    input: tuple[float, float]
    output: tuple[float, float]


class Extremes(Observation[MinMax]):
    """`MinMax` of all calls together."""

    def begin(self, layer: nn.Module) -> None:
        self.input, self.output = _NOTHING, _NOTHING

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        self.input, self.output = _widened(self.input, x), _widened(self.output, y)

    def value(self) -> MinMax:
        return MinMax(self.input, self.output)


def _widened(seen: tuple[float, float], values: Tensor) -> tuple[float, float]:
    if not values.numel():
        return seen
    least, greatest = values.aminmax()
    return min(seen[0], float(least)), max(seen[1], float(greatest))
