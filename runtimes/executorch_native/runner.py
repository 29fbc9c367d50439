# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch without PyTorch: the C++ runner behind the same interface as every runtime."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from ..manifest import Manifest
from ..runner import Arrays, check_inputs, component_spec
from ..served.process import ServedProcess
from .build import native_runner


class ExecutorchNativeRunner:
    """Runs an artifact's programs in a process of the C++ runner, which is started by the first call.

    A component's program is opened on its first run and stays open until `close`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder.absolute()
        self.manifest = manifest
        self._process: ServedProcess | None = None
        self._opened: set[str] = set()

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when program, manifest and inputs disagree."""
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        process = self.process()
        if component not in self._opened:
            process.open(component, self.folder / spec.file)
            self._opened.add(component)
        # Programs know the order of their tensors, not their names.
        ordered = {tensor.name: inputs[tensor.name] for tensor in spec.inputs}
        return process.run(component, ordered, [tensor.name for tensor in spec.outputs])

    def process(self) -> ServedProcess:
        """The process, started if it is not yet."""
        if self._process is None:
            self._process = self.start()
        return self._process

    def start(self) -> ServedProcess:
        """A new process, on this machine."""
        return ServedProcess([str(native_runner()), "serve"], "the ExecuTorch runner")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
