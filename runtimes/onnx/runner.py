# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU, set up to stay small rather than to be fast on the first call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from ...ground.arrays import Arrays, check_names
from ...ground.errors import TurbopocketError
from ...ground.reading import one_sentence
from ..kept import Kept
from ..manifest import ComponentSpec, Manifest, TensorSpec
from ..runner import check_inputs, component_spec
from .bounds import require_bounded
from .session import open_session, run_session

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


class OnnxRunner:
    """Runs an artifact's graphs; a session is opened on the first run of its component, and `Kept`.

    `threads` limits the cores of one call (None: all). `operators` is the library of our operators (see
    `kernels.library`); None runs the bodies that the files bring.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        threads: int | None = None,
        operators: Path | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.operators = operators
        self._sessions = Kept[ort.InferenceSession](folder, manifest)

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when graph, manifest and inputs disagree."""
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        names = [output.name for output in spec.outputs]
        session = self._sessions.get(component, lambda: self._session(component, spec))
        with one_sentence(f"{component}: ONNX Runtime can not run {self.folder / spec.file}"):
            return dict(zip(names, run_session(session, names, inputs), strict=True))

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers that the graph has nodes for, in execution order.

        A layer's nodes are named by its PyTorch module path, alone or followed by "/" and a part of it
        (`to_q`, `to_q/bias`); its output is that of the last of them. Opens a second session for the call.
        """
        spec = component_spec(self.manifest, component)
        check_inputs(component, spec.inputs, inputs)
        path = self.folder / spec.file
        model, values = with_layer_outputs(path, layers)
        if not values:
            return {}
        self._sessions.make_room(component)
        session = self._open(component, model, weights=str(path.parent))
        return dict(zip(values, run_session(session, list(values.values()), inputs), strict=True))

    def _session(self, component: str, spec: ComponentSpec) -> ort.InferenceSession:
        path = self.folder / spec.file
        if not path.is_file():
            raise TurbopocketError(f"{component}: {path} is missing")
        require_bounded(path, component)
        session = self._open(component, str(path))
        _check_tensors(component, "inputs", spec.inputs, session.get_inputs())
        _check_tensors(component, "outputs", spec.outputs, session.get_outputs())
        return session

    def _open(self, component: str, model: str | bytes, weights: str | None = None) -> ort.InferenceSession:
        with one_sentence(f"{component}: ONNX Runtime cannot open the graph"):
            return open_session(model, self.threads, weights, self.operators)


def _check_tensors(component: str, kind: str, specs: Sequence[TensorSpec], found: Sequence[ort.NodeArg]) -> None:
    check_names(component, kind, [spec.name for spec in specs], [argument.name for argument in found])
    by_name = {argument.name: argument for argument in found}
    for spec in specs:
        argument = by_name[spec.name]
        dtype = _DTYPES.get(argument.type, argument.type)
        shape = list(argument.shape)
        if dtype != spec.dtype or not _same_shape(spec.shape, shape):
            raise TurbopocketError(
                f"{component}: the graph's {kind} have {spec.name} as {dtype} {shape}, "
                f"the manifest says {spec.dtype} {spec.shape}"
            )


def _same_shape(expected: Sequence[int | str], found: Sequence[int | str | None]) -> bool:
    """Whether numbers agree and stand in the same places; names of varying dimensions are free."""
    return len(expected) == len(found) and all(
        (a == b) if isinstance(a, int) else not isinstance(b, int) for a, b in zip(expected, found, strict=True)
    )


def with_layer_outputs(path: Path, layers: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """The graph with every found layer's value as an output, and {layer: value name} in execution order.

    Its weights stay where they are, beside the graph in `path`.
    """
    import onnx  # needed for the drill-down only

    model = onnx.load(path, load_external_data=False)
    asked = set(layers)
    last_value: dict[str, str] = {}
    for node in model.graph.node:
        layer = node.name.split("/", 1)[0]
        if layer in asked:
            last_value[layer] = node.output[0]
    outputs = {output.name for output in model.graph.output}
    for value in last_value.values():
        if value not in outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=value))
    return model.SerializeToString(), last_value
