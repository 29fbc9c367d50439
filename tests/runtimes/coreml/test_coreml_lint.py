# SPDX-License-Identifier: Apache-2.0
"""Lint passes what coremltools writes and names what a device would refuse, as far as files can tell."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbopocket.runtimes.coreml.lint import UNVERIFIED, lint

from .conftest import MODEL_PATH, WEIGHTS_PATH, Attentive, Model, Written, convert_module, written_sum


@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18", "iOS26"])
@pytest.mark.parametrize("precision", ["FLOAT16", "FLOAT32"])
def test_what_coremltools_writes_passes(
    tmp_path: Path, attentive: tuple[Attentive, Any], target: str, precision: str
) -> None:
    net, x = attentive
    convert_module(net, {"x": x}, target, precision).save(str(tmp_path / "net.mlpackage"))
    report = lint(tmp_path / "net.mlpackage")
    assert report.errors == ()
    assert report.passed
    assert (report.target, report.functions) == (target, ("main",))
    assert report.not_verified_on_device == UNVERIFIED
    # the epsilons of both norms, 1e-5, are below fp16's normal numbers
    assert len(report.warnings) == (2 if precision == "FLOAT16" else 0)


def test_written_package_passes(small: Path) -> None:
    assert lint(small).errors == ()
    assert lint(small).warnings == ()


def changed(change: Callable[[Any, Any], Any]) -> Callable[[Path], None]:
    """Changes the model and its main block."""

    def apply(package: Path) -> None:
        model = Model.FromString((package / MODEL_PATH).read_bytes())
        function = model.mlProgram.functions["main"]
        change(model, function.block_specializations[function.opset])
        (package / MODEL_PATH).write_bytes(model.SerializeToString())

    return apply


def rewritten_opset(opset: str, version: int) -> Callable[[Path], None]:
    def apply(package: Path) -> None:
        model = Model.FromString((package / MODEL_PATH).read_bytes())
        function = model.mlProgram.functions["main"]
        function.block_specializations[opset].CopyFrom(function.block_specializations[function.opset])
        del function.block_specializations[function.opset]
        function.opset, model.specificationVersion = opset, version
        (package / MODEL_PATH).write_bytes(model.SerializeToString())

    return apply


def counted(count: int) -> Callable[[Path], None]:
    def apply(package: Path) -> None:
        content = (package / WEIGHTS_PATH).read_bytes()
        (package / WEIGHTS_PATH).write_bytes(struct.pack("<I", count) + content[4:])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "debug.json").write_text("{}"), "debug.json belongs to nothing in the package"),
        (
            lambda p: (p / WEIGHTS_PATH).with_name("more.bin").write_text(""),
            "more.bin belongs to nothing in the package",
        ),
        (lambda p: (p / "link").symlink_to("Manifest.json"), "link is not a plain file"),
        (lambda p: (p / WEIGHTS_PATH).unlink(), "weight.bin is missing"),
        (changed(lambda m, b: setattr(m, "specificationVersion", 5)), "specification version 5 is not known"),
        (changed(lambda m, b: setattr(m, "specificationVersion", 8)), "CoreML8, which needs version 9"),
        (rewritten_opset("CoreML99", 9), "written in CoreML99: known are CoreML5"),
        (rewritten_opset("CoreML7", 9), "op constexpr_lut_to_dense v: has no shape"),
        (rewritten_opset("CoreML5", 9), "op constexpr_lut_to_dense v: iOS15 has no such op"),
        (changed(lambda m, b: setattr(b.operations[2], "type", "warp")), "op warp s: iOS18 has no such op"),
        (
            changed(lambda m, b: b.operations[2].inputs["z"].CopyFrom(b.operations[2].inputs["x"])),
            "op add s: z is not known to iOS18: known are x, y",
        ),
        (counted(2), "announces 2 blobs; the 2 there end at"),
        (counted(2**32 - 1), "no blob at"),
    ],
)
def test_faults_are_errors(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    package = written_sum().save(tmp_path / "faulty.mlpackage")
    damage(package)
    report = lint(package)
    assert not report.passed
    assert any(re.search(message, error) for error in report.errors), report.errors


def test_types_and_constness_are_checked(tmp_path: Path) -> None:
    written = Written()
    written.op("cast", {"i": ("INT32", (2, 3))}, {"x": "x", "dtype": written.inline("STRING", "int32")})
    written.op("silu", {"a": ("INT32", (2, 3))}, {"x": "i"})
    written.op("linear", {"b": ("FLOAT32", (2, 2))}, {"x": "x", "weight": "x"})
    written.op("add", {"y": ("FLOAT32", (2, 3))}, {"x": "x", "y": "i"})
    written.ends({"x": (2, 3)}, {"y": (2, 3)})
    errors = lint(written.save(tmp_path / "types.mlpackage")).errors
    assert "op silu a: x is int32: allowed are fp16, fp32" in errors
    assert "op linear b: weight is computed, it must be stored" in errors
    assert "op add y: y is INT32 where another parameter of the same type is FLOAT32" in errors


def test_idle_blobs_and_bad_numbers_are_warnings(tmp_path: Path) -> None:
    written = written_sum()
    written.blob("FLOAT16", np.zeros(10))
    for name, value in (("tiny", 1e-6), ("huge", np.inf), ("fine", 1.0), ("zero", 0.0)):
        written.op("const", {name: ("FLOAT16", ())}, {}, {"val": written.inline("FLOAT16", value)})
    report = lint(written.save(tmp_path / "warned.mlpackage"))
    assert report.errors == ()
    assert report.warnings == (
        "const tiny is 1.01e-06, below fp16's smallest normal number 6.10e-05",
        "const huge is not finite in fp16",
        "weight.bin has 1 blobs of 20 bytes that nothing reads",
    )
