# SPDX-License-Identifier: Apache-2.0
"""A component as one ExecuTorch program, `<component>.pte`, whose layers XNNPACK runs from the codes as planned.

`trace` runs PyTorch's exporter once; sizes then follow from shapes (`fixed_bytes`, `lowered_bytes`), before any
weight is compressed, and `lower` writes the same bytes every time.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...quant.formats import CompressedTensor, LayerFormat, parse_format
from ...quant.ranges import Ranges
from ...runtimes.errors import TurbopocketError
from ...runtimes.executorch_import import executorch_module
from ...runtimes.executorch_layers import LayerName
from ...runtimes.manifest import ComponentSpec, TensorSpec
from ..graph import Component
from .executorch_gate import constant_key, refuse_weight_only, require_constants
from .executorch_layers import Static, is_pointwise, layer_as_run
from .executorch_partition import partitioner
from .executorch_rewrite import Rewritten
from .executorch_size import DATA_FILE_BYTES, LayerCounts, constants_bytes, graph_bytes
from .executorch_stores import Kind, constant_bytes, constants_of, may_be_static, runs_rounded_as_convolution, storable

__all__ = [
    "TracedProgram",
    "as_run",
    "component_spec",
    "fixed_bytes",
    "layers_by_key",
    "lower",
    "lowered_bytes",
    "static_layers",
    "storable",
    "trace",
]

_DTYPES: dict[torch.dtype, Literal["float32", "int64"]] = {torch.float32: "float32", torch.int64: "int64"}
_LAYER_OPS = ("aten.linear.default", "aten.conv2d.default")
WORDIEST = tuple(map(parse_format, ("int8-row", "int4-row", "int4-g32", "fp32")))
"""Formats of which one takes the most bytes beside its own for any layer: sizes counted with these hold for all."""


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d of the component; `name` is its path with the component's name in front."""

    name: str
    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TracedProgram:
    """A component that was exported once: its layers by full name, the bytes of its other tensors, its operators.

    `static` has the layers whose activations are rounded in steps known ahead, where their weight has 8 bits; None
    until calibration has chosen them. `weights_apart`: constants go into a file of their own.
    """

    source: Component
    layers: dict[str, Layer]
    rest_bytes: tuple[int, ...]
    operators: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    static: Mapping[str, Static | None]
    weights_apart: bool

    @property
    def component(self) -> str:
        return self.source.name


def trace(component: Component, static: bool = False, weights_apart: bool = False) -> TracedProgram:
    """Runs PyTorch's exporter once, for one item a call. Layer weights are not looked at.

    With `static`, every layer counts as one of static steps until `static_layers` says which are; `weights_apart` is
    for the programs that will be written.

    Raises TurbopocketError when ExecuTorch is missing, when two layers share one weight, or when a layer's weight is
    used by anything but its layer, or when PyTorch can not export the component.
    """
    executorch_module("exir")
    program = _exported(component)
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
        static=dict.fromkeys(layers) if static else {},
        weights_apart=weights_apart,
    )


def lower(traced: TracedProgram, weights: Mapping[str, CompressedTensor], folder: Path) -> ComponentSpec:
    """Writes `<component>.pte` under `folder`, and returns what a manifest says of it.

    Its constants are inside, or in `<component>.ptd` beside it.

    Raises TurbopocketError when `weights` are not exactly the traced layers', XNNPACK can not store one of them,
    ExecuTorch fails on the way, or the finished program does not hold one as it is.
    """
    _require_formats(traced, {name: weight.format for name, weight in weights.items()})
    program = _exported(as_run(traced.source, weights, traced.static))
    refuse_weight_only(program)
    spec = component_spec(traced)
    with _by_executorch(traced.component):
        _write(program, folder, spec)
    require_constants(folder / (spec.data or spec.file), weights)
    return spec


def layers_by_key(weights: Mapping[str, CompressedTensor]) -> dict[str, dict[str, LayerName]]:
    """Each component's layers by the name that a program has for the weight."""
    found: dict[str, dict[str, LayerName]] = {}
    for name, weight in weights.items():
        component, path = name.split(".", 1)
        found.setdefault(component, {})[constant_key(constants_of(weight)[0])] = LayerName(path, is_pointwise(weight))
    return found


def static_layers(ranges: Mapping[str, Ranges]) -> dict[str, Static | None]:
    """The layers, by full name, that round their activations in steps known ahead, given what they saw."""
    return {name: Static.of(layer) for name, layer in ranges.items() if Static.of(layer) is not None}


def as_run(
    component: Component, weights: Mapping[str, CompressedTensor], static: Mapping[str, Static | None]
) -> Component:
    """The component as the runtime is to compute it, in PyTorch; it shares all tensors but the layers' weights."""
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*component.module.parameters(), *component.module.buffers())
    }
    module = copy.deepcopy(component.module, shared)
    model: nn.Module = module.model
    for name, weight in weights.items():
        if name.startswith(component.layer_prefix):
            path = name.removeprefix(component.layer_prefix)
            model.set_submodule(path, layer_as_run(name, model.get_submodule(path), weight, static.get(name)))
    return replace(component, module=module)


def component_spec(traced: TracedProgram) -> ComponentSpec:
    """What a manifest says of the component: its files, and the tensors that go in and come out."""
    return ComponentSpec(
        file=f"{traced.component}.pte",
        data=f"{traced.component}.ptd" if traced.weights_apart else None,
        inputs=list(traced.inputs),
        outputs=list(traced.outputs),
    )


def fixed_bytes(traced: TracedProgram) -> int:
    """Bytes of the file beside the layers' `nbytes`, at most, whatever formats they get."""
    int8 = parse_format("int8-row")
    return (
        _graph_bytes(traced, dict.fromkeys(traced.layers, int8))
        + constants_bytes(traced.rest_bytes)
        + sum(_overhead_bytes(layer) for layer in traced.layers.values())
    )


def lowered_bytes(traced: TracedProgram, formats: Mapping[str, LayerFormat]) -> int:
    """Bytes of the file that `lower` would write for layers in these formats, at most."""
    _require_formats(traced, formats)
    constants = [size for name, layer in traced.layers.items() for size in constant_bytes(formats[name], layer.shape)]
    return _graph_bytes(traced, formats) + constants_bytes((*traced.rest_bytes, *constants))


def _graph_bytes(traced: TracedProgram, formats: Mapping[str, LayerFormat]) -> int:
    static = {name for name in traced.static if may_be_static(formats[name])}
    convolutions = {
        name for name, layer in traced.layers.items() if runs_rounded_as_convolution(formats[name], layer.shape)
    }
    counts = LayerCounts(
        len(traced.layers), len(convolutions - static), len(static - convolutions), len(static & convolutions)
    )
    return graph_bytes(traced.operators, counts) + (DATA_FILE_BYTES if traced.weights_apart else 0)


def _overhead_bytes(layer: Layer) -> int:
    found = [each for each in WORDIEST if storable(each, layer.kind, layer.shape) is None]
    return max(constants_bytes(constant_bytes(each, layer.shape)) - each.nbytes(layer.shape) for each in found)


def _require_formats(traced: TracedProgram, formats: Mapping[str, LayerFormat]) -> None:
    missing, unknown = sorted(traced.layers.keys() - formats), sorted(formats.keys() - traced.layers)
    for problem, layers in (("no format for", missing), ("the program has no", unknown)):
        if layers:
            raise TurbopocketError(f"{traced.component}: {problem} {layers[0]} and {len(layers) - 1} other layers")
    for name, layer in traced.layers.items():
        reason = storable(formats[name], layer.kind, layer.shape)
        if reason is not None:
            raise TurbopocketError(f"{name}: {reason}")


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
    owner: dict[int, str] = {}
    layers: dict[str, Layer] = {}
    for path, module in component.module.model.named_modules():
        name = f"{component.layer_prefix}{path}"
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        first = owner.setdefault(id(module.weight), name)
        if first != name:
            raise TurbopocketError(
                f"{first} and {name} are one parameter: a program with shared weights is not supported"
            )
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
        kind: Kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
        layers[name] = Layer(name, kind, tuple(module.weight.shape))
    return layers


def _moves(conv: nn.Conv2d) -> bool:
    return conv.stride != (1, 1) or conv.padding != (0, 0)


def _outputs(component: Component, program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    values = next(iter(reversed(program.graph.nodes))).args[0]
    return tuple(_spec(name, node.meta["val"]) for name, node in zip(component.output_names, values, strict=True))


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=_DTYPES[tensor.dtype], shape=[int(size) for size in tensor.shape])
