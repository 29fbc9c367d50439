# SPDX-License-Identifier: Apache-2.0
"""A component as `model.onnx` and `model.onnx.data` for ONNX Runtime, weights as compressed on disk as in the plan.

`trace` runs PyTorch's exporter once; all sizes then follow from shapes (`fixed_bytes`, `lowered_bytes`), before any
weight is compressed, and `lower` writes the same bytes every time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ....ground.errors import TurbopocketError
from ....quant.formats import CompressedTensor
from ....quant.scheme import Scheme
from ....runtimes.manifest import ComponentSpec, TensorSpec
from ...families.graphs import TIMESTEP
from ...target_options import OnnxOptions
from ..layer import NO_SCHEMES, require_equal_shares, schemes_of
from .codebook import distinct
from .data import DATA_FILE, MODEL_FILE, StoredTensor, data_bytes, external_initializers, write_data
from .form import DEFAULTS, MICROSOFT, Array, Form, FormOptions
from .names import DOMAIN, OPSET, is_layer, layer_path
from .norm import is_norm, norm_constants, norm_nodes
from .prepack import prepack
from .rest import RestParameter, looked_up, rest_parameters, widened
from .steps import step_lookup
from .stores import STORES
from .trace import TracedGraph, trace

__all__ = [
    "DEFAULTS",
    "FormOptions",
    "OnnxOptions",
    "TracedGraph",
    "component_spec",
    "fixed_bytes",
    "graph_bytes",
    "lower",
    "lowered_bytes",
    "rest_bytes",
    "trace",
]

IR_VERSION = 10
_DTYPES: dict[int, Literal["float32", "int64"]] = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}


def lower(
    traced: TracedGraph,
    weights: Mapping[str, CompressedTensor],
    folder: Path,
    options: OnnxOptions = DEFAULTS,
    schemes: Mapping[str, Scheme] = NO_SCHEMES,
) -> ComponentSpec:
    """Writes `<component>/model.onnx` and its data file under `folder`, and returns what a manifest says of them.

    `schemes` are as `Target.lower` has them.

    Raises TurbopocketError when `weights` are not exactly the traced layers', ONNX can not store one of them, what
    layers share is not equal, or one that rounds by calibrated scales was not calibrated.
    """
    forms = _forms(traced, schemes_of(weights, schemes), options)
    require_equal_shares(weights)
    for form in forms.values():
        form.require_calibrated()
    require_steps(traced, forms.values())
    graph = _Graph(traced, forms)
    target = folder / traced.component
    target.mkdir(parents=True, exist_ok=True)
    (target / MODEL_FILE).write_bytes(graph.model().SerializeToString(deterministic=True))
    write_data(target / DATA_FILE, graph.arrays(weights))
    if options.prepacked:
        prepack(target)
    return component_spec(traced)


def component_spec(traced: TracedGraph) -> ComponentSpec:
    """What a manifest says of the component: its file, and the tensors that go in and come out."""
    return ComponentSpec(
        file=f"{traced.component}/{MODEL_FILE}",
        data=f"{traced.component}/{DATA_FILE}",
        inputs=[_tensor_spec(value) for value in traced.skeleton.graph.input],
        outputs=[_tensor_spec(value) for value in traced.skeleton.graph.output],
    )


def lowered_bytes(traced: TracedGraph, schemes: Mapping[str, Scheme], options: OnnxOptions = DEFAULTS) -> int:
    """Exact bytes of both files that `lower` would write for layers in these schemes, not prepacked."""
    graph = _Graph(traced, _forms(traced, schemes, options))
    return graph.model().ByteSize() + data_bytes(graph.tensors())


def fixed_bytes(
    traced: TracedGraph, candidates: Mapping[str, Iterable[Scheme]], options: OnnxOptions = DEFAULTS
) -> int:
    """Bytes of both files beside the layers' `nbytes`, at most, when every layer gets one of its candidates.

    Codebooks that all layers of a component share are counted by `lowered_bytes` alone, which knows whether any does.
    """
    return graph_bytes(traced, candidates, options) + rest_bytes(traced)


def graph_bytes(
    traced: TracedGraph, candidates: Mapping[str, Iterable[Scheme]], options: OnnxOptions = DEFAULTS
) -> int:
    """Bytes of `model.onnx` and of gaps in the data file, at most: each layer in its wordiest candidate.

    Candidates that a layer can not be stored in count for nothing; so does a layer without any.
    """
    skeleton_bytes = _Graph(traced, {}).model().ByteSize()
    by_path = {layer.path: layer for layer in traced.layers.values()}
    uses = [node for node in traced.skeleton.graph.node if is_layer(node)]
    layers = [by_path[layer_path(node)] for node in uses]
    of_forms = FormOptions(options, traced.ranges)
    kept = [STORES.storable_forms(layer, candidates[layer.name], of_forms) for layer in layers]
    forms = list(zip(uses, kept, strict=True))
    in_nodes = sum(max((form.overhead_bytes(node) for form in possible), default=0) for node, possible in forms)
    bodies = distinct([body for node, possible in forms for form in possible for body in form.functions(node)])
    shared = _once(form for _, possible in forms for form in possible).ByteSize()
    columns = [column for _, possible in forms for form in possible for column in form.columns()]
    return skeleton_bytes + in_nodes + shared + step_lookup(columns).ByteSize() + _function_bytes(bodies)


def _once(forms: Iterable[Form]) -> GraphProto:
    """What layers of these forms share, each piece once."""
    parts = [form.once() for form in forms]
    return GraphProto(
        node={node.output[0]: node for part in parts for node in part.node}.values(),
        initializer={constant.name: constant for part in parts for constant in part.initializer}.values(),
    )


def _function_bytes(functions: Sequence[FunctionProto]) -> int:
    """Bytes of the functions, and of the version of their domain, in a model."""
    opsets = [helper.make_opsetid(DOMAIN, 1)] if functions else []
    return ModelProto(functions=functions, opset_import=opsets).ByteSize()


def rest_bytes(traced: TracedGraph) -> int:
    """Exact bytes in the data file of everything that is not a layer's weight."""
    return data_bytes(parameter.stored() for parameter in _rest(traced))


class _Graph:
    """The finished graph of a component, whose layers have the given forms (by module path)."""

    def __init__(self, traced: TracedGraph, forms: Mapping[str, Form]) -> None:
        self.traced = traced
        self.forms = forms
        self.rest = _rest(traced)
        self.lookup = step_lookup([column for form in forms.values() for column in form.columns()])

    def tensors(self) -> list[StoredTensor]:
        """What the data file holds, in order; what several layers share, once."""
        layers = [tensor for form in self.forms.values() for tensor in form.tensors()]
        return list(dict.fromkeys([*(parameter.stored() for parameter in self.rest), *layers]))

    def arrays(self, weights: Mapping[str, CompressedTensor]) -> Iterator[tuple[StoredTensor, Array]]:
        """Values of `tensors`, one layer at a time."""
        for parameter in self.rest:
            yield parameter.stored(), parameter.array()
        shared: set[str] = set()
        for form in self.forms.values():
            for at, (tensor, array) in enumerate(
                zip(form.tensors(), form.arrays(weights[form.layer.name]), strict=True)
            ):
                if tensor.name not in shared:
                    yield tensor, array
                if at in form.shared():
                    shared.add(tensor.name)

    def model(self) -> ModelProto:
        """The graph with all tensors outside."""
        model = ModelProto(ir_version=IR_VERSION, producer_name="turbopocket")
        model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)])
        model.graph.CopyFrom(self.traced.skeleton.graph)
        del model.graph.node[:]
        model.graph.name = self.traced.component
        model.graph.node.extend(self._nodes())
        model.graph.initializer.extend(external_initializers(self.tensors()))
        model.graph.initializer.extend(self._constants())
        for form in self.forms.values():
            model.graph.value_info.extend(form.value_shapes())
        model.functions.extend(distinct([function for use in self._uses() for function in use]))
        if model.functions:
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        return model

    def _constants(self) -> list[TensorProto]:
        norms = [
            constant for node in self.traced.skeleton.graph.node if is_norm(node) for constant in norm_constants(node)
        ]
        layers = [constant for form in self.forms.values() for constant in form.constants()]
        shared = _once(self.forms.values()).initializer
        return list(
            {constant.name: constant for constant in (*norms, *layers, *shared, *self.lookup.initializer)}.values()
        )

    def _uses(self) -> Iterator[list[FunctionProto]]:
        for node in self.traced.skeleton.graph.node:
            if is_layer(node) and layer_path(node) in self.forms:
                yield self.forms[layer_path(node)].functions(node)

    def _nodes(self) -> list[NodeProto]:
        """Nodes that read initializers only come first, though ONNX Runtime then runs them last.

        It orders nodes by depth-first search from the outputs, later ones first: a DequantizeLinear that stands just
        before its Conv would run before all that leads to the Conv's input, and its dense weight would wait in memory.
        """
        half_tables = {p.name for p in self.rest if p.is_table and p.is_half}
        nodes = [*widened(self.rest), *_once(self.forms.values()).node, *self.lookup.node]
        for form in self.forms.values():
            nodes += form.prepare()
        for node in self.traced.skeleton.graph.node:
            if is_layer(node):
                form_here = self.forms.get(layer_path(node))
                nodes += form_here.apply(node) if form_here is not None else []
            elif is_norm(node):
                nodes += norm_nodes(node)
            elif node.op_type == "Gather" and node.input[0] in half_tables:
                nodes += looked_up(node)
            else:
                nodes.append(node)
        return nodes


def _rest(traced: TracedGraph) -> list[RestParameter]:
    return rest_parameters(traced.rest, traced.skeleton.graph.node)


def _forms(traced: TracedGraph, schemes: Mapping[str, Scheme], options: OnnxOptions) -> dict[str, Form]:
    """By module path."""
    of_forms = FormOptions(options, traced.ranges)
    return {form.layer.path: form for form in STORES.forms_of(traced.layers, schemes, of_forms).values()}


def require_steps(traced: TracedGraph, forms: Iterable[Form]) -> None:
    """Returns when scales by step are those of timesteps, in a graph that has any; TurbopocketError naming a layer."""
    has_timestep = any(value.name == TIMESTEP for value in traced.skeleton.graph.input)
    for form in forms:
        if form.scheme.is_by_step and bool(form.columns()) != has_timestep:
            why = "calibration did not tell the timesteps" if has_timestep else f"the graph has no input {TIMESTEP}"
            raise TurbopocketError(f"{form.layer.name}: {form.scheme} needs ranges of each timestep, {why}")


def _tensor_spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)
