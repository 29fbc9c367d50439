# SPDX-License-Identifier: Apache-2.0
"""How large the numbers at each layer get while the float model draws, kept for whoever needs ranges ahead of time."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..ground.errors import TurbopocketError
from ..ground.files import write_whole
from ..ground.reading import read_json

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
    text = json.dumps({"schema_version": SCHEMA_VERSION, "layers": layers}, indent=1)
    with write_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def load_ranges(path: Path) -> dict[str, Ranges]:
    """The ranges saved at `path`; TurbopocketError naming the file when it is missing or holds something else."""
    try:
        data = read_json(path)
        if data["schema_version"] != SCHEMA_VERSION:
            raise TurbopocketError(f"schema_version {data['schema_version']}, this version reads {SCHEMA_VERSION}")
        return {name: _from_json(**entry) for name, entry in data["layers"].items()}
    except (TurbopocketError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TurbopocketError(f"{path}: not a file of ranges: {error}") from error


def _from_json(input: list[float], output: list[float], input_power: float, quietest_output_power: float) -> Ranges:
    powers = float(input_power), float(quietest_output_power)
    return Ranges(_pair(input), _pair(output), *powers)


def _pair(values: list[float]) -> tuple[float, float]:
    least, greatest = values
    return float(least), float(greatest)
