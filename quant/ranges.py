# SPDX-License-Identifier: Apache-2.0
"""How large the numbers at each layer get while the float model draws, kept for whoever needs ranges ahead of time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..ground.records import load_record, save_record

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Ranges:
    """Of one layer over all calls: least and greatest input and output, and how much there is between them.

    Attributes:
        input_power: E[x²] over the columns of the matrix view of its weight, with a convolution's padding.
        quietest_output_power: E[y²] of the item of a batch for which it is least.
    """

    input: tuple[float, float]
    output: tuple[float, float]
    input_power: float
    quietest_output_power: float

    @property
    def largest_output(self) -> float:
        """The largest magnitude it gave."""
        return max(map(abs, self.output))


def save_ranges(path: Path, ranges: Mapping[str, Ranges]) -> None:
    """Writes the ranges by layer as JSON, whole or not at all."""
    layers = {name: asdict(layer) for name, layer in ranges.items()}
    save_record(path, {"schema_version": SCHEMA_VERSION, "layers": layers})


def load_ranges(path: Path) -> dict[str, Ranges]:
    """The ranges saved at `path`; TurbopocketError naming the file when it is missing or holds something else."""
    return load_record(path, "a file of ranges", SCHEMA_VERSION, _layers)


def _layers(values: dict[str, Any], schema_version: int) -> dict[str, Ranges]:
    return {name: _from_json(**entry) for name, entry in values["layers"].items()}


def _from_json(input: list[float], output: list[float], input_power: float, quietest_output_power: float) -> Ranges:
    powers = float(input_power), float(quietest_output_power)
    return Ranges(_pair(input), _pair(output), *powers)


def _pair(values: list[float]) -> tuple[float, float]:
    least, greatest = values
    return float(least), float(greatest)
