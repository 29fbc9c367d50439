# SPDX-License-Identifier: Apache-2.0
"""GroupNorm by InstanceNormalization, for which ONNX Runtime has a kernel.

It has none for GroupNormalization: that it takes apart into about twenty nodes, each with tensors of its own.

B pictures, C channels, G groups.
"""

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from .names import DOMAIN

GROUP_NORM = "GroupNorm"
"""Of a traced graph: x [B, C, ...], weight [C]?, bias [C]?; attributes `groups`, `epsilon` and x's `rank`."""


def is_norm(node: NodeProto) -> bool:
    """Whether a node of a traced graph stands for a GroupNorm."""
    return node.domain == DOMAIN and node.op_type == GROUP_NORM


def norm_constants(node: NodeProto) -> list[TensorProto]:
    """Small initializers of `norm_nodes`, named by their values."""
    attributes = _attributes(node)
    groups, rank = attributes["groups"], attributes["rank"]
    values = {
        f"ones.{groups}": np.ones(groups, dtype=np.float32),
        f"zeros.{groups}": np.zeros(groups, dtype=np.float32),
        f"groups.{groups}": np.array([0, groups, -1], dtype=np.int64),
        f"pixels.{rank}": np.arange(1, rank - 1, dtype=np.int64),
    }
    return [numpy_helper.from_array(value, name) for name, value in values.items()]


def norm_nodes(node: NodeProto) -> list[NodeProto]:
    """Nodes in the place of a traced GroupNorm; the last has its name and output."""
    attributes, (x, *parameters), y = _attributes(node), node.input, node.output[0]
    ones, zeros, groups, pixels = (constant.name for constant in norm_constants(node))
    rows, even, shape, norm = (f"{y}/{part}" for part in ("groups", "even", "shape", "norm"))
    nodes = [
        helper.make_node("Reshape", [x, groups], [rows], name=rows),
        helper.make_node(
            "InstanceNormalization", [rows, ones, zeros], [even], name=even, epsilon=attributes["epsilon"]
        ),
        helper.make_node("Shape", [x], [shape], name=shape),
        helper.make_node("Reshape", [even, shape], [norm], name=norm),
    ]
    for operator, parameter in zip(("Mul", "Add"), parameters, strict=False):
        column, found = f"{y}/{operator}/column", f"{y}/{operator}"
        nodes += [
            helper.make_node("Unsqueeze", [parameter, pixels], [column], name=column),
            helper.make_node(operator, [nodes[-1].output[0], column], [found], name=found),
        ]
    nodes[-1].name, nodes[-1].output[0] = node.name, y
    return nodes


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}
