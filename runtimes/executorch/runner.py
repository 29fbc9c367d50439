# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch on the CPU, through its Python bindings, which bring PyTorch's tensors along; programs are mapped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..kernels.library import executorch_operators
from ..manifest import ComponentSpec, Manifest, TensorSpec
from ..runner import check_inputs, component_spec, one_by_one
from .file import Layout, data_file, read_layout
from .imported import executorch_module
from .shown_layers import LayerName, Shown, with_layer_outputs

METHOD = "forward"
OPERATORS = b"turbopocket::"
"""What the names of our operators begin with in a program's table."""
_DTYPES = {6: "float32", 4: "int64", 3: "int32", 11: "bool", 1: "int8", 0: "uint8", 5: "float16"}
"""PyTorch's numbers for types of scalars, as programs have them."""


class ExecuTorchRunner:
    """Runs an artifact's programs; a program is opened on the first run of its component.

    `layers` tells `run_layers` which layer of a component has which weight, by the SHA-256 of its bytes as lowered.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, layers: Mapping[str, Mapping[str, LayerName]] | None = None
    ) -> None:
        self.folder, self.manifest, self.layers = folder, manifest, layers or {}
        self._methods: dict[str, Any] = {}
        self._shown: dict[str, tuple[Shown, Any]] = {}

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's outputs by name; TurbopocketError when program, manifest and inputs disagree.

        Programs take one item; several are given one after the other.
        """
        spec = component_spec(self.manifest, component)
        method, found = self._method(component, spec), []
        for call in one_by_one(spec.inputs, inputs):
            check_inputs(component, spec.inputs, call)
            found.append(self._execute(component, method, call))
        joined = found[0] if len(found) == 1 else [np.concatenate(values) for values in zip(*found, strict=True)]
        return dict(zip((tensor.name for tensor in spec.outputs), joined, strict=True))

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        """Outputs of the layers whose weights the runner was told of, in execution order, from a second program.

        Of several layers of equal weights only one is shown.
        """
        shown, method = self._with_layers(component)
        found = self._execute(component, method, inputs)
        outputs = zip(shown.layers, found[len(found) - len(shown.layers) :], strict=True)
        return {layer.path: layer.as_pytorch_has_it(value) for layer, value in outputs if layer.path in layers}

    def _with_layers(self, component: str) -> tuple[Shown, Any]:
        """The second program, whose bytes must outlive the method, and the method; made once."""
        if component not in self._shown:
            spec = component_spec(self.manifest, component)
            path = self.folder / spec.file
            _load_operators(component, read_layout(path))
            shown = with_layer_outputs(path.read_bytes(), self.layers.get(component, {}))
            data = data_file(self.folder, spec)
            program = executorch_module("runtime").Runtime.get().load_program(shown.program, data_path=data)
            self._shown[component] = shown, program.load_method(METHOD)
        return self._shown[component]

    def _execute(self, component: str, method: Any, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        import torch

        spec = component_spec(self.manifest, component)
        given = [torch.from_numpy(np.asarray(inputs[tensor.name], order="C")) for tensor in spec.inputs]
        try:
            return [value.numpy().copy() for value in method.execute(given)]
        except RuntimeError as error:
            raise TurbopocketError(f"{component}: ExecuTorch can not run {spec.file}: {error}") from error

    def _method(self, component: str, spec: ComponentSpec) -> Any:
        if component not in self._methods:
            path = self.folder / spec.file
            _load_operators(component, read_layout(path))
            runtime = executorch_module("runtime").Runtime.get()
            data = data_file(self.folder, spec)
            try:
                program = runtime.load_program(path, data_path=data)
                method = program.load_method(METHOD)
            except (RuntimeError, KeyError) as error:
                raise TurbopocketError(f"{component}: ExecuTorch can not open {path}: {error}") from error
            meta = method.metadata
            _require_tensors(component, "inputs", spec.inputs, meta.num_inputs(), meta.input_tensor_meta)
            _require_tensors(component, "outputs", spec.outputs, meta.num_outputs(), meta.output_tensor_meta)
            self._methods[component] = method
        return self._methods[component]


def _load_operators(component: str, layout: Layout) -> None:
    """Our operators, if the program names any. TurbopocketError where they were not built or can not be loaded."""
    if OPERATORS not in layout.program:
        return
    library = executorch_operators()
    if library is None:
        raise TurbopocketError(
            f"{component}: the program needs codebook kernels, which are not built here",
            hint="make kernels; or build with target.executorch.codebooks = 'portable'",
        )
    import torch

    executorch_module("runtime").Runtime.get()  # brings the libraries that the operators register with
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise TurbopocketError(
            f"{library} can not be loaded: {error}", hint="make kernels, with this ExecuTorch installed"
        ) from error


def _require_tensors(component: str, kind: str, specs: Sequence[TensorSpec], count: int, meta_of: Any) -> None:
    if count != len(specs):
        raise TurbopocketError(f"{component}: the program has {count} {kind}, the manifest says {len(specs)}")
    for index, spec in enumerate(specs):
        meta = meta_of(index)
        dtype, shape = _DTYPES.get(meta.dtype(), f"type {meta.dtype()}"), list(meta.sizes())
        if dtype != spec.dtype or shape != spec.shape:
            raise TurbopocketError(
                f"{component}: the program's {kind} have {spec.name} as {dtype} {shape}, "
                f"the manifest says {spec.dtype} {spec.shape}"
            )
