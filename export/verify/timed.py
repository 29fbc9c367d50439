# SPDX-License-Identifier: Apache-2.0
"""How long a runtime's calls take here, measured while they are made anyway."""

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...runtimes.runner import LayerRunner


class TimedRunner:
    """A runner, and the seconds of each of its calls by component; the first call of a component opens it as well."""

    def __init__(self, runner: LayerRunner) -> None:
        self._runner = runner
        self._seconds: dict[str, list[float]] = {}

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The runner's outputs."""
        start = time.monotonic()
        outputs = self._runner.run(component, inputs)
        self._seconds.setdefault(component, []).append(time.monotonic() - start)
        return outputs

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """The runner's own; not timed."""
        return self._runner.run_layers(component, inputs, layers)

    def call_seconds(self) -> dict[str, float]:
        """Returns the median of each component's calls but the first; none of a component that was called once."""
        return {name: statistics.median(each[1:]) for name, each in self._seconds.items() if len(each) > 1}


def machine_name() -> str:
    """Returns the processor's name, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
