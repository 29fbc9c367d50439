# SPDX-License-Identifier: Apache-2.0
"""The codebook kernels against dense weights in the same micro-kernel and against ONNX Runtime, on one thread.

    make kernels && cmake --build build/kernels/release --target codebook_dense
    python benchmarks/codebook_kernel.py [--out benchmarks/results/codebook_kernel.json]

Contestants take turns within one process, and times are the calling thread's processor time, so that other work on the
machine slows all alike; read the ratios. Memory is the growth of a fresh process's resident set, files' pages included,
from before a stack of layers is opened to after its first run.
"""

import argparse
import ctypes
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

from turbopocket.export.targets.onnx.trace import DOMAIN
from turbopocket.runtimes.kernels.core_library import CodebookWeights, Conv2dLayer, CoreLibrary
from turbopocket.runtimes.kernels.library import onnx_operators
from turbopocket.runtimes.onnx.memory import resident_bytes
from turbopocket.runtimes.onnx.session import open_session

Array = NDArray[Any]
BUILD = Path(__file__).parents[1] / "build" / "kernels" / "release"
WIDTH, LENGTH = 1280, 8
ROWS = {256: 21, 1024: 11, 4096: 7}
CONV2D = {32: 11, 64: 7}
CHANNELS = 320
LAYERS = 96
BLOCK = 32
RNG = np.random.default_rng(0)


def random_weights(outputs: int, columns: int, books: int) -> CodebookWeights:
    """Values of the size that a trained layer's have: outputs of about 1 for inputs of about 1."""
    return CodebookWeights(
        RNG.integers(0, 256, (outputs, columns // LENGTH, books), dtype=np.uint8),
        RNG.standard_normal((books, 256, LENGTH)).astype(np.float16),
        np.full(outputs, (books * columns) ** -0.5, np.float16),
    )


def body(books: int, product: list[NodeProto]) -> list[NodeProto]:
    """Codes, codebooks and scale to `rows` [O, K] by standard operators, then the product."""
    nodes = [helper.make_node("Cast", ["codebooks"], ["books"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.INT32)]
    for book in range(books):
        nodes += [
            helper.make_node("Constant", [], [f"i{book}"], value_int=book),
            helper.make_node("Gather", ["books", f"i{book}"], [f"book{book}"], axis=0),
            helper.make_node("Gather", ["wide", f"i{book}"], [f"codes{book}"], axis=2),
            helper.make_node("Gather", [f"book{book}", f"codes{book}"], [f"part{book}"], axis=0),
        ]
    if books == 2:
        nodes += [helper.make_node("Add", ["part0", "part1"], ["vectors"])]
    return [
        *nodes,
        helper.make_node("Constant", [], ["flat"], value_ints=[0, -1]),
        helper.make_node("Reshape", ["vectors" if books == 2 else "part0", "flat"], ["unscaled"]),
        helper.make_node("Cast", ["scale"], ["scale32"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["column"], value_ints=[-1, 1]),
        helper.make_node("Reshape", ["scale32", "column"], ["factor"]),
        helper.make_node("Mul", ["unscaled", "factor"], ["rows"]),
        *product,
    ]


def codebook_stack(layers: list[CodebookWeights], width: int = WIDTH) -> ModelProto:
    """Linear layers one after the other, as our operator with its body."""
    product = [
        helper.make_node("Transpose", ["rows"], ["transposed"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "transposed"], ["y"]),
    ]
    opset, parts = helper.make_opsetid("", 21), ["codes", "codebooks", "scale"]
    books = layers[0].codes.shape[2]
    operator = f"CodebookLinear{books}"
    function = helper.make_function(DOMAIN, operator, ["x", *parts], ["y"], body(books, product), [opset])
    graph = helper.make_graph([], "stack", [value("x0", width)], [value(f"x{len(layers)}", width)])
    for i, weights in enumerate(layers):
        names = [f"{part}{i}" for part in parts]
        graph.node.append(helper.make_node(operator, [f"x{i}", *names], [f"x{i + 1}"], domain=DOMAIN))
        graph.initializer.extend(from_array(getattr(weights, part), f"{part}{i}") for part in parts)
        graph.input.append(helper.make_tensor_value_info(f"codes{i}", TensorProto.UINT8, weights.codes.shape))
    return helper.make_model(
        graph, functions=[function], opset_imports=[opset, helper.make_opsetid(DOMAIN, 1)], ir_version=10
    )


def value(name: str, width: int = WIDTH) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])


def one_node(
    node: NodeProto, arrays: Mapping[str, Array], x: onnx.ValueInfoProto, y: onnx.ValueInfoProto
) -> ModelProto:
    graph = helper.make_graph([node], "layer", [x], [y], [from_array(array, name) for name, array in arrays.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def matmul(dense: Array) -> ModelProto:
    node = helper.make_node("MatMul", ["x0", "w"], ["x1"])
    return one_node(node, {"w": np.ascontiguousarray(dense.T)}, value("x0"), value("x1"))


def matmul_nbits(accuracy_level: int) -> ModelProto:
    """4-bit weights with a scale for every 32; values do not change its speed."""
    blocks = WIDTH // BLOCK
    arrays = {
        "codes": RNG.integers(0, 256, (WIDTH, blocks, BLOCK // 2), dtype=np.uint8),
        "scales": RNG.uniform(0.5, 1, WIDTH * blocks).astype(np.float32),
    }
    sizes = {"K": WIDTH, "N": WIDTH, "bits": 4, "block_size": BLOCK, "accuracy_level": accuracy_level}
    node = helper.make_node("MatMulNBits", ["x0", *arrays], ["x1"], domain="com.microsoft", **sizes)
    return one_node(node, arrays, value("x0"), value("x1"))


def in_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Each one's median milliseconds of processor time; all run once before."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.thread_time()
            run()
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: median(each) for name, each in times.items()}


def session_run(model: ModelProto, x: Array, operators: Path | None = None) -> Callable[[], Any]:
    session = open_session(model.SerializeToString(), threads=1, operators=operators)
    return lambda: session.run(None, {session.get_inputs()[0].name: x})


def dense_run(dense: Array, x: Array) -> Callable[[], Array]:
    """The core's loops on packed dense weights."""
    library = ctypes.CDLL(str(BUILD / "libcodebook_dense.so"))
    packed, y = np.empty(WIDTH * WIDTH, np.float32), np.empty((len(x), WIDTH), np.float32)
    at, size = (lambda array: ctypes.c_void_p(array.ctypes.data)), ctypes.c_int64
    library.dense_pack(at(dense), size(WIDTH), size(WIDTH), at(packed))

    def run() -> Array:
        library.dense_linear(at(packed), size(WIDTH), size(WIDTH), at(x), size(len(x)), at(y))
        return y

    return run


def linear_figures(core: CoreLibrary, path: str) -> dict[str, Any]:
    figures = {}
    one, two = (random_weights(WIDTH, WIDTH, books) for books in (1, 2))
    dense = core.decode(two)
    for rows, rounds in ROWS.items():
        x = RNG.standard_normal((rows, WIDTH), np.float32)
        packed = dense_run(dense, x)
        assert np.allclose(packed(), core.linear(two, x, path), rtol=0, atol=1e-4)
        ms = in_turns(
            {
                "same micro-kernel, dense packed": packed,
                "codebook kernel, 1 book": lambda x=x: core.linear(one, x, path),
                "codebook kernel, 2 books": lambda x=x: core.linear(two, x, path),
                "ONNX Runtime, our operator, 2 books": session_run(codebook_stack([two]), x, onnx_operators()),
                "ONNX Runtime, the operator's body, 2 books": session_run(codebook_stack([two]), x),
                "ONNX Runtime, MatMul fp32": session_run(matmul(dense), x),
                "ONNX Runtime, MatMulNBits 4 bits, fp32 arithmetic": session_run(matmul_nbits(1), x),
                "ONNX Runtime, MatMulNBits 4 bits, int8 arithmetic": session_run(matmul_nbits(4), x),
            },
            rounds,
        )
        baseline = ms["same micro-kernel, dense packed"]
        figures[str(rows)] = {
            "ms": ms,
            "gflops": {name: 2e-6 * rows * WIDTH * WIDTH / each for name, each in ms.items()},
            "throughput_to_dense_packed": {name: baseline / each for name, each in ms.items()},
        }
    return figures


def conv2d_figures(core: CoreLibrary, path: str) -> dict[str, Any]:
    figures, layer = {}, Conv2dLayer((3, 3), padding=(1, 1, 1, 1))
    one, two = (random_weights(CHANNELS, 9 * CHANNELS, books) for books in (1, 2))
    weight = np.ascontiguousarray(core.decode(two).reshape(CHANNELS, 3, 3, CHANNELS).transpose(0, 3, 1, 2))
    node = helper.make_node("Conv", ["x0", "w"], ["x1"], pads=[1, 1, 1, 1])
    for size, rounds in CONV2D.items():
        shape = (1, CHANNELS, size, size)
        x = RNG.standard_normal(shape, np.float32)
        ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", "x1"))
        ms = in_turns(
            {
                "codebook kernel, 1 book": lambda x=x: core.conv2d(one, layer, x, path),
                "codebook kernel, 2 books": lambda x=x: core.conv2d(two, layer, x, path),
                "ONNX Runtime, Conv fp32": session_run(one_node(node, {"w": weight}, *ends), x),
            },
            rounds,
        )
        figures[f"{size}x{size}"] = {
            "ms": ms,
            "gflops": {name: 18e-6 * (size * CHANNELS) ** 2 / each for name, each in ms.items()},
            "throughput_to_onnxruntime": {name: ms["ONNX Runtime, Conv fp32"] / each for name, each in ms.items()},
        }
    return figures


def memory_figures(core: CoreLibrary, folder: Path) -> dict[str, Any]:
    """Resident growth of a stack of layers by what runs it, in fresh processes."""
    layers = [random_weights(WIDTH, WIDTH, 2) for _ in range(LAYERS)]
    compressed = sum(part.nbytes for each in layers for part in (each.codes, each.codebooks, each.scale))
    small = codebook_stack([random_weights(64, 64, 2)], 64)
    onnx.save(small, folder / "warm.onnx")
    onnx.save(codebook_stack(layers), folder / "stack.onnx", save_as_external_data=True, location="stack.data")
    figures = {"layers": LAYERS, "compressed_weights_bytes": compressed}
    figures["scratch_bytes"] = core.scratch_bytes_per_thread() + 2 * 256 * LENGTH * 4
    for name, flag in (("kernel", "with"), ("body", "without")):
        command = [sys.executable, __file__, "--grow", str(folder), flag]
        growth = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        allowed = 1.1 * compressed + figures["scratch_bytes"]
        figures[name] = growth | {"to_compressed": growth["resident"] / compressed, "allowed_bytes": allowed}
    return figures


def grow(folder: Path, operators: Path | None) -> dict[str, int]:
    """Bytes by which this process grows when the stack is opened and run; one narrow layer has run before."""
    x = np.zeros((16, WIDTH), np.float32)  # few, so that activations are small beside weights
    open_session(str(folder / "warm.onnx"), threads=1, operators=operators).run(None, {"x0": x[:, :64].copy()})
    before = resident_bytes()
    session = open_session(str(folder / "stack.onnx"), threads=1, operators=operators)
    session.run(None, {"x0": x})
    after = resident_bytes()
    anonymous, files = (after[name] - before[name] for name in ("RssAnon", "RssFile"))
    peak = after["VmHWM"] - before["RssAnon"] - before["RssFile"]
    return {"resident": anonymous + files, "anonymous": anonymous, "files": files, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/codebook_kernel.json"))
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.grow:
        folder, flag = arguments.grow
        print(json.dumps(grow(Path(folder), onnx_operators() if flag == "with" else None)))
        return
    core = CoreLibrary(BUILD / "libcodebook.so")
    path = core.paths()[1]  # what the dense baseline is compiled for
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            "machine": f"{platform.system()} {platform.machine()}",
            "path": path,
            "linear": {"width": WIDTH, "vector_length": LENGTH, "rows": linear_figures(core, path)},
            "conv2d": {"channels": CHANNELS, "kernel": [3, 3], "sizes": conv2d_figures(core, path)},
            "memory": memory_figures(core, Path(folder)),
        }
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
