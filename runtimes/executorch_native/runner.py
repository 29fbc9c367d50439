# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch without PyTorch: the C++ runner behind the same interface as every runtime, here or on an emulated CPU."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from ..arm64.cpus import PREFIX, Cpu
from ..arm64.emulator import Emulator
from ..arm64.kernels import kernels_in
from ..executorch_layers import LayerName, with_layer_outputs
from ..manifest import Manifest
from ..runner import Arrays, check_inputs, component_spec
from ..served.process import ServedProcess
from .build import arm64_runner, native_runner


class ExecuTorchNativeRunner:
    """Runs an artifact's programs in a process of the C++ runner, which is started by the first call.

    A component's program is opened on its first run and stays open until `close`. `layers` is `ExecuTorchRunner`'s.
    """

    def __init__(self, folder: Path, manifest: Manifest, layers: Mapping[str, Mapping[str, LayerName]]) -> None:
        self.folder = folder.absolute()
        self.manifest = manifest
        self.layers = layers
        self._process: ServedProcess | None = None
        self._opened: set[str] = set()

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when program, manifest and inputs disagree."""
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        process = self._started()
        if component not in self._opened:
            process.open(component, self.folder / spec.file)
            self._opened.add(component)
        return process.run(component, self._in_order(component, inputs), [output.name for output in spec.outputs])

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers whose weights the runner was told of, in execution order, from a second program."""
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        shown = with_layer_outputs((self.folder / spec.file).read_bytes(), self.layers.get(component, {}))
        process, key = self._started(), f"{component} with layers"
        program = Path(self._scratch.name) / "layers.pte"
        program.write_bytes(shown.program)
        process.open(key, program)
        names = [f"layer {index}" for index in range(len(shown.layers))]
        outputs = [output.name for output in spec.outputs] + names
        found = process.run(key, self._in_order(component, inputs), outputs)
        process.shut(key)
        pairs = zip(shown.layers, names, strict=True)
        return {layer.path: layer.as_pytorch_has_it(found[name]) for layer, name in pairs if layer.path in layers}

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()
            self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _in_order(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The inputs in the program's order: it knows no names."""
        return {tensor.name: inputs[tensor.name] for tensor in component_spec(self.manifest, component).inputs}

    def _started(self) -> ServedProcess:
        if self._process is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="turbopocket-executorch-")
            self._process = self._start()
        return self._process

    def _start(self) -> ServedProcess:
        return ServedProcess([str(native_runner()), "serve"], "the ExecuTorch runner")


class EmulatedExecuTorchRunner(ExecuTorchNativeRunner):
    """The same on an emulated ARM CPU."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        layers: Mapping[str, Mapping[str, LayerName]],
        cpu: Cpu,
        emulator: Emulator,
    ) -> None:
        super().__init__(folder, manifest, layers)
        self.cpu = cpu
        self.emulator = emulator

    def kernels(self) -> dict[str, int]:
        """Instructions of ExecuTorch's libraries that have run so far, by the kind of kernel they belong to."""
        ranges = self._started().about()["kernel_addresses"]
        return kernels_in(self._log, [(int(start), int(end)) for start, end in ranges])

    @property
    def _log(self) -> Path:
        return Path(self._scratch.name) / "instructions.log"

    def _start(self) -> ServedProcess:
        program = arm64_runner(self.emulator)
        command = self.emulator.command(self.cpu, program, "serve", environment={}, log=self._log)
        return ServedProcess(command, f"{PREFIX}{self.cpu.name}", environment={})
