# SPDX-License-Identifier: Apache-2.0
"""What every runtime looks like from outside: named arrays in, named arrays out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ..ground.errors import TurbopocketError
from .manifest import ComponentSpec, Manifest, TensorSpec

Arrays = dict[str, NDArray[Any]]


class Runner(Protocol):
    """Runs the components of one model."""

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name. Raises TurbopocketError for unknown components or unfit inputs."""
        ...


class LayerRunner(Runner, Protocol):
    """A runner that can also show what single layers computed."""

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of layers by PyTorch module path, in execution order; layers it cannot see are left out."""
        ...


def open_runner(folder: Path, manifest: Manifest) -> LayerRunner:
    """The runner for the manifest's target, our kernels included where built; the runtime is imported only now."""
    match manifest.target:
        case "onnx":
            from .kernels.library import onnx_operators
            from .onnx.runner import OnnxRunner

            return OnnxRunner(folder, manifest, operators=onnx_operators())
        case "coreml":
            from .coreml.apple import on_a_mac
            from .coreml.runner import CoreMLRunner

            return CoreMLRunner(folder, manifest, None if on_a_mac() else "fp32")
        case "executorch":
            from .executorch.runner import ExecuTorchRunner

            return ExecuTorchRunner(folder, manifest)


def component_spec(manifest: Manifest, component: str) -> ComponentSpec:
    """The spec of a component. Raises TurbopocketError listing the components when there is no such one."""
    try:
        return manifest.components[component]
    except KeyError:
        known = ", ".join(manifest.components)
        raise TurbopocketError(f"{manifest.name} has no component {component!r}: it has {known}") from None


def check_inputs(component: str, specs: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Returns when `inputs` are exactly the specified tensors; a named dimension has one size in all of them.

    Raises TurbopocketError naming the component and the first tensor that does not fit.
    """
    check_names(component, "inputs", [spec.name for spec in specs], list(inputs))
    sizes: dict[str, int] = {}
    for spec in specs:
        found = inputs[spec.name]
        expected = f"{component}: input {spec.name} must be {spec.dtype} {spec.shape}"
        if found.dtype.name != spec.dtype or found.ndim != len(spec.shape):
            raise TurbopocketError(f"{expected}, found {found.dtype.name} {list(found.shape)}")
        for dimension, size in zip(spec.shape, found.shape, strict=True):
            wanted = sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
            if size != wanted:
                raise TurbopocketError(f"{expected}, found {list(found.shape)}: {dimension} is {wanted}, not {size}")


def check_names(component: str, kind: str, expected: Sequence[str], found: Sequence[str]) -> None:
    """Returns when both hold the same names in any order; TurbopocketError names the difference."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise TurbopocketError(f"{component}: {kind} are {'; '.join(parts)}; expected {', '.join(expected)}")
