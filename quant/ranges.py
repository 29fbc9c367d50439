# SPDX-License-Identifier: Apache-2.0
"""How large the numbers at each layer get while the float model draws, kept for whoever needs ranges ahead of time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..ground.records import load_record, save_record

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class StepRange:
    """Of one layer in the calls at one timestep: least and greatest input and output, over `calls` with a prompt, and
    those without one beside them."""

    timestep: float
    input: tuple[float, float]
    output: tuple[float, float]
    calls: int


@dataclass(frozen=True)
class Ranges:
    """Of one layer over all calls: least and greatest input and output, and how much there is between them.

    Attributes:
        input_power: E[x²] over the columns of the matrix view of its weight, with a convolution's padding.
        quietest_output_power: E[y²] of the item of a batch for which it is least.
        steps: the ranges at each timestep, noisiest first; none of a component that has no timestep.
    """

    input: tuple[float, float]
    output: tuple[float, float]
    input_power: float
    quietest_output_power: float
    steps: tuple[StepRange, ...] = ()

    def at(self, timestep: float) -> "StepRange | Ranges":
        """Those of the nearest timestep; of all calls where there are no timesteps."""
        return self.steps[nearest([step.timestep for step in self.steps], timestep)] if self.steps else self

    @property
    def largest_output(self) -> float:
        """The largest magnitude it gave."""
        return max(map(abs, self.output))


def nearest(timesteps: Sequence[float], timestep: float) -> int:
    """The index of the nearest of some timesteps, of two alike the first: what a graph's ArgMin finds."""
    return min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - timestep))


def save_ranges(path: Path, ranges: Mapping[str, Ranges]) -> None:
    """Writes the ranges by layer as JSON, whole or not at all."""
    layers = {name: asdict(layer) for name, layer in ranges.items()}
    save_record(path, {"schema_version": SCHEMA_VERSION, "layers": layers})


def load_ranges(path: Path) -> dict[str, Ranges]:
    """The ranges saved at `path`; TurbopocketError naming the file when it is missing or holds something else."""
    return load_record(path, "a file of ranges", SCHEMA_VERSION, _layers)


def _layers(values: dict[str, Any], schema_version: int) -> dict[str, Ranges]:
    return {name: _from_json(**entry) for name, entry in values["layers"].items()}


def _from_json(
    input: list[float],
    output: list[float],
    input_power: float,
    quietest_output_power: float,
    steps: Sequence[dict[str, Any]] = (),
) -> Ranges:
    powers = float(input_power), float(quietest_output_power)
    return Ranges(_pair(input), _pair(output), *powers, tuple(_step(**step) for step in steps))


def _step(timestep: float, input: list[float], output: list[float], calls: int) -> StepRange:
    return StepRange(float(timestep), _pair(input), _pair(output), int(calls))


def _pair(values: list[float]) -> tuple[float, float]:
    least, greatest = values
    return float(least), float(greatest)
