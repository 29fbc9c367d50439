# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch without PyTorch: the C++ runner behind the same interface as every runtime, here or on an emulated CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ....ground.arrays import Arrays
from ...arm64.cpus import PREFIX, Cpu
from ...arm64.emulator import Emulator
from ...arm64.kernels import kernels_in
from ...manifest import ComponentSpec, Manifest
from ...runner import component_spec
from ...served.runner import ServedRunner
from ..file import data_file
from ..shown_layers import LayerName, with_layer_outputs
from .build import arm64_runner, native_runner


class ExecuTorchNativeRunner(ServedRunner):
    """Runs an artifact's programs in a process of the C++ runner; `layers` is `ExecuTorchRunner`'s."""

    def __init__(self, folder: Path, manifest: Manifest, layers: Mapping[str, Mapping[str, LayerName]]) -> None:
        super().__init__(folder, manifest)
        self.layers = layers

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers whose weights the runner was told of, in execution order, from a second program."""
        spec = component_spec(self.manifest, component)
        given = self._in_order(component, inputs)
        shown = with_layer_outputs((self.folder / spec.file).read_bytes(), self.layers.get(component, {}))
        process, key = self._started(), f"{component} with layers"
        program = self.scratch / "layers.pte"
        program.write_bytes(shown.program)
        process.open(key, program, self._weights(spec))
        names = [f"layer {index}" for index in range(len(shown.layers))]
        outputs = [output.name for output in spec.outputs] + names
        found = process.run(key, given, outputs)
        process.shut(key)
        pairs = zip(shown.layers, names, strict=True)
        return {layer.path: layer.as_pytorch_has_it(found[name]) for layer, name in pairs if layer.path in layers}

    def _weights(self, spec: ComponentSpec) -> str:
        return str(data_file(self.folder, spec) or "")

    def _command(self) -> tuple[list[str], str, Mapping[str, str] | None]:
        return [str(native_runner()), "serve"], "the ExecuTorch runner", None


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
        return self.scratch / "instructions.log"

    def _command(self) -> tuple[list[str], str, Mapping[str, str] | None]:
        program = arm64_runner(self.emulator)
        command = self.emulator.command(self.cpu, program, "serve", environment={}, log=self._log)
        return command, f"{PREFIX}{self.cpu.name}", {}
