# SPDX-License-Identifier: Apache-2.0
"""What a graph may not do, because nobody could stop it: run for ever, or make tensors without a bound.

ONNX Runtime gives back control when a run ends, so it is asked before a session is opened, of the graph alone. The file
is protocol buffers (onnx.proto3), of which a few fields are read here: the package onnx is heavy, and drawing has no
other use for it.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...ground.errors import TurbopocketError
from ...ground.reading import one_sentence
from ..ceilings import MOST_VALUES

_SIZED_BY = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3}
"""Operators whose output is as large as the numbers in one of their inputs say, and which input that is."""
_INT64 = 7
_FEW = 16
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _FUNCTION_NODE = 1, 5, 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 5, 6, 11
_TENSOR_TYPE, _TENSOR_INT64S, _TENSOR_NAME, _TENSOR_RAW = 2, 7, 8, 9
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


@dataclass
class _Node:
    name: str = ""
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    has_graph: bool = False
    tensor: memoryview | None = None


def require_bounded(path: Path, component: str) -> None:
    """Returns when the graph has no loops or branches, and no operator with a stated shape of too many values.

    Builds write neither. Raises TurbopocketError naming the node, and for a file that is no graph.
    """
    with one_sentence(f"{component}: ONNX Runtime cannot open the graph: {path} is none"):
        with path.open("rb") as file:
            model = list(_fields(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))))
        graph = [entry for number, value in model if number == _MODEL_GRAPH for entry in _fields(_bytes(value))]
        nodes = [_node(_bytes(value)) for number, value in graph if number == _GRAPH_NODE]
        stated = dict(_named(_bytes(value)) for number, value in graph if number == _GRAPH_INITIALIZER)
        stated |= {node.outputs[0]: _named(node.tensor)[1] for node in nodes if node.tensor is not None}
        for function in (_bytes(value) for number, value in model if number == _MODEL_FUNCTIONS):
            nodes += [_node(_bytes(value)) for number, value in _fields(function) if number == _FUNCTION_NODE]
        for node in nodes:
            _require_node_bounded(node, stated, f"{component}: node {node.name!r} ({node.operator}) of {path}")


def _require_node_bounded(node: _Node, stated: dict[str, list[int]], named: str) -> None:
    if node.has_graph:
        raise TurbopocketError(f"{named} runs a graph of its own, as often as that says; no build writes one")
    sized_by = _SIZED_BY.get(node.operator)
    if sized_by is not None and len(node.inputs) > sized_by:
        shape = stated.get(node.inputs[sized_by], [])
        if math.prod(shape) > MOST_VALUES:
            raise TurbopocketError(f"{named} makes {shape}; a tensor has at most {MOST_VALUES:,} values")


def _node(data: memoryview) -> _Node:
    node = _Node()
    for number, value in _fields(data):
        if number == _NODE_INPUT:
            node.inputs.append(_text(value))
        elif number == _NODE_OUTPUT:
            node.outputs.append(_text(value))
        elif number == _NODE_NAME:
            node.name = _text(value)[:80]
        elif number == _NODE_OPERATOR:
            node.operator = _text(value)[:80]
        elif number == _NODE_ATTRIBUTE:
            for part, inner in _fields(_bytes(value)):
                node.has_graph |= part in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS)
                if part == _ATTRIBUTE_TENSOR and node.operator in ("", "Constant"):
                    node.tensor = _bytes(inner)
    if node.operator != "Constant" or not node.outputs:
        node.tensor = None
    return node


def _named(tensor: memoryview) -> tuple[str, list[int]]:
    """A tensor's name and its whole numbers; none where it has other values, or many."""
    name, kind, numbers = "", 0, list[int]()
    for number, value in _fields(tensor):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_RAW and len(_bytes(value)) <= 8 * _FEW:
            numbers = list(struct.unpack(f"<{len(_bytes(value)) // 8}q", _bytes(value)[: len(_bytes(value)) // 8 * 8]))
        elif number == _TENSOR_INT64S:
            packed = [value] if isinstance(value, int) else list(_varints(value)) if len(value) <= 10 * _FEW else []
            numbers += packed
    return name, numbers if kind == _INT64 else []


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields. Raises ValueError or IndexError where it is none."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(wire, 0)
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif not size:
            raise ValueError(f"a field of wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is to be")
    return value


def _text(value: int | memoryview) -> str:
    return str(_bytes(value), "utf-8", "replace")
