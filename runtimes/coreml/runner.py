# SPDX-License-Identifier: Apache-2.0
"""A Core ML artifact behind the runners' interface: Apple's runtime on a Mac, our evaluator everywhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ..kept import Kept
from ..limits import within_memory
from ..manifest import Manifest
from ..runner import check_inputs, component_spec
from .apple import AppleEngine
from .chain import Engine, run_chain
from .evaluate.evaluator import Evaluator, Mode
from .file.program import Program
from .interface import item_count, layer_value, loop_outputs, package_inputs


class CoreMLRunner:
    """Runs an artifact's packages; a package is opened on the first run of its component, and `Kept`.

    `mode` is the evaluator's arithmetic; None asks Apple's runtime, which only a Mac has.
    """

    def __init__(self, folder: Path, manifest: Manifest, mode: Mode | None = "fp32") -> None:
        self.folder, self.manifest, self.mode = folder, manifest, mode
        self._engines = Kept[list[Engine]](folder, manifest)

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when package, manifest and inputs disagree."""
        return self._run(component, inputs, ())[0]

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers that are values of the program, in the order asked for; none from Apple's runtime."""
        known = {name for engine in self._opened(component) for name in engine.values}
        seen = [layer for layer in layers if layer_value(layer) in known]
        _, found = self._run(component, inputs, [layer_value(layer) for layer in seen])
        return {layer: found[layer_value(layer)] for layer in seen}

    def _run(self, component: str, inputs: Mapping[str, NDArray[Any]], also: Sequence[str]) -> tuple[Arrays, Arrays]:
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.loop_inputs, inputs)
        with within_memory():
            engines, count = self._opened(component), item_count(spec, inputs)
            calls = [run_chain(engines, call, also) for call in package_inputs(spec, inputs)]
        outputs = loop_outputs(spec, [outputs for outputs, _ in calls], count)
        joined = {name: np.concatenate([found[name] for _, found in calls])[:count] for name in also}
        return outputs, joined

    def _opened(self, component: str) -> list[Engine]:
        packages = component_spec(self.manifest, component).packages
        return self._engines.get(component, lambda: [_engine(self.folder / package, self.mode) for package in packages])


def _engine(path: Path, mode: Mode | None) -> Engine:
    return AppleEngine(path) if mode is None else Evaluator(Program.open(path), mode)
