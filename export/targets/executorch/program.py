# SPDX-License-Identifier: Apache-2.0
"""A component as one ExecuTorch program, `<component>.pte`, whose layers XNNPACK runs from the codes as planned.

`trace` runs PyTorch's exporter once; sizes then follow from shapes (`fixed_bytes`, `lowered_bytes`), before any
weight is compressed, and `lower` writes the same bytes every time.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ....ground import names
from ....ground.errors import TurbopocketError
from ....quant.formats import CompressedTensor
from ....quant.layers import materialise, weight_shape
from ....quant.ranges import Ranges
from ....quant.scheme import Scheme
from ....runtimes.executorch.imported import executorch_module
from ....runtimes.executorch.shown_layers import LayerName
from ....runtimes.manifest import ComponentSpec, TensorSpec
from ...families.graphs import Component
from ...target_options import ExecuTorchOptions
from ..layer import (
    NO_SCHEMES,
    Layer,
    kind_of,
    require_equal_shares,
    require_own_weights,
    schemes_of,
    with_references,
)
from .form import DEFAULTS, FormOptions
from .gate import constant_key, refuse_weight_only, require_constants
from .partition import partitioner
from .rewrite import Rewritten
from .size import DATA_FILE_BYTES, OPERATOR_BYTES, PROGRAM_BYTES, constants_bytes
from .stores import STORES, form_of_weight

__all__ = [
    "TracedProgram",
    "as_run",
    "component_spec",
    "fixed_bytes",
    "layers_by_key",
    "lower",
    "lowered_bytes",
    "trace",
]

_DTYPES: dict[torch.dtype, Literal["float32", "int64"]] = {torch.float32: "float32", torch.int64: "int64"}
_LAYER_OPS = ("aten.linear.default", "aten.conv2d.default")


@dataclass(frozen=True)
class TracedProgram:
    """A component that was exported once: its layers by full name, the bytes of its other tensors, its operators.

    `asked` and `ranges` are those of `FormOptions`; without ranges, before calibration, static layers are counted but
    can not be lowered.
    """

    source: Component
    layers: dict[str, Layer]
    rest_bytes: tuple[int, ...]
    operators: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    asked: ExecuTorchOptions
    ranges: Mapping[str, Ranges] = field(default_factory=dict)

    @property
    def component(self) -> str:
        return self.source.name

    @property
    def options(self) -> FormOptions:
        """What its layers have in common, for one program."""
        return FormOptions(self.asked, self.ranges)


def trace(component: Component, asked: ExecuTorchOptions = DEFAULTS) -> TracedProgram:
    """Runs PyTorch's exporter once, for one item a call. Layer weights are not looked at.

    `asked` is for the programs that will be written.

    Raises TurbopocketError when ExecuTorch is missing, when two layers share one weight, or when a layer's weight is
    used by anything but its layer, or when PyTorch can not export the component.
    """
    executorch_module("exir")
    require_own_weights(component)
    program = _exported(component.without_weights())
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = {node.name: node for node in program.graph.nodes}
    used = {name: nodes[node] for node, name in held.items() if nodes[node].users}
    tensors = dict(component.module.named_parameters(remove_duplicate=False)) | dict(component.module.named_buffers())
    layers = _layers(component, used)
    weights = {f"{name}.weight" for name in layers}
    rest = [tensors[name] for name in used if name not in weights]
    return TracedProgram(
        source=component,
        layers=layers,
        rest_bytes=tuple(tensor.numel() * tensor.element_size() for tensor in rest),
        operators=sum(node.op == "call_function" for node in nodes.values()),
        inputs=tuple(_spec(name, tensor) for name, tensor in _example_item(component).items()),
        outputs=_outputs(component, program),
        asked=asked,
    )


def lower(
    traced: TracedProgram,
    weights: Mapping[str, CompressedTensor],
    folder: Path,
    schemes: Mapping[str, Scheme] = NO_SCHEMES,
) -> ComponentSpec:
    """Writes `<component>.pte` under `folder`, and returns what a manifest says of it.

    Its constants are inside, or in `<component>.ptd` beside it. `schemes` are as `Target.lower` has them.

    Raises TurbopocketError when `weights` are not exactly the traced layers', a program can not store one of them, what
    layers share is not equal, ExecuTorch fails on the way, or the finished program does not hold one as it is.
    """
    forms = STORES.forms_of(traced.layers, schemes_of(weights, schemes), traced.options)
    require_equal_shares(weights)
    references = with_references(traced.source, forms, weights)
    materialise(references.module)  # ExecuTorch's exporter reads all constants
    program = _exported(references)
    refuse_weight_only(program)
    spec = component_spec(traced)
    with _by_executorch(traced.component):
        _write(program, folder, spec)
    require_constants(folder / (spec.data or spec.file), weights)
    return spec


def layers_by_key(weights: Mapping[str, CompressedTensor]) -> dict[str, dict[str, LayerName]]:
    """Each component's layers by the name that XNNPACK has for the weight; layers that it does not run have none."""
    found: dict[str, dict[str, LayerName]] = {}
    for name, weight in weights.items():
        form = form_of_weight(name, weight)
        layers = found.setdefault(names.LayerName.parse(name).component, {})
        layers[constant_key(form.arrays(weight)[0])] = LayerName(form.layer.path, form.runs_as_linear)
    return found


def as_run(
    component: Component,
    weights: Mapping[str, CompressedTensor],
    options: FormOptions,
    schemes: Mapping[str, Scheme] = NO_SCHEMES,
) -> Component:
    """The component as the runtime is to compute it, in PyTorch; it shares all tensors but the layers' weights."""
    own = {name: weight for name, weight in weights.items() if name.startswith(component.layer_prefix)}
    layers = {name: Layer(name, kind_of(weight.shape), weight.shape) for name, weight in own.items()}
    return with_references(component, STORES.forms_of(layers, schemes_of(own, schemes), options), own)


def component_spec(traced: TracedProgram) -> ComponentSpec:
    """What a manifest says of the component: its files, and the tensors that go in and come out."""
    return ComponentSpec(
        file=f"{traced.component}.pte",
        data=f"{traced.component}.ptd" if traced.asked.weights_apart else None,
        inputs=list(traced.inputs),
        outputs=list(traced.outputs),
    )


def fixed_bytes(traced: TracedProgram, candidates: Mapping[str, Iterable[Scheme]]) -> int:
    """Bytes of the files beside the layers' `nbytes`, at most, when every layer gets one of its candidates.

    Codebooks that all layers of a component share are counted by `lowered_bytes` alone, which knows whether any does.
    """
    layers = traced.layers.items()
    return _base_bytes(traced) + sum(form_bytes(layer, candidates[name], traced.options) for name, layer in layers)


def form_bytes(layer: Layer, schemes: Iterable[Scheme], options: FormOptions) -> int:
    """Bytes of the layer beside its `nbytes`, in the wordiest of these schemes that it can be stored in."""
    forms = STORES.storable_forms(layer, schemes, options)
    return max((form.own_bytes() - int(form.format.nbytes(layer.shape)) for form in forms), default=0)


def lowered_bytes(traced: TracedProgram, schemes: Mapping[str, Scheme]) -> int:
    """Bytes of the files that `lower` would write for layers in these schemes, at most."""
    forms = STORES.forms_of(traced.layers, schemes, traced.options).values()
    shared = {form.format: form.shared_bytes() for form in forms}
    return _base_bytes(traced) + sum(form.own_bytes() for form in forms) + sum(shared.values())


def _base_bytes(traced: TracedProgram) -> int:
    """Of all that is no layer."""
    data_file = DATA_FILE_BYTES if traced.asked.weights_apart else 0
    return PROGRAM_BYTES + OPERATOR_BYTES * traced.operators + constants_bytes(traced.rest_bytes) + data_file


def _exported(component: Component) -> torch.export.ExportedProgram:
    inputs = tuple(_example_item(component).values())
    with warnings.catch_warnings(), torch.no_grad(), Rewritten(), _by_executorch(component.name):
        warnings.simplefilter("ignore")
        return torch.export.export(component.module.eval(), inputs, strict=False)


@contextmanager
def _by_executorch(component: str) -> Iterator[None]:
    """Whatever PyTorch's exporter or ExecuTorch raises in the block becomes one TurbopocketError."""
    try:
        yield
    except Exception as error:  # they have no common base
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TurbopocketError(f"{component}: ExecuTorch can not lower it: {first_line}") from error


def _example_item(component: Component) -> dict[str, Tensor]:
    """The example inputs of one item, by name."""
    return {name: tensor[:1] if tensor.ndim else tensor for name, tensor in component.example_inputs.items()}


def _write(program: torch.export.ExportedProgram, folder: Path, spec: ComponentSpec) -> None:
    exir = executorch_module("exir")
    apart = Path(spec.data).stem if spec.data else None
    if apart:
        for node in program.graph.nodes:
            if node.op == "placeholder":  # XNNPACK reads from here where its constants go
                node.meta.setdefault("custom", {})["delegate_constant_tag"] = apart
    config = exir.ExecutorchBackendConfig(external_constants=(lambda node: apart) if apart else False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = exir.to_edge_transform_and_lower(program, partitioner=[partitioner()])
        executable = edge.to_executorch(config)
    with (folder / spec.file).open("wb") as file:
        executable.write_to_file(file)
    if apart:
        executable.write_tensor_data_to_file(str(folder))


def _layers(component: Component, used: Mapping[str, torch.fx.Node]) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for path, module in component.module.model.named_modules():
        name = f"{component.layer_prefix}{path}"
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if f"{name}.weight" not in used:
            continue
        others = {str(user.target) for user in used[f"{name}.weight"].users} - set(_LAYER_OPS)
        if others:
            raise TurbopocketError(f"{name}: its weight is also read by {min(others)}, which can not be compressed")
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and _moves(module):
            raise TurbopocketError(f"{name}: a 1x1 Conv2d with strides or padding is not supported for ExecuTorch")
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise TurbopocketError(
                f"{name}: a Conv2d of {module.groups} groups is not supported for ExecuTorch, only of 1"
            )
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            raise TurbopocketError(f"{name}: a Conv2d that pads {module.padding_mode} is not supported for ExecuTorch")
        shape = weight_shape(name, module)
        layers[name] = Layer(name, kind_of(shape), shape)
    return layers


def _moves(conv: nn.Conv2d) -> bool:
    return conv.stride != (1, 1) or conv.padding != (0, 0)


def _outputs(component: Component, program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    values = next(iter(reversed(program.graph.nodes))).args[0]
    return tuple(_spec(name, node.meta["val"]) for name, node in zip(component.output_names, values, strict=True))


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=_DTYPES[tensor.dtype], shape=[int(size) for size in tensor.shape])
