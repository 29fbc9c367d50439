# SPDX-License-Identifier: Apache-2.0
"""The least and the greatest number at both ends of a layer, over all calls and at each timestep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ground.names import CallPlace
from ..ranges import StepRange
from .base import Observation

_NOTHING = (math.inf, -math.inf)


@dataclass(frozen=True)
class MinMax:
    """Least and greatest input and output over all calls; the same at each timestep, if there are any."""

    input: tuple[float, float]
    output: tuple[float, float]
    steps: tuple[StepRange, ...] = ()


class Extremes(Observation[MinMax]):
    """`MinMax` of all calls together, and of those at each timestep, with a prompt and without."""

    def begin(self, layer: nn.Module) -> None:
        self.input, self.output = _NOTHING, _NOTHING
        self.steps: dict[float, StepRange] = {}

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        input, output = _range_of(x), _range_of(y)
        self.input, self.output = _widened(self.input, input), _widened(self.output, output)
        if place.timestep is not None:
            before = self.steps.get(place.timestep) or StepRange(place.timestep, _NOTHING, _NOTHING, 0)
            self.steps[place.timestep] = StepRange(
                place.timestep,
                _widened(before.input, input),
                _widened(before.output, output),
                before.calls + (place.guided is not False),
            )

    def value(self) -> MinMax:
        noisiest_first = sorted(self.steps.values(), key=lambda step: -step.timestep)
        return MinMax(self.input, self.output, tuple(noisiest_first))

    @classmethod
    def packed(cls, value: MinMax) -> dict[str, Tensor]:
        steps = [[step.timestep, *step.input, *step.output, step.calls] for step in value.steps]
        return {
            "value": torch.tensor([value.input, value.output], dtype=torch.float64),
            "steps": torch.tensor(steps, dtype=torch.float64).reshape(-1, 6),
        }

    @classmethod
    def unpacked(cls, parts: Mapping[str, Tensor]) -> MinMax:
        (least_x, greatest_x), (least_y, greatest_y) = parts["value"].tolist()
        steps = [
            StepRange(timestep, (low_x, high_x), (low_y, high_y), int(calls))
            for timestep, low_x, high_x, low_y, high_y, calls in parts["steps"].tolist()
        ]
        return MinMax((least_x, greatest_x), (least_y, greatest_y), tuple(steps))


def _range_of(values: Tensor) -> tuple[float, float]:
    if not values.numel():
        return _NOTHING
    least, greatest = values.aminmax()
    return float(least), float(greatest)


def _widened(seen: tuple[float, float], by: tuple[float, float]) -> tuple[float, float]:
    return min(seen[0], by[0]), max(seen[1], by[1])
