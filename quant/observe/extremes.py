# SPDX-License-Identifier: Apache-2.0
"""The least and the greatest number at both ends of a layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
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

    @classmethod
    def packed(cls, value: MinMax) -> dict[str, Tensor]:
        return {"value": torch.tensor([value.input, value.output], dtype=torch.float64)}

    @classmethod
    def unpacked(cls, parts: Mapping[str, Tensor]) -> MinMax:
        (least_x, greatest_x), (least_y, greatest_y) = parts["value"].tolist()
        return MinMax((least_x, greatest_x), (least_y, greatest_y))


def _widened(seen: tuple[float, float], values: Tensor) -> tuple[float, float]:
    if not values.numel():
        return seen
    least, greatest = values.aminmax()
    return min(seen[0], float(least)), max(seen[1], float(greatest))
