# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime for ARM, on an emulated CPU, behind the same interface as every runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ..arm64.cpus import PREFIX, Cpu
from ..arm64.emulator import Emulator
from ..arm64.kernels import kernels_in
from ..manifest import Manifest
from ..runner import component_spec
from ..served.runner import ServedRunner
from .runner import with_layer_outputs

_HOUSE = Path(__file__).parents[2]


class EmulatedOnnxRunner(ServedRunner):
    """Runs an artifact's graphs in one emulated process.

    Sessions are those of `OnnxRunner` with one thread. Errors of the emulated side are TurbopocketErrors that name the
    CPU.
    """

    def __init__(self, folder: Path, manifest: Manifest, cpu: Cpu, emulator: Emulator) -> None:
        super().__init__(folder, manifest)
        self.cpu = cpu
        self.emulator = emulator

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers that the graph has nodes for, in execution order; opens a second session for it."""
        given = self._in_order(component, inputs)
        path = self.folder / component_spec(self.manifest, component).file
        model, values = with_layer_outputs(path, layers)
        if not values:
            return {}
        process, key = self._started(), f"{component} with layers"
        graph = self.scratch / "layers.onnx"
        graph.write_bytes(model)
        process.open(key, graph, str(path.parent))
        found = process.run(key, given, list(values.values()))
        process.shut(key)
        return {layer: found[value] for layer, value in values.items()}

    def kernels(self) -> dict[str, int]:
        """Instructions of ONNX Runtime that have run so far, by the kind of kernel they belong to (see `kernels`)."""
        ranges = self._started().about()["kernel_addresses"]
        return kernels_in(self._log, [(int(start), int(end)) for start, end in ranges])

    @property
    def _log(self) -> Path:
        return self.scratch / "instructions.log"

    def _command(self) -> tuple[list[str], str, Mapping[str, str] | None]:
        # The ARM Python finds our package by a link, so that it sees nothing of this machine's packages.
        package = self.scratch / "turbopocket"
        package.mkdir()
        for folder in ("ground", "runtimes"):
            (package / folder).symlink_to(_HOUSE / folder)
        command = self.emulator.command(
            self.cpu,
            self.emulator.python,
            "-m",
            "turbopocket.runtimes.onnx.serve",
            environment={"PYTHONPATH": f"{self.scratch}:{self.emulator.site}", "PYTHONDONTWRITEBYTECODE": "1"},
            log=self._log,
        )
        return command, f"{PREFIX}{self.cpu.name}", {}
