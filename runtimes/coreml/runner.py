# SPDX-License-Identifier: Apache-2.0
"""A Core ML artifact behind the runners' interface: Apple's runtime on a Mac, our evaluator everywhere else."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import TurbopocketError
from ..manifest import Manifest, TensorSpec
from ..runner import Arrays, check_inputs, component_spec
from .evaluator import Evaluator, Mode
from .interface import CHUNKS, layer_value, loop_outputs, package_file, package_inputs
from .package import coremltools_module
from .program import Program


class Engine(Protocol):
    """Something that runs one package."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The package's own inputs."""
        ...

    def values(self) -> set[str]:
        """Names that `run` can also give."""
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]], also: Sequence[str] = ()) -> Arrays:
        """The outputs by name, and the values named in `also`."""
        ...


class CoreMLRunner:
    """Runs an artifact's packages; a package is opened on the first run of its component.

    `mode` is the evaluator's arithmetic; None asks Apple's runtime, which only a Mac has.
    """

    def __init__(self, folder: Path, manifest: Manifest, mode: Mode | None = "fp32") -> None:
        self.folder, self.manifest, self.mode = folder, manifest, mode
        self._engines: dict[str, list[Engine]] = {}

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when package, manifest and inputs disagree."""
        return self._run(component, inputs, ())[0]

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers that are values of the program, in the order asked for; none from Apple's runtime."""
        known = {name for engine in self._opened(component) for name in engine.values()}
        seen = [layer for layer in layers if layer_value(layer) in known]
        _, found = self._run(component, inputs, [layer_value(layer) for layer in seen])
        return {layer: found[layer_value(layer)] for layer in seen}

    def _run(
        self, component: str, inputs: Mapping[str, NDArray[Any]], also: Sequence[str]
    ) -> tuple[Arrays, dict[str, NDArray[Any]]]:
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        engines = self._opened(component)
        batch = engines[0].inputs[0].shape[0]
        assert isinstance(batch, int)
        count = next(len(value) for value in inputs.values() if value.ndim)
        calls = [_chained(engines, call, also) for call in package_inputs(component, inputs, batch)]
        outputs = loop_outputs(component, [outputs for outputs, _ in calls], count)
        joined = {name: np.concatenate([found[name] for _, found in calls])[:count] for name in also}
        return {tensor.name: outputs[tensor.name] for tensor in spec.outputs}, joined

    def _opened(self, component: str) -> list[Engine]:
        if component not in self._engines:
            paths = [self.folder / package_file(component)]
            if not paths[0].exists():
                chunks = [self.folder / package_file(component, chunk + 1) for chunk in range(CHUNKS)]
                paths = chunks if chunks[0].exists() else paths
            self._engines[component] = [_engine(path, self.mode) for path in paths]
        return self._engines[component]


def has_apples_runtime() -> bool:
    """Whether this is a Mac."""
    return sys.platform == "darwin"


def _engine(path: Path, mode: Mode | None) -> Engine:
    return _Apples(path) if mode is None else _Ours(path, mode)


class _Ours:
    def __init__(self, path: Path, mode: Mode) -> None:
        self._evaluator = Evaluator(Program.open(path), mode)
        self.inputs = self._evaluator.program.inputs

    def values(self) -> set[str]:
        return set(self._evaluator.program.function.types)

    def run(self, inputs: Mapping[str, NDArray[Any]], also: Sequence[str] = ()) -> Arrays:
        return self._evaluator.run(inputs, also)


class _Apples:
    """Apple's runtime, through coremltools; our reader says what the package holds."""

    def __init__(self, path: Path) -> None:
        if not has_apples_runtime():
            raise TurbopocketError(f"{path.name} cannot be run by Core ML: this system is {sys.platform}, not a Mac")
        self.inputs = Program.open(path).inputs
        self._model = coremltools_module("models").MLModel(str(path))

    def values(self) -> set[str]:
        return set()

    def run(self, inputs: Mapping[str, NDArray[Any]], also: Sequence[str] = ()) -> Arrays:
        found: Arrays = self._model.predict(dict(inputs))
        return found


def _chained(engines: Sequence[Engine], inputs: Arrays, also: Sequence[str]) -> tuple[Arrays, Arrays]:
    """The last engine's outputs, each being given what the inputs and all before it hold; and the values of `also`."""
    known, found = dict(inputs), Arrays()
    outputs: Arrays = {}
    for engine in engines:
        here = [name for name in also if name in engine.values()]
        outputs = engine.run({spec.name: known[spec.name] for spec in engine.inputs}, here)
        found |= {name: outputs.pop(name) for name in here if name in outputs}
        known |= outputs
    return outputs, found
