# SPDX-License-Identifier: Apache-2.0
"""Our operators in ONNX Runtime: the kernel where the library is registered, the file's own body elsewhere."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

from turbopocket.export.targets.onnx.trace import DOMAIN
from turbopocket.runtimes.onnx.session import open_session

Array = NDArray[Any]
HEADERS = Path(__file__).parents[3] / "build" / "kernels" / "headers"
OUTPUTS, INPUTS, BOOKS, LENGTH = 40, 16, 2, 8
GEOMETRY = {"strides": [2, 1], "pads": [1, 0, 1, 2], "dilations": [1, 2]}


@pytest.fixture(scope="session")
def operators(cmake_build: Path) -> Path:
    if not (HEADERS / "onnxruntime_c_api.h").is_file():
        pytest.skip("no ONNX Runtime headers: make kernels fetches them")
    define = f"-DONNXRUNTIME_HEADERS={HEADERS}"
    for command in (["cmake", define, str(cmake_build)], ["cmake", "--build", str(cmake_build)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return cmake_build / "libcodebook_onnxruntime.so"


def weight_arrays(columns: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "codes": rng.integers(0, 256, (OUTPUTS, columns // LENGTH, BOOKS), dtype=np.uint8),
        "codebooks": rng.standard_normal((BOOKS, 256, LENGTH)).astype(np.float16),
        "scale": rng.uniform(0.5, 2, OUTPUTS).astype(np.float16),
        "bias": rng.standard_normal(OUTPUTS).astype(np.float32),
    }


def decoding() -> list[NodeProto]:
    """Nodes from codes, codebooks and scale to `rows` [O, K], of standard operators."""
    nodes = [helper.make_node("Cast", ["codebooks"], ["books"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.INT32)]
    for book in range(BOOKS):
        nodes += [
            helper.make_node("Constant", [], [f"i{book}"], value_int=book),
            helper.make_node("Gather", ["books", f"i{book}"], [f"book{book}"], axis=0),
            helper.make_node("Gather", ["wide", f"i{book}"], [f"codes{book}"], axis=2),
            helper.make_node("Gather", [f"book{book}", f"codes{book}"], [f"part{book}"], axis=0),
        ]
    return [
        *nodes,
        helper.make_node("Add", ["part0", "part1"], ["vectors"]),
        helper.make_node("Constant", [], ["flat"], value_ints=[0, -1]),
        helper.make_node("Reshape", ["vectors", "flat"], ["unscaled"]),
        helper.make_node("Cast", ["scale"], ["scale32"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["column"], value_ints=[-1, 1]),
        helper.make_node("Reshape", ["scale32", "column"], ["factor"]),
        helper.make_node("Mul", ["unscaled", "factor"], ["rows"]),
    ]


def linear_model(arrays: dict[str, Array], body: list[NodeProto] | None = None) -> ModelProto:
    product = [
        helper.make_node("Transpose", ["rows"], ["transposed"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "transposed"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    return model("CodebookLinear2Biased", arrays, body or [*decoding(), *product], ["batch", "tokens", INPUTS], {})


def conv2d_model(arrays: dict[str, Array], **changes: list[int]) -> ModelProto:
    attributes = {"weight_shape": [OUTPUTS, 3, 3, INPUTS], **GEOMETRY, **changes}
    taps, conv = helper.make_node("Constant", [], ["taps"]), helper.make_node("Conv", ["x", "weight", "bias"], ["y"])
    taps.attribute.append(AttributeProto(name="value_ints", ref_attr_name="weight_shape", type=AttributeProto.INTS))
    conv.attribute.extend(AttributeProto(name=name, ref_attr_name=name, type=AttributeProto.INTS) for name in GEOMETRY)
    product = [
        taps,
        helper.make_node("Reshape", ["rows", "taps"], ["channels_last"]),
        helper.make_node("Transpose", ["channels_last"], ["weight"], perm=[0, 3, 1, 2]),
        conv,
    ]
    return model(
        "CodebookConv2d2Biased", arrays, [*decoding(), *product], ["batch", INPUTS, "height", "width"], attributes
    )


def model(
    name: str,
    arrays: dict[str, Array],
    body: list[NodeProto],
    x_shape: list[str | int],
    attributes: dict[str, list[int]],
) -> ModelProto:
    opset = helper.make_opsetid("", 21)
    function = helper.make_function(DOMAIN, name, ["x", *arrays], ["y"], body, [opset], list(attributes))
    node = helper.make_node(name, ["x", *arrays], ["y"], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "layer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape),
            helper.make_tensor_value_info("codes", TensorProto.UINT8, arrays["codes"].shape),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [from_array(array, part) for part, array in arrays.items()],
    )
    opsets = [opset, helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def run(model: ModelProto, x: Array, operators: Path | None) -> Array:
    return open_session(model.SerializeToString(), threads=2, operators=operators).run(None, {"x": x})[0]


def assert_same(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_linear_kernel_computes_what_the_body_does(operators: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, 7, INPUTS), np.float32)
    layer = linear_model(weight_arrays(INPUTS))
    assert_same(run(layer, x, operators), run(layer, x, None))


def test_conv2d_kernel_computes_what_the_body_does(operators: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, INPUTS, 9, 12), np.float32)
    layer = conv2d_model(weight_arrays(9 * INPUTS))
    assert_same(run(layer, x, operators), run(layer, x, None))


def test_registered_library_is_what_runs(operators: Path) -> None:
    x = np.ones((1, 1, INPUTS), np.float32)
    decoy = linear_model(weight_arrays(INPUTS), body=[helper.make_node("Neg", ["x"], ["y"])])
    assert np.array_equal(run(decoy, x, None), -x)
    assert run(decoy, x, operators).shape == (1, 1, OUTPUTS)


def test_no_rows_are_no_work(operators: Path) -> None:
    layer = linear_model(weight_arrays(INPUTS))
    assert run(layer, np.empty((0, 3, INPUTS), np.float32), operators).shape == (0, 3, OUTPUTS)


def test_hostile_weights_are_refused_by_the_kernel_and_the_session_lives_on(operators: Path) -> None:
    x = np.ones((1, 1, INPUTS), np.float32)
    arrays = weight_arrays(INPUTS)
    few = {**arrays, "codebooks": arrays["codebooks"][:, :16]}
    session = open_session(linear_model(few).SerializeToString(), operators=operators)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="the codebooks have 16 entries"):
        session.run(None, {"x": x})
    assert session.run(None, {"x": x, "codes": arrays["codes"] % 16})[0].shape == (1, 1, OUTPUTS)
    for change, message in [
        ({"scale": arrays["scale"][:-1]}, "scale: has 39 values, codes have 40 outputs"),
        ({"codebooks": arrays["codebooks"][:1]}, "codebooks: 1 books, codes have 2"),
        ({"codebooks": arrays["codebooks"][..., :4]}, "x: rows of 16 values, the weights have 8 columns"),
    ]:
        with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=message):
            run(linear_model(arrays | change), x, operators)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_shape": [OUTPUTS, 3, 1, 3 * INPUTS]}, "weight_shape: outputs or inputs are not those of codes and x"),
        ({"strides": [0, 1]}, "stride 0, .*: out of range"),
        ({"pads": [-1, 0, 0, 0]}, "padding -1 and 0: out of range"),
        ({"dilations": [1 << 40, 1]}, "dilation 1099511627776, .*: out of range"),
    ],
)
def test_hostile_geometry_is_refused_by_the_kernel(operators: Path, change: dict[str, list[int]], message: str) -> None:
    layer = conv2d_model(weight_arrays(9 * INPUTS), **change)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=message):
        run(layer, np.ones((1, INPUTS, 9, 9), np.float32), operators)


def test_attribute_of_the_wrong_length_is_refused_when_the_graph_is_opened(operators: Path) -> None:
    layer = conv2d_model(weight_arrays(9 * INPUTS), strides=[1])
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.RuntimeException, match="wrong number of values"):
        open_session(layer.SerializeToString(), operators=operators)
