# SPDX-License-Identifier: Apache-2.0
"""What every runtime looks like from outside: named arrays in, named arrays out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from .manifest import Manifest

Arrays = dict[str, NDArray[Any]]


class Runner(Protocol):
    """Runs the components of one model."""

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name. Raises TurbopocketError for unknown components and unfitting inputs."""
        ...


class LayerRunner(Runner, Protocol):
    """A runner that can also show what single layers computed."""

    def run_layers(
        self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str] | None = None
    ) -> Arrays:
        """Outputs of layers by PyTorch module path, in execution order; None asks for all that have a name."""
        ...


def open_runner(folder: Path, manifest: Manifest) -> LayerRunner:
    """The runner for the manifest's target; the target's runtime is imported only now."""
    match manifest.target:
        case "onnx":
            from .onnx import OnnxRunner

            return OnnxRunner(folder, manifest)
