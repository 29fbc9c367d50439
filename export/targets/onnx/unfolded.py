# SPDX-License-Identifier: Apache-2.0
"""Tensors that ONNX Runtime leaves as they are stored, when it opens a graph, though nothing but constants leads there.

It folds what has constant inputs, but keeps DequantizeLinear for its quantised patterns, and so whatever depends on
one. The zeros that one such operator gives are, to Reshape, "each dimension as it is": the tensor is the stored one,
not a copy of it, and what reads it runs when the graph does.
"""

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

_ONE = "scale.one"


def unfolded_shape(rank: int) -> GraphProto:
    """What a graph needs once for all its tensors of that rank; initializers are named by their values."""
    zeros, numbers, shape = _zeros(rank), f"{_zeros(rank)}/numbers", _shape(rank)
    return GraphProto(
        initializer=[
            numpy_helper.from_array(np.zeros(rank, dtype=np.int8), zeros),
            numpy_helper.from_array(np.array(1, dtype=np.float32), _ONE),
        ],
        node=[
            helper.make_node("DequantizeLinear", [zeros, _ONE], [numbers]),
            helper.make_node("Cast", [numbers], [shape], to=TensorProto.INT64),
        ],
    )


def unfolded(source: str, target: str, rank: int) -> NodeProto:
    """A node that gives initializer `source` of that rank as value `target`."""
    return helper.make_node("Reshape", [source, _shape(rank)], [target])


def _zeros(rank: int) -> str:
    return f"zeros.{rank}.int8"


def _shape(rank: int) -> str:
    return f"unfolded.{rank}"
