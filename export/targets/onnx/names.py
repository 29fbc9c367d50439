# SPDX-License-Identifier: Apache-2.0
"""Module paths as names in a traced graph, so that a layer's output can be found in it by the layer's path."""

from collections import Counter
from collections.abc import Mapping

from onnx import GraphProto, NodeProto, ValueInfoProto, helper
from torch import Tensor

from ....ground.errors import TurbopocketError
from ..layer import Kind, Layer

_KINDS: dict[str, Kind] = {"Linear": "linear", "Conv2d": "conv2d"}
_WEIGHT = ".weight"

DOMAIN = "turbopocket"
"""Of operators of our own: those that stand for layers while a graph is traced, and those of finished files."""
OPSET = 21
"""The first with 4-bit integers and blocked DequantizeLinear."""
BIASED = "Biased"
"""Ends the names of our operators that have a body of their own for layers with a bias."""


def name_by_module(
    graph: GraphProto, component: str, parameters: Mapping[str, Tensor], free: Mapping[str, Mapping[int, str]]
) -> list[Layer]:
    """Names every node that reads `<path>.weight`, and its output, by that path; returns the Linear and Conv2d ones.

    A second use of a layer is called `<path>/2`. Free dimensions get the names in `free`. All other node names,
    documentation and shapes of inner values are dropped: nothing reads them. The graph's outputs keep their names.
    """
    layers: dict[str, Layer] = {}
    renamed: dict[str, str] = {}
    uses: Counter[str] = Counter()
    for node in graph.node:
        path = _path(node.input, parameters)
        kind = _KINDS.get(node.op_type)
        _strip(node)
        node.name = ""
        if path is None and kind is not None:
            raise TurbopocketError(
                f"{component}: the weight of a {kind} layer, {node.input[1]}, is computed, not stored"
            )
        if path is None:
            continue
        uses[path] += 1
        node.name = path if uses[path] == 1 else f"{path}/{uses[path]}"
        renamed[node.output[0]] = node.name
        if kind is not None:
            shape = tuple(parameters[path + _WEIGHT].shape)
            layers[path] = Layer(f"{component}.{path}", kind, shape)
    _rename(graph, renamed)
    _name_dimensions(graph, free)
    _strip(graph)
    del graph.value_info[:]
    return list(layers.values())


def _strip(proto: GraphProto | NodeProto | ValueInfoProto) -> None:
    """Drops the exporter's notes, which weigh more than the graph: stack traces, the whole exported program."""
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")


def is_layer(node: NodeProto) -> bool:
    """Whether a node of a traced graph is a Linear or Conv2d that can be compressed."""
    return node.domain == DOMAIN and node.op_type in _KINDS


def layer_path(node: NodeProto) -> str:
    """Module path of the layer that a node of our own domain stands for."""
    return node.input[1].removesuffix(_WEIGHT)


def _path(inputs: list[str], parameters: Mapping[str, Tensor]) -> str | None:
    return next((n.removesuffix(_WEIGHT) for n in inputs if n in parameters and n.endswith(_WEIGHT)), None)


def _rename(graph: GraphProto, renamed: Mapping[str, str]) -> None:
    """Renames values; an output of the graph that gets another name is copied to its old one."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for output in graph.output:
        if output.name in renamed:
            graph.node.append(helper.make_node("Identity", [renamed[output.name]], [output.name]))


def _name_dimensions(graph: GraphProto, free: Mapping[str, Mapping[int, str]]) -> None:
    """Names what may vary in inputs and outputs, the first dimension `batch`, instead of the exporter's `s72`."""
    for value in (*graph.input, *graph.output):
        _strip(value)
        names = {0: "batch", **free.get(value.name, {})}
        for index, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = names[index]
