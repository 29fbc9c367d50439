# SPDX-License-Identifier: Apache-2.0
"""From a PyTorch component to an ONNX graph without weights, in which every compressible layer is one node.

Linear and Conv2d become nodes of a domain of our own (`Linear`, `Conv2d` with inputs x, weight, bias) while the
exporter runs (see `translations`), so no pattern has to be found again afterwards, and no weight is ever transposed,
folded or merged with an equal one. Parameters are inputs of the graph while it is simplified, for the same reason.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnx import ModelProto
from onnxscript import optimizer
from torch import Tensor, nn

from ....quant.ranges import Ranges
from ...families.graphs import Component
from ..layer import Layer, require_own_weights
from .names import DOMAIN, OPSET, name_by_module
from .translations import TRANSLATIONS

__all__ = ["DOMAIN", "OPSET", "TracedGraph", "trace"]

_FOLDABLE_BYTES = 8192
"""Shape arithmetic is far smaller, a table that would be stored twice is larger."""


@dataclass(frozen=True)
class TracedGraph:
    """A component's graph without weights; names of parameters and layers in it are module paths.

    `layers` are the compressible ones by their full name, in the order in which they run; `rest` holds all other
    parameters that the graph uses, by their name in it. `ranges` are what layers saw (by full name), for static scales;
    without them, before calibration, layers of these are counted but can not be lowered.
    """

    component: str
    skeleton: ModelProto
    layers: dict[str, Layer]
    rest: dict[str, Tensor]
    ranges: Mapping[str, Ranges] = field(default_factory=dict)


def trace(component: Component) -> TracedGraph:
    """Runs PyTorch's exporter once. The layers' weights are not looked at.

    Raises TurbopocketError when two layers share one weight or a layer is no module of its own.
    """
    require_own_weights(component)
    component = component.without_weights()
    model = _exported(component)
    parameters = _detach_parameters(model, component)
    _simplify(model)
    used = {value.name: parameters[value.name] for value in model.graph.inputs if value.name in parameters}
    del model.graph.inputs[len(component.example_inputs) :]
    skeleton = ir.to_proto(model)
    layers = name_by_module(skeleton.graph, component.name, used, component.free)
    weights = {f"{layer.path}.weight" for layer in layers}
    rest = {name: tensor for name, tensor in used.items() if name not in weights}
    return TracedGraph(component.name, skeleton, {layer.name: layer for layer in layers}, rest)


def _exported(component: Component) -> ir.Model:
    device = next(component.module.parameters()).device
    inputs = tuple(tensor.to(device) for tensor in component.example_inputs.values())
    dynamic = tuple(_dynamic(tensor, component.free.get(name, {})) for name, tensor in component.example_inputs.items())
    with _quiet_exporter(), torch.no_grad():
        program = torch.export.export(
            component.module, inputs, dynamic_shapes=_nested(component.module, dynamic), strict=False
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            input_names=list(component.example_inputs),
            output_names=list(component.output_names),
        )
    assert exported is not None  # None only for an export to a file
    return exported.model


def _dynamic(tensor: Tensor, free: Mapping[int, str]) -> dict[int, Any] | None:
    """Which dimensions of an input may vary, as torch.export wants it said."""
    return dict.fromkeys((0, *free), torch.export.Dim.DYNAMIC) if tensor.ndim else None


def _nested(module: nn.Module, dynamic: tuple[Any, ...]) -> Any:
    """`dynamic`, with what goes to a `*added` parameter of forward in a tuple of its own, as torch.export wants it.

    Where nothing goes there (Stable Diffusion 1.x has no added conditions), there is no such tuple either.
    """
    named = type(module).forward.__code__.co_argcount - 1
    return (*dynamic[:named], dynamic[named:]) if len(dynamic) > named else dynamic


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns of its own deprecations and of packages it can do without; neither is the user's business."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        registration.setLevel(level)


def _detach_parameters(model: ir.Model, component: Component) -> dict[str, Tensor]:
    """Turns parameters from initializers into graph inputs named by module path, and returns them by that name."""
    detached: dict[str, Tensor] = {}
    for name, parameter in component.module.named_parameters(remove_duplicate=False):
        value = model.graph.initializers.pop(name, None)
        if value is not None:
            value.const_value = None
            value.name = name.removeprefix(component.layer_prefix)
            model.graph.inputs.append(value)
            detached[value.name] = parameter
    return detached


def _simplify(model: ir.Model) -> None:
    """Leaves only arithmetic that depends on an input: shapes are numbers, but for the batch and free dimensions."""
    for node in model.graph:
        node.metadata_props.clear()
    _fix_reshapes(model)
    _drop_unit_factors(model)
    passes.RemoveUnusedNodesPass()(model)
    optimizer.fold_constants(
        model, input_size_limit=_FOLDABLE_BYTES, output_size_limit=_FOLDABLE_BYTES, onnx_shape_inference=True
    )
    for simplification in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
    ):
        simplification(model)


# onnxscript has rules for the next two, which do not fit: `mul_by_1_rule` and `div_by_1_rule` take all that is within
# 1e-5 of 1 for 1, and `materialize_reshape_shape_rule` gives every Reshape an attribute more.
def _drop_unit_factors(model: ir.Model) -> None:
    """Turns x / 1 and x * 1 into x: diffusers divides by an output scale that no published model sets."""
    for node in model.graph:
        unit = node.op_type in ("Div", "Mul") and _is_one(node.inputs[1])
        if unit and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(node.inputs[0])


def _is_one(value: ir.Value | None) -> bool:
    """Whether it is the constant 1 without dimensions: those of any other may be more than x has, and become y's."""
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return constant is not None and not constant.shape and bool(constant.numpy() == 1)


def _fix_reshapes(model: ir.Model) -> None:
    """Gives every Reshape with at most one unknown dimension a constant target, which frees what computed it."""
    for node in model.graph:
        shape = node.outputs[0].shape if node.op_type == "Reshape" else None
        if shape is None:
            continue
        target = [size if isinstance(size, int) else -1 for size in shape]
        if target.count(-1) > 1 or 0 in target:
            continue
        name = "shape." + "x".join(map(str, target))
        if name not in model.graph.initializers:
            tensor = ir.tensor(target, dtype=ir.DataType.INT64, name=name)
            model.graph.initializers.add(ir.val(name, const_value=tensor))
        node.replace_input_with(1, model.graph.initializers[name])
