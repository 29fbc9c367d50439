# SPDX-License-Identifier: Apache-2.0
"""What a stranger's graph takes: no more memory than there is, and an end."""

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.reading import one_sentence
from turbopocket.runtimes import limits
from turbopocket.runtimes.onnx.session import open_session, run_session

ONE = {"x": np.ones(1, np.float32)}

ASKS_FOR_TOO_MUCH = """
import resource, sys
from unittest import mock
import numpy as np
from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.reading import one_sentence
from turbopocket.runtimes import limits
from turbopocket.runtimes.onnx.session import open_session, run_session

one = {"x": np.ones(1, np.float32)}
session = open_session(sys.argv[1])
before = resource.getrlimit(resource.RLIMIT_DATA)
try:
    with mock.patch.object(limits, "available_bytes", lambda: 2**29), one_sentence("unet"):
        run_session(session, ["y"], one)
except TurbopocketError as error:
    print(error)
assert resource.getrlimit(resource.RLIMIT_DATA) == before
assert run_session(session, ["y"], one)[0] == 1
"""


def doubling(path: Path, times: int) -> Path:
    """A graph that no stated shape is large in: its input joined with itself, again and again."""
    names = ["x", *(f"x{index}" for index in range(times))]
    nodes = [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in itertools.pairwise(names)]
    nodes.append(helper.make_node("ReduceMax", [names[-1]], ["y"], keepdims=1))
    return saved(path, nodes)


def endless(path: Path, folded: bool) -> Path:
    """A graph that counts for ever: in a run, or while it is opened and what is constant is computed."""
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["go_on"], value=yes),
            helper.make_node("Add", ["before", "step"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [1]),
        ],
    )
    begin = "step" if folded else "x"
    nodes = [
        helper.make_node("Loop", ["", "", begin], ["end"], body=body),
        helper.make_node("Add", ["x", "end"], ["y"]),
    ]
    return saved(path, nodes)


def saved(path: Path, nodes: list[onnx.NodeProto]) -> Path:
    one = [numpy_helper.from_array(np.ones(1, np.float32), "step")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "graph", [x], [y], one), opset_imports=[helper.make_opsetid("", 21)]
    )
    model.ir_version = 10
    onnx.save(model, path)
    return path


def test_more_memory_than_there_is_is_an_error(tmp_path: Path) -> None:
    """In a process of its own: one that has run other tests may hold freed memory, which no limit counts again."""
    path = doubling(tmp_path / "a.onnx", 28)  # a gigabyte, and half of it before
    run = subprocess.run([sys.executable, "-c", ASKS_FOR_TOO_MUCH, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.match(r"unet: .*(alloc|memory)", run.stdout)


@pytest.mark.parametrize("folded", [False, True], ids=["run", "opened"])
def test_what_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folded: bool) -> None:
    path = endless(tmp_path / "a.onnx", folded)
    monkeypatch.setattr(limits, "MOST_SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(TurbopocketError, match=r"^unet: it was stopped after 2 s without an end"), one_sentence("unet"):
        run_session(open_session(str(path)), ["y"], ONE)
    assert time.monotonic() - start < 60


def test_available_memory_is_what_the_system_says() -> None:
    available = limits.available_bytes()
    assert available is not None
    assert 2**26 < available < 2**50
