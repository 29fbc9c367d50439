# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch without PyTorch: the C++ runner behind the same interface as every runtime, here or on an emulated CPU."""

from collections.abc import Mapping
from pathlib import Path

from ...arm64.cpus import PREFIX, Cpu
from ...arm64.emulator import Emulator
from ...arm64.kernels import kernels_in
from ...manifest import Manifest
from ..runner import ProgramRunner
from ..shown_layers import LayerName
from .build import arm64_runner, native_runner


class ExecuTorchNativeRunner(ProgramRunner):
    """Runs an artifact's programs in a process of the C++ runner."""

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
