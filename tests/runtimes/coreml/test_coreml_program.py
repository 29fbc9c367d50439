# SPDX-License-Identifier: Apache-2.0
"""A package opens only when every part of it is there and fits; what is wrong is said in one sentence."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
from turbopocket.runtimes.coreml.file.program import Program
from turbopocket.runtimes.manifest import TensorSpec

from .conftest import (
    MODEL_PATH,
    WEIGHTS_PATH,
    Attentive,
    Model,
    Written,
    convert_module,
    converting,
    ct,
    weights,
    written_sum,
)

X = np.ones((2, 3), np.float32)


def test_tensors_operations_and_weights(small: Path) -> None:
    program = Program.open(small)
    assert program.inputs == [TensorSpec(name="x", dtype="float32", shape=[2, 3])]
    assert program.outputs == [TensorSpec(name="y", dtype="float32", shape=[2, 3])]
    assert [operation.kind for operation in program.operations] == ["add", "add"]
    stored = weights(program)
    np.testing.assert_array_equal(stored["w"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(stored["v"], [[0.5, -1, 2], [4, 2, -1]])
    np.testing.assert_array_equal(Evaluator(program).run({"x": X})["y"], X + stored["w"] + stored["v"])


def test_open_needs_no_pytorch_of_ours() -> None:
    """The reader itself is numpy and the protobuf: PyTorch is the evaluator's (coremltools imports it where it is)."""
    code = "import sys, turbopocket.runtimes.coreml.file.program; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_absent_coremltools_is_one_clear_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "coremltools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(TurbopocketError, match="Core ML packages need coremltools") as caught:
        Program.open(small)
    assert str(caught.value.hint).startswith("pip install coremltools==")


def changed_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(package: Path) -> None:
        found = json.loads((package / "Manifest.json").read_text())
        change(found)
        (package / "Manifest.json").write_text(json.dumps(found))

    return apply


def changed_blob(offset: int, value: bytes) -> Callable[[Path], None]:
    def apply(package: Path) -> None:
        content = bytearray((package / WEIGHTS_PATH).read_bytes())
        content[offset : offset + len(value)] = value
        (package / WEIGHTS_PATH).write_bytes(content)

    return apply


def changed_model(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(package: Path) -> None:
        model = Model.FromString((package / MODEL_PATH).read_bytes())
        change(model)
        (package / MODEL_PATH).write_bytes(model.SerializeToString())

    return apply


def block(model: Any) -> Any:
    return model.mlProgram.functions["main"].block_specializations["CoreML8"]


def first_weight(model: Any) -> Any:
    return block(model).operations[0].attributes["val"]


def retyped(index: int, dtype: int, shape: tuple[int, ...]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = block(model).operations[index].outputs[0].type.tensorType
        tensor.dataType, tensor.rank = dtype, len(shape)
        del tensor.dimensions[:]
        for size in shape:
            tensor.dimensions.add().constant.size = size

    return change


def to_symlink(package: Path) -> None:
    weights = package / WEIGHTS_PATH
    weights.rename(package / "elsewhere.bin")
    weights.symlink_to(package / "elsewhere.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "Manifest.json").unlink(), "is not a Core ML package: it holds no Manifest.json"),
        (lambda p: (p / "Manifest.json").write_bytes(b"\xff{"), "Manifest.json is not UTF-8 text"),
        (lambda p: (p / "Manifest.json").write_text("[" * 100_000), "Manifest.json is not JSON"),
        (lambda p: (p / "Manifest.json").write_text("[]"), "Manifest.json must hold an object"),
        (changed_manifest(lambda m: m.update(fileFormatVersion="2.0.0")), "must have fileFormatVersion 1.0.0"),
        (changed_manifest(lambda m: m.update(rootModelIdentifier="x")), "no item of its rootModelIdentifier 'x'"),
        (changed_manifest(lambda m: m.update(rootModelIdentifier="weights")), "weights is not a file"),
        (
            changed_manifest(lambda m: m["itemInfoEntries"]["model"].update(path="../Manifest.json")),
            "names '../Manifest.json', which is not a plain relative path",
        ),
        (
            changed_manifest(lambda m: m["itemInfoEntries"]["weights"].update(path="com.apple.CoreML/w")),
            "com.apple.CoreML/w is missing",
        ),
        (changed_manifest(lambda m: m["itemInfoEntries"]["weights"].update(path="w" * 300)), "w is missing"),
        (changed_manifest(lambda m: m["itemInfoEntries"]["model"].update(author="me")), "not by com.apple.CoreML"),
        (lambda p: (p / MODEL_PATH).unlink(), "model.mlmodel is missing"),
        (lambda p: (p / MODEL_PATH).write_bytes((p / MODEL_PATH).read_bytes()[:-50]), "is not a Core ML model"),
        (lambda p: (p / MODEL_PATH).write_bytes(b""), "only ML programs are supported"),
        (lambda p: (p / WEIGHTS_PATH).unlink(), "weight.bin is missing"),
        (to_symlink, "weight.bin is missing"),
        (lambda p: (p / WEIGHTS_PATH).write_bytes(b"123"), "has 3 bytes, a weight file has at least 64"),
        (changed_blob(4, struct.pack("<I", 1)), "is a weight file of version 1: this version reads 2"),
        (changed_blob(64, b"\0\0\0\0"), "no blob at 64: found 0x0, a blob begins 0xdeadbeef"),
        (changed_blob(68, struct.pack("<I", 1)), r"holds FLOAT16 in 24 bytes.*expects FLOAT32 \[2, 3\]"),
        (changed_blob(68, struct.pack("<I", 77)), r"holds type 77"),
        (changed_blob(72, struct.pack("<Q", 20)), r"holds FLOAT32 in 20 bytes"),
        (changed_blob(72, struct.pack("<Q", 2**62)), r"has bytes 128 to \d+ of"),
        (changed_blob(80, struct.pack("<Q", 2**63)), r"has bytes 9223372036854775808 to"),
        (changed_blob(80, struct.pack("<Q", 129)), r"has bytes 129 to"),
        (changed_blob(88, struct.pack("<Q", 3)), r"3 bits idle"),
        (
            lambda p: (p / WEIGHTS_PATH).write_bytes((p / WEIGHTS_PATH).read_bytes()[:150]),
            "has bytes 128 to 152 of 150",
        ),
        (changed_model(lambda m: setattr(first_weight(m).blobFileValue, "offset", 2**40)), "no blob at 1099511627776"),
        (changed_model(lambda m: setattr(first_weight(m).blobFileValue, "offset", 65)), "no blob at 65"),
        (
            changed_model(
                lambda m: setattr(first_weight(m).blobFileValue, "fileName", "@model_path/../../Manifest.json")
            ),
            "not a plain relative path",
        ),
        (
            changed_model(lambda m: setattr(first_weight(m).blobFileValue, "fileName", "/etc/passwd")),
            "does not begin with",
        ),
        (changed_model(lambda m: first_weight(m).ClearField("blobFileValue")), "has no value that is a tensor"),
        (
            changed_model(lambda m: first_weight(m).immediateValue.tensor.floats.values.append(1)),
            "of 6 floats, found 1",
        ),
        (changed_model(lambda m: first_weight(m).immediateValue.tensor.ints.values.append(1)), "written as ints"),
        (changed_model(retyped(0, 11, (3, 2))), r"const w is declared FLOAT32 \[3, 2\], its value is FLOAT32 \[2, 3\]"),
        (changed_model(retyped(2, 99, (2, 3))), "has the unknown dtype number 99"),
        (changed_model(retyped(2, 12, (2, 3))), "has dtype FLOAT64: supported are BOOL"),
        (changed_model(retyped(2, 11, (2**40, 2**40))), "at most 2147483648 values"),
        (
            changed_model(lambda m: setattr(block(m).operations[2].outputs[0].type.tensorType, "rank", 5)),
            "has rank 5 and 2 dimensions",
        ),
        (
            changed_model(
                lambda m: block(m).operations[2].outputs[0].type.tensorType.dimensions[0].unknown.SetInParent()
            ),
            "a shape that varies",
        ),
        (
            changed_model(lambda m: block(m).operations[2].outputs[0].type.listType.SetInParent()),
            "is a listType, only tensors are supported",
        ),
        (
            changed_model(lambda m: setattr(block(m).operations[2].inputs["y"].arguments[0], "name", "y")),
            "op add s: y is 'y', not known yet",
        ),
        (changed_model(lambda m: setattr(block(m).operations[3].outputs[0], "name", "s")), "value s is computed twice"),
        (changed_model(lambda m: block(m).outputs.append("z")), "output z of function main is computed nowhere"),
        (changed_model(lambda m: block(m).operations[2].blocks.add()), "control flow is not supported"),
        (
            changed_model(lambda m: setattr(block(m).operations[1].inputs["indices"].arguments[0], "name", "x")),
            "indices is not one stored value",
        ),
        (
            changed_model(lambda m: setattr(m.mlProgram.functions["main"], "opset", "CoreML7")),
            "function main has no block of its opset 'CoreML7'",
        ),
        (changed_model(lambda m: setattr(m.description.input[0], "name", "z")), "the description's inputs are z"),
        (
            changed_model(lambda m: setattr(m.description.output[0].type.multiArrayType, "dataType", 65552)),
            r"the description has output y as float16 \[2, 3\], the program as float32 \[2, 3\]",
        ),
        (
            changed_model(lambda m: m.description.output[0].type.multiArrayType.shape.append(1)),
            r"output y as float32 \[2, 3, 1\], the program as float32 \[2, 3\]",
        ),
        (
            changed_model(lambda m: m.description.input[0].type.multiArrayType.shapeRange.SetInParent()),
            r"\[2, 3\] and flexible",
        ),
        (changed_model(lambda m: m.description.input[0].type.imageType.SetInParent()), "input x is an imageType"),
    ],
)
def test_damage_is_named(small: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(small)
    with pytest.raises(TurbopocketError, match=message) as caught:
        Program.open(small)
    assert str(small) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: setattr(block(m).operations[2], "type", "warp"), "op warp s is not known to this evaluator"),
        (
            lambda m: block(m).operations[2].inputs["z"].CopyFrom(block(m).operations[2].inputs["y"]),
            "op add s has the unknown parameter z: known are x, y",
        ),
        (lambda m: block(m).operations[2].inputs["y"].arguments.add(name="x"), "op add s: y: one value is expected"),
        (retyped(2, 11, (3, 2)), r"op add s: the result is \[2, 3\], declared FLOAT32 \[3, 2\]"),
        (retyped(2, 23, (2, 3)), r"op add s is declared INT32 \[2, 3\], computed float \[2, 3\]"),
    ],
)
def test_ops_that_do_not_fit_are_named(small: Path, damage: Callable[[Any], Any], message: str) -> None:
    changed_model(damage)(small)
    with pytest.raises(TurbopocketError, match=message) as caught:
        Evaluator(Program.open(small)).run({"x": X})
    assert str(small) in str(caught.value)


def test_short_integers_are_written_as_long_ones(tmp_path: Path) -> None:
    for number, allowed in ((40000, True), (70000, False)):
        written = written_sum()
        written.op("const", {"n": ("UINT16", (1,))}, {}, {"val": written.inline("UINT16", [number])})
        package = written.save(tmp_path / f"{number}.mlpackage")
        if allowed:
            assert Program.open(package).constant("n") == number
        else:
            with pytest.raises(TurbopocketError, match=r"val of op const n is UINT16 \[1\]"):
                Program.open(package)


def test_too_many_compressions_of_one_value_are_refused(tmp_path: Path) -> None:
    written = Written()
    scale = written.inline("FLOAT32", np.ones((1,)))
    data: Any = scale
    for depth in range(9):
        written.op("constexpr_blockwise_shift_scale", {f"v{depth}": ("FLOAT32", (1,))}, {"data": data, "scale": scale})
        data = f"v{depth}"
    written.op("identity", {"y": ("FLOAT32", (1,))}, {"x": "x"})
    written.ends({"x": (1,)}, {"y": (1,)})
    with pytest.raises(TurbopocketError, match="v8 is the 9th compression of one value"):
        Program.open(written.save(tmp_path / "deep.mlpackage"))


def test_functions_are_chosen_by_name(tmp_path: Path, attentive: tuple[Attentive, Any]) -> None:
    net, x = attentive
    packages = {}
    for name, factor in (("plain", 1.0), ("louder", 2.0)):
        louder = Attentive()
        louder.load_state_dict(net.state_dict() | {"conv_out.bias": net.conv_out.bias.detach() * factor})
        packages[name] = tmp_path / f"{name}.mlpackage"
        convert_module(louder, {"x": x}).save(str(packages[name]))
    description = ct.utils.MultiFunctionDescriptor()
    for name, package in packages.items():
        description.add_function(str(package), src_function_name="main", target_function_name=name)
    description.default_function_name = "louder"
    with converting():
        ct.utils.save_multifunction(description, str(tmp_path / "both.mlpackage"))
    inputs = {"x": x.numpy()}
    alone = {name: Evaluator(Program.open(package)).run(inputs)["y"] for name, package in packages.items()}
    for name, expected in alone.items():
        both = Evaluator(Program.open(tmp_path / "both.mlpackage", name)).run(inputs)["y"]
        np.testing.assert_array_equal(both, expected)
    by_default = Evaluator(Program.open(tmp_path / "both.mlpackage")).run(inputs)["y"]
    np.testing.assert_array_equal(by_default, alone["louder"])
    assert np.abs(alone["plain"] - alone["louder"]).max() > 0
    with pytest.raises(TurbopocketError, match="has no function 'main': it has louder, plain"):
        Program.open(tmp_path / "both.mlpackage", "main")
