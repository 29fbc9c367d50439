# SPDX-License-Identifier: Apache-2.0
"""A component as one ExecuTorch program, `<component>.pte`, whose layers XNNPACK runs from the codes as planned.

`trace` runs PyTorch's exporter once; sizes then follow from shapes (`fixed_bytes`, `lowered_bytes`), before any
weight is compressed, and `lower` writes the same bytes every time.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....ground import names
from ....ground.errors import TurbopocketError
from ....quant.formats import CompressedTensor, LayerFormat
from ....quant.ranges import Ranges
from ....runtimes.executorch.imported import executorch_module
from ....runtimes.executorch.shown_layers import LayerName
from ....runtimes.manifest import ComponentSpec, TensorSpec
from ...families.graphs import Component
from .codebook import Codebooks
from .gate import constant_key, refuse_weight_only, require_constants
from .integer import AsRun, Static, is_pointwise, layer_as_run
from .partition import partitioner
from .rewrite import Rewritten
from .size import (
    DATA_FILE_BYTES,
    KEY_BYTES,
    OPERATOR_BYTES,
    PLACE_BYTES,
    PROGRAM_BYTES,
    constants_bytes,
    operators_bytes,
)
from .stores import (
    Kind,
    constant_bytes,
    constants_of,
    is_codebook,
    may_be_static,
    shared_constant_bytes,
    storable,
)

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
    codebooks: Codebooks

    @property
    def component(self) -> str:
        return self.source.name


def trace(
    component: Component, static: bool = False, weights_apart: bool = False, codebooks: Codebooks = "portable"
) -> TracedProgram:
    """Runs PyTorch's exporter once, for one item a call. Layer weights are not looked at.

    With `static`, every layer counts as one of static steps until `static_layers` says which are; `weights_apart` and
    `codebooks` are for the programs that will be written.

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
        codebooks=codebooks,
    )


def lower(traced: TracedProgram, weights: Mapping[str, CompressedTensor], folder: Path) -> ComponentSpec:
    """Writes `<component>.pte` under `folder`, and returns what a manifest says of it.

    Its constants are inside, or in `<component>.ptd` beside it.

    Raises TurbopocketError when `weights` are not exactly the traced layers', a program can not store one of them, what
    layers share is not equal, ExecuTorch fails on the way, or the finished program does not hold one as it is.
    """
    _require_formats(traced, {name: weight.format for name, weight in weights.items()})
    _require_equal_shares(weights)
    program = _exported(as_run(traced.source, weights, traced.static, traced.codebooks))
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
        component, path = names.LayerName.parse(name)
        found.setdefault(component, {})[constant_key(constants_of(weight)[0])] = LayerName(path, is_pointwise(weight))
    return found


def static_layers(ranges: Mapping[str, Ranges]) -> dict[str, Static | None]:
    """The layers, by full name, that round their activations in steps known ahead, given what they saw."""
    return {name: Static.of(layer) for name, layer in ranges.items() if Static.of(layer) is not None}


def as_run(
    component: Component,
    weights: Mapping[str, CompressedTensor],
    static: Mapping[str, Static | None],
    codebooks: Codebooks = "portable",
) -> Component:
    """The component as the runtime is to compute it, in PyTorch; it shares all tensors but the layers' weights."""
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*component.module.parameters(), *component.module.buffers())
    }
    module = copy.deepcopy(component.module, shared)
    model: nn.Module = module.model
    common = AsRun(codebooks)
    for name, weight in weights.items():
        if name.startswith(component.layer_prefix):
            path = name.removeprefix(component.layer_prefix)
            layer = layer_as_run(name, model.get_submodule(path), weight, static.get(name), common)
            model.set_submodule(path, layer)
    return replace(component, module=module)


def component_spec(traced: TracedProgram) -> ComponentSpec:
    """What a manifest says of the component: its files, and the tensors that go in and come out."""
    return ComponentSpec(
        file=f"{traced.component}.pte",
        data=f"{traced.component}.ptd" if traced.weights_apart else None,
        inputs=list(traced.inputs),
        outputs=list(traced.outputs),
    )


def fixed_bytes(traced: TracedProgram, candidates: Iterable[LayerFormat]) -> int:
    """Bytes of the files beside the layers' `nbytes`, at most, when every layer gets one of the candidate formats.

    Codebooks that all layers of a component share are counted by `lowered_bytes` alone, which knows whether any does.
    """
    formats = tuple(candidates)
    return _base_bytes(traced) + sum(_overhead_bytes(traced, layer, formats) for layer in traced.layers.values())


def lowered_bytes(traced: TracedProgram, formats: Mapping[str, LayerFormat]) -> int:
    """Bytes of the files that `lower` would write for layers in these formats, at most."""
    _require_formats(traced, formats)
    shapes = {formats[name]: layer.shape for name, layer in traced.layers.items()}
    return (
        _base_bytes(traced)
        + sum(_own_bytes(traced, layer, formats[name]) for name, layer in traced.layers.items())
        + sum(constants_bytes(shared_constant_bytes(format, shape), PLACE_BYTES) for format, shape in shapes.items())
    )


def _base_bytes(traced: TracedProgram) -> int:
    """Of all that is no layer."""
    data_file = DATA_FILE_BYTES if traced.weights_apart else 0
    return PROGRAM_BYTES + OPERATOR_BYTES * traced.operators + constants_bytes(traced.rest_bytes) + data_file


def _own_bytes(traced: TracedProgram, layer: Layer, format: LayerFormat) -> int:
    """Of a layer's operators and constants, without those that it has in common with others."""
    static = layer.name in traced.static and may_be_static(format)
    find_bytes = PLACE_BYTES if is_codebook(format) else KEY_BYTES
    constants = constants_bytes(constant_bytes(format, layer.shape), find_bytes)
    return operators_bytes(format, layer.shape, static, traced.codebooks == "kernel") + constants


def _overhead_bytes(traced: TracedProgram, layer: Layer, candidates: Iterable[LayerFormat]) -> int:
    """Of the candidate format that takes the most beside its `nbytes`; a layer without any counts for nothing."""
    found = [each for each in candidates if storable(each, layer.kind, layer.shape) is None]
    return max((_own_bytes(traced, layer, each) - each.nbytes(layer.shape) for each in found), default=0)


def _require_formats(traced: TracedProgram, formats: Mapping[str, LayerFormat]) -> None:
    missing, unknown = sorted(traced.layers.keys() - formats), sorted(formats.keys() - traced.layers)
    for problem, layers in (("no format for", missing), ("the program has no", unknown)):
        if layers:
            raise TurbopocketError(f"{traced.component}: {problem} {layers[0]} and {len(layers) - 1} other layers")
    for name, layer in traced.layers.items():
        reason = storable(formats[name], layer.kind, layer.shape)
        if reason is not None:
            raise TurbopocketError(f"{name}: {reason}")


def _require_equal_shares(weights: Mapping[str, CompressedTensor]) -> None:
    first: dict[tuple[LayerFormat, str], Tensor] = {}
    for name, weight in weights.items():
        for part in weight.format.shared_parts:
            value = weight.parts[part]
            if not torch.equal(first.setdefault((weight.format, part), value), value):
                raise TurbopocketError(f"{name}: its {part} of {weight.format} are not those of other layers")


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
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            raise TurbopocketError(f"{name}: a Conv2d that pads {module.padding_mode} is not supported for ExecuTorch")
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
