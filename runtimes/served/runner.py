# SPDX-License-Identifier: Apache-2.0
"""A runner whose components run in a process of its own, started when it is first needed."""

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..kept import Kept
from ..manifest import ComponentSpec, Manifest
from ..runner import check_inputs, component_spec, one_by_one
from .process import ServedProcess


class ServedRunner(ABC):
    """Runs an artifact's components in one process, which the first call starts and which lives until `close`.

    A component is opened there on its first run, and `Kept`. `scratch` is a folder that lives as long as the process.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder.absolute()
        self.manifest = manifest
        self._process: ServedProcess | None = None
        # knows the process and not this, so that the end of the last reference to this ends the process
        self._opened = Kept[ServedProcess](self.folder, manifest, lambda component, process: process.shut(component))
        self._end: Callable[[], object] = _nothing

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when model, manifest and inputs disagree.

        Several items are given one after the other to a model that takes one.
        """
        spec = component_spec(self.manifest, component)
        calls = [self._in_order(component, call) for call in one_by_one(spec.inputs, inputs)]
        process, names = self._started(), [output.name for output in spec.outputs]
        self._opened.get(component, lambda: self._in_process(component, spec))
        found = [process.run(component, call, names) for call in calls]
        return found[0] if len(found) == 1 else {n: np.concatenate([each[n] for each in found]) for n in names}

    def close(self) -> None:
        """Ends the process, as does the end of the last reference to this."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def scratch(self) -> Path:
        return Path(self._scratch.name)

    def _in_order(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The inputs in the manifest's order, for programs without names. TurbopocketError when they do not fit."""
        specs = component_spec(self.manifest, component).inputs
        check_inputs(component, specs, inputs)
        return {tensor.name: inputs[tensor.name] for tensor in specs}

    def _started(self) -> ServedProcess:
        if self._process is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="turbopocket-")
            command, label, environment = self._command()
            try:
                self._process = ServedProcess(command, label, environment)
            except OSError as error:
                self._scratch.cleanup()
                raise TurbopocketError(f"{command[0]} can not be started: {error.strerror}") from error
            self._end = weakref.finalize(self, _end, self._process, self._scratch)
        return self._process

    def _open(self, component: str, spec: ComponentSpec) -> Arrays:
        """Opens a component in the process; what that says of it."""
        return self._started().open(component, self.folder / spec.file, self._weights(spec))

    def _in_process(self, component: str, spec: ComponentSpec) -> ServedProcess:
        self._open(component, spec)
        return self._started()

    def _weights(self, spec: ComponentSpec) -> str:
        """The file or folder of a component's weights, if the process is to be told; "" by default."""
        return ""

    @abstractmethod
    def _command(self) -> tuple[list[str], str, Mapping[str, str] | None]:
        """What starts the process, what errors call it, and its environment (None: this process's)."""


def _end(process: ServedProcess, scratch: "tempfile.TemporaryDirectory[str]") -> None:
    process.close()
    scratch.cleanup()


def _nothing() -> None:
    """What there is to end before a process was started."""
