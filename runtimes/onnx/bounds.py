# SPDX-License-Identifier: Apache-2.0
"""What a graph may not do, because nobody could stop it: run for ever, or make tensors without a bound.

ONNX Runtime gives back control when a run ends, so it is asked before a session is opened, of the graph alone.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError
from ...ground.reading import one_sentence
from ..ceilings import MOST_VALUES

_SIZED_BY = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3}
"""Operators whose output is as large as the numbers in one of their inputs say, and which input that is."""
_INT64 = 7


def require_bounded(path: Path, component: str) -> None:
    """Returns when the graph has no loops or branches, and no operator with a stated shape of too many values.

    Builds write neither. Raises TurbopocketError naming the node, and for a file that is no graph.
    """
    import onnx

    with one_sentence(f"{component}: {path} can not be read as a graph"):
        model = onnx.load(path, load_external_data=False)
        stated = dict(_stated_numbers(model.graph))
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        for node in nodes:
            named = f"{component}: node {node.name[:80]!r} ({node.op_type[:80]}) of {path}"
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise TurbopocketError(f"{named} runs a graph of its own, as often as that says; no build writes one")
            sized_by = _SIZED_BY.get(node.op_type)
            if sized_by is None or len(node.input) <= sized_by:
                continue
            shape = stated.get(node.input[sized_by], [])
            if math.prod(shape) > MOST_VALUES:
                raise TurbopocketError(f"{named} makes {shape}; a tensor has at most {MOST_VALUES:,} values")


def _stated_numbers(graph: Any) -> Iterator[tuple[str, list[int]]]:
    """Whole numbers that the graph itself holds, by name, where they are few."""
    from onnx import numpy_helper

    constants = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            constants += [(node.output[0], attribute.t) for attribute in node.attribute if attribute.HasField("t")]
    for name, tensor in constants:
        if tensor.data_type == _INT64 and not tensor.external_data and math.prod(tensor.dims) <= 16:
            yield name, numpy_helper.to_array(tensor).ravel().tolist()
