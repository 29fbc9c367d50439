# SPDX-License-Identifier: Apache-2.0
"""Graphs that nobody could stop are refused before a session is opened."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.onnx.bounds import require_bounded


def written(path: Path, nodes: list[Any], functions: list[Any] | None = None, **numbers: list[int]) -> Path:
    """A file with such a graph, whose whole numbers are these."""
    constants = [numpy_helper.from_array(np.array(values, dtype=np.int64), name) for name, values in numbers.items()]
    graph = helper.make_graph(nodes, "graph", [], [], constants)
    onnx.save(helper.make_model(graph, functions=functions or []), path)
    return path


def branch() -> Any:
    """A node with graphs of its own."""
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "body", [], [])
    return helper.make_node("If", ["c"], ["y"], name="either", then_branch=body, else_branch=body)


@pytest.mark.parametrize("within", ["graph", "function"])
def test_loops_and_branches_are_refused(tmp_path: Path, within: str) -> None:
    nodes, functions = [branch()], []
    if within == "function":
        opset = [helper.make_opsetid("", 21)]
        functions, nodes = [helper.make_function("own", "F", ["c", "x"], ["y"], nodes, opset)], []
    path = written(tmp_path / "a.onnx", nodes, functions)
    with pytest.raises(TurbopocketError, match=r"^unet: node 'either' \(If\) of .*a\.onnx runs a graph of its own"):
        require_bounded(path, "unet")


@pytest.mark.parametrize(
    ("operator", "inputs"), [("ConstantOfShape", ["n"]), ("Expand", ["x", "n"]), ("Tile", ["x", "n"])]
)
@pytest.mark.parametrize("as_node", [False, True])
def test_shapes_of_too_many_values_are_refused(tmp_path: Path, operator: str, inputs: list[str], as_node: bool) -> None:
    node = helper.make_node(operator, inputs, ["y"], name="much")
    for numbers, refused in (([2**15, 2**15], True), ([2**15, 2**14], False)):
        constant = helper.make_tensor("n", TensorProto.INT64, [2], numbers)
        nodes = [helper.make_node("Constant", [], ["n"], value=constant), node] if as_node else [node]
        path = written(tmp_path / "a.onnx", nodes, **({} if as_node else {"n": numbers}))
        if refused:
            with pytest.raises(TurbopocketError, match=r"node 'much' .* makes \[32768, 32768\]; .* 536,870,912 values"):
                require_bounded(path, "unet")
        else:
            require_bounded(path, "unet")


def test_what_is_no_graph_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(TurbopocketError, match=r"^unet: .*a\.onnx is none: "):
        require_bounded(tmp_path / "a.onnx", "unet")
