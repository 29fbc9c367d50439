# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime for ARM, on an emulated CPU, behind the same interface as every runtime."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from ..errors import TurbopocketError
from ..manifest import Manifest
from ..onnx import with_layer_outputs
from ..runner import Arrays, check_inputs, component_spec
from ..served.process import ServedProcess
from .cpus import PREFIX, Cpu
from .emulator import Emulator
from .kernels import kernels_in

_RUNTIMES = Path(__file__).parents[1]


class EmulatedOnnxRunner:
    """Runs an artifact's graphs in one emulated process, which is started by the first call and lives until `close`.

    Sessions are those of `OnnxRunner` with one thread; a component's is opened on its first run. Errors of the emulated
    side are TurbopocketErrors that name the CPU.
    """

    def __init__(self, folder: Path, manifest: Manifest, cpu: Cpu, emulator: Emulator) -> None:
        self.folder = folder.absolute()
        self.manifest = manifest
        self.cpu = cpu
        self.emulator = emulator
        self._process: ServedProcess | None = None
        self._opened: set[str] = set()

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when graph, manifest and inputs disagree."""
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        process = self._started()
        if component not in self._opened:
            process.open(component, self.folder / spec.file)
            self._opened.add(component)
        return process.run(component, inputs, [output.name for output in spec.outputs])

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers that the graph has nodes for, in execution order; opens a second session for it."""
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        path = self.folder / spec.file
        model, values = with_layer_outputs(path, layers)
        if not values:
            return {}
        process, key = self._started(), f"{component} with layers"
        graph = Path(self._scratch.name) / "layers.onnx"
        graph.write_bytes(model)
        process.open(key, graph, str(path.parent))
        found = process.run(key, inputs, list(values.values()))
        process.shut(key)
        return {layer: found[value] for layer, value in values.items()}

    def kernels(self) -> dict[str, int]:
        """Instructions of ONNX Runtime that have run so far, by the kind of kernel they belong to (see `kernels`)."""
        ranges = self._started().about()["kernel_addresses"]
        return kernels_in(self._log, [(int(start), int(end)) for start, end in ranges])

    def close(self) -> None:
        """Ends the emulated process."""
        if self._process is not None:
            self._process.close()
            self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def _log(self) -> Path:
        return Path(self._scratch.name) / "instructions.log"

    def _started(self) -> ServedProcess:
        if self._process is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="turbopocket-arm64-")
            # The ARM Python finds our package by a link, so that it sees nothing of this machine's packages.
            package = Path(self._scratch.name) / "turbopocket"
            package.mkdir()
            (package / "runtimes").symlink_to(_RUNTIMES)
            command = self.emulator.command(
                self.cpu,
                self.emulator.python,
                "-m",
                "turbopocket.runtimes.arm64.serve",
                environment={
                    "PYTHONPATH": f"{self._scratch.name}:{self.emulator.site}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                log=self._log,
            )
            try:
                self._process = ServedProcess(command, f"{PREFIX}{self.cpu.name}", environment={})
            except OSError as error:
                raise TurbopocketError(f"{command[0]} can not be started: {error.strerror}") from error
        return self._process
