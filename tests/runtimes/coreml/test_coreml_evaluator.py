# SPDX-License-Identifier: Apache-2.0
"""Whole nets agree with PyTorch; each arithmetic does what it says; what leaves fp16 is found by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.coreml.evaluate.arithmetic import Arithmetic, to_fp16
from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
from turbopocket.runtimes.coreml.file.program import Program

from .conftest import Attentive, Written, convert_module, mb, save_built, snr_db

RNG = np.random.default_rng(11)
CONTRACT_DB = 100


def narrow() -> Arithmetic:
    return Arithmetic((), narrow=True)


@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18"])
def test_small_net_is_what_pytorch_computes(
    tmp_path: Path, attentive: tuple[Attentive, torch.Tensor], target: str
) -> None:
    net, x = attentive
    reference = net(x).detach().numpy()
    found = {}
    for precision in ("FLOAT32", "FLOAT16"):
        package = tmp_path / f"{precision}.mlpackage"
        convert_module(net, {"x": x}, target, precision).save(str(package))
        for mode in ("fp32", "fp16", "acc16"):
            output = Evaluator(Program.open(package), mode).run({"x": x.numpy()})["y"]  # type: ignore[arg-type]
            found[precision, mode] = snr_db(reference, output)
    assert min(found["FLOAT32", mode] for mode in ("fp32", "fp16", "acc16")) > CONTRACT_DB
    assert 90 > found["FLOAT16", "fp32"] > found["FLOAT16", "fp16"] > found["FLOAT16", "acc16"] - 0.5
    assert found["FLOAT16", "acc16"] > 50


def test_one_wrong_constant_is_heard(tmp_path: Path, attentive: tuple[Attentive, torch.Tensor]) -> None:
    """What the agreement is worth: the tanh form of one SiLU-sized change falls far below the contract."""
    net, x = attentive
    package = tmp_path / "net.mlpackage"
    convert_module(net, {"x": x}).save(str(package))
    reference = net(x).detach().numpy()
    with torch.no_grad():
        shifted = Attentive()
        shifted.load_state_dict(net.state_dict())
        shifted.to_q.weight[3, 5] += 0.01
    assert snr_db(reference, Evaluator(Program.open(package)).run({"x": x.numpy()})["y"]) > CONTRACT_DB
    assert snr_db(shifted(x).detach().numpy(), Evaluator(Program.open(package)).run({"x": x.numpy()})["y"]) < 90


def test_values_inside_are_returned_when_asked(small: Path) -> None:
    x = RNG.standard_normal((2, 3), dtype=np.float32)
    found = Evaluator(Program.open(small)).run({"x": x}, also=["s", "w", "x"])
    assert list(found) == ["y", "s", "w", "x"]
    np.testing.assert_array_equal(found["s"], x + found["w"])
    np.testing.assert_array_equal(found["x"], x)
    with pytest.raises(TurbopocketError, match="has no value 'q'"):
        Evaluator(Program.open(small)).run({"x": x}, also=["q"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "inputs are missing x"),
        ({"x": np.zeros((2, 3), np.float32), "z": np.zeros(1, np.float32)}, "unknown z"),
        ({"x": np.zeros((2, 3), np.float16)}, r"input x must be float32 \[2, 3\], found float16"),
        ({"x": np.zeros((3, 2), np.float32)}, r"input x must be float32 \[2, 3\], found \[3, 2\]"),
    ],
)
def test_unfit_inputs_are_refused(small: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        Evaluator(Program.open(small)).run(inputs)


def test_unknown_mode_is_refused(small: Path) -> None:
    with pytest.raises(TurbopocketError, match="mode 'bf16' is not known: known are fp32, fp16, acc16"):
        Evaluator(Program.open(small), "bf16")  # type: ignore[arg-type]


def half_program(path: Path, build: Any, x: np.ndarray) -> Program:
    """A program that computes in fp16 from a float32 input to a float32 output."""

    def main(x: Any) -> Any:
        return mb.cast(x=build(mb.cast(x=x, dtype="fp16", name="narrow")), dtype="fp32", name="out")

    return Program.open(save_built(path, main, {"x": x}))


def test_modes_round_where_the_program_says_fp16(tmp_path: Path) -> None:
    x = np.float32([[2049.0, 0.1]])
    program = half_program(tmp_path / "half.mlpackage", lambda x: mb.mul(x=x, y=np.float16(3), name="three"), x)
    exact = Evaluator(program, "fp32").run({"x": x}, also=["narrow", "three"])
    np.testing.assert_array_equal(exact["three"], x * 3)
    rounded = Evaluator(program, "fp16").run({"x": x}, also=["narrow", "three"])
    np.testing.assert_array_equal(rounded["narrow"], np.float32(np.float16(x)))
    np.testing.assert_array_equal(rounded["three"], np.float32(np.float16(np.float32(np.float16(x)) * 3)))


def test_fp16_ends_are_honoured_in_every_mode(tmp_path: Path) -> None:
    x = np.float16([[1.0, 2.0]])

    def main(x: Any) -> Any:
        return mb.mul(x=x, y=np.float16(40000), name="y")

    program = Program.open(save_built(tmp_path / "ends.mlpackage", main, {"x": x}))
    assert [spec.dtype for spec in (*program.inputs, *program.outputs)] == ["float16", "float16"]
    for mode in ("fp32", "fp16", "acc16"):
        found = Evaluator(program, mode).run({"x": x})["y"]  # type: ignore[arg-type]
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, np.float16([[40000, np.inf]]))


def looped_sum(products: np.ndarray) -> np.float32:
    """Blocks of 64 added exactly, rounded to fp16, and so is the running total."""
    total = None
    for start in range(0, len(products), 64):
        part = np.float16(products[start : start + 64].astype(np.float64).sum())
        total = part if total is None else np.float16(total + part)
    assert total is not None
    return np.float32(total)


@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_narrow_matmul_rounds_every_block(length: int) -> None:
    x, y = (to_fp16(torch.from_numpy(RNG.standard_normal((n, length), dtype=np.float32))) for n in (3, 4))
    found = narrow().matmul(x, y.T).numpy()
    expected = [[looped_sum(row.numpy() * column.numpy()) for column in y] for row in x]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-3, atol=1e-3)
    if length > 64:
        assert np.abs(found - (x @ y.T).numpy()).max() > 1e-3  # it does differ from adding in fp32
    assert (to_fp16(torch.from_numpy(found)).numpy() == found).all()


@pytest.mark.parametrize(
    ("groups", "strides", "dilations"), [(1, [1, 1], [1, 1]), (2, [2, 1], [1, 2]), (130, [1, 2], [1, 1])]
)
def test_narrow_convolution_is_the_convolution_up_to_rounding(
    groups: int, strides: list[int], dilations: list[int]
) -> None:
    x = torch.from_numpy(RNG.standard_normal((2, 130, 7, 6), dtype=np.float32))
    weight = torch.from_numpy(RNG.standard_normal((130, 130 // groups, 3, 2), dtype=np.float32))
    exact = F.conv2d(x, weight, None, strides, 0, dilations, groups)
    found = narrow().conv(x, weight, strides, dilations, groups)
    assert found.shape == exact.shape
    assert 50 < snr_db(exact.numpy(), found.numpy()) < 75


def test_narrow_sums_overflow_where_fp16_does_and_means_do_not() -> None:
    x = torch.full((1, 4096), 20.0)
    assert narrow().sum(x, [1]).item() == np.inf
    assert narrow().mean(x, [1]).item() == 20
    assert Arithmetic(()).sum(x, [1]).item() == 81920
    assert narrow().sum(torch.ones(2, 3, 5), [0, 2], keep=False).tolist() == [10, 10, 10]


def test_bound_is_the_sum_of_magnitudes(tmp_path: Path) -> None:
    weight = np.float16([[300.0, -300.0], [1.0, 1.0]])
    x = np.float32([[200.0, 201.0]])
    build = lambda x: mb.linear(x=x, weight=weight, name="sum")  # noqa: E731
    evaluator = Evaluator(half_program(tmp_path / "bound.mlpackage", build, x), "fp16", statistics=True)
    evaluator.run({"x": x})
    (record,) = [record for record in evaluator.statistics if record.name == "sum"]
    assert (record.kind, record.dtype, record.largest, record.bound) == ("linear", "FLOAT16", 401, 120300)
    assert record.may_overflow
    assert record.non_finite == 0


def test_first_overflow_is_found_by_name(tmp_path: Path) -> None:
    """A group norm's square of 300 leaves fp16: seen in fp16 and acc16, invisible in fp32 but for its size."""
    x = np.float32([[300.0, 1e-6]])

    def main(x: Any) -> Any:
        return mb.sqrt(x=mb.square(x=mb.add(x=x, y=np.float16(0), name="same"), name="squared"), name="root")

    program = half_program(tmp_path / "overflow.mlpackage", main, x)
    for mode, bad in (("fp32", []), ("fp16", ["squared", "root", "out"]), ("acc16", ["squared", "root", "out"])):
        evaluator = Evaluator(program, mode, statistics=True)  # type: ignore[arg-type]
        evaluator.run({"x": x})
        assert [record.name for record in evaluator.statistics if record.non_finite] == bad
        records = {record.name: record for record in evaluator.statistics}
        assert records["squared"].largest == 90000
        assert records["squared"].may_overflow
        assert not records["same"].may_overflow
        assert records["same"].subnormal_share == 0.5
    assert Evaluator(program).statistics == []


def test_statistics_do_not_change_the_numbers(tmp_path: Path, attentive: tuple[Attentive, torch.Tensor]) -> None:
    net, x = attentive
    convert_module(net, {"x": x}, precision="FLOAT16").save(str(tmp_path / "net.mlpackage"))
    program = Program.open(tmp_path / "net.mlpackage")
    outputs = [Evaluator(program, "acc16", recorded).run({"x": x.numpy()})["y"] for recorded in (False, True)]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_acc16_normalises_in_fp16(tmp_path: Path) -> None:
    """layer_norm's inside: 300 squared is beyond fp16, so `acc16` cannot give what `fp16` gives."""
    x = RNG.standard_normal((1, 8, 32)).astype(np.float32) * 400
    build = lambda x: mb.layer_norm(x=x, axes=[2], epsilon=np.float16(1e-3))  # noqa: E731
    program = half_program(tmp_path / "norm.mlpackage", build, x)
    reference = F.layer_norm(torch.from_numpy(x), (32,)).numpy()
    assert snr_db(reference, Evaluator(program, "fp16").run({"x": x})["out"]) > 60
    assert snr_db(reference, Evaluator(program, "acc16").run({"x": x})["out"]) < 10


def test_values_die_at_their_last_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of twenty ops on one value never holds more than two of them."""
    held: list[int] = []
    compute = Evaluator._compute

    def counted(self: Evaluator, operation: Any, known: Any, values: Any) -> Any:
        held.append(len(values))
        return compute(self, operation, known, values)

    def main(x: Any) -> Any:
        for _ in range(20):
            x = mb.add(x=x, y=np.float32(1))
        return mb.identity(x=x, name="out")

    monkeypatch.setattr(Evaluator, "_compute", counted)
    x = np.zeros((1, 4), np.float32)
    found = Evaluator(Program.open(save_built(tmp_path / "chain.mlpackage", main, {"x": x}))).run({"x": x})
    assert max(held) == 1
    np.testing.assert_array_equal(found["out"], x + 20)


def refused(
    tmp_path: Path, kind: str, parameters: dict[str, Any], out: tuple[str, tuple[int, ...]], message: str
) -> None:
    written = Written()
    values = {name: written.inline(dtype, value) for name, (dtype, value) in parameters.items()}
    written.op(kind, {"r": out}, {"x": "x", **values})
    written.op("cast", {"y": ("FLOAT32", out[1])}, {"x": "r", "dtype": written.inline("STRING", "fp32")})
    written.ends({"x": (2, 3)}, {"y": out[1]})
    package = written.save(tmp_path / "refused.mlpackage")
    with pytest.raises(TurbopocketError, match=message):
        Evaluator(Program.open(package)).run({"x": np.full((2, 3), 3e9, np.float32)})


@pytest.mark.parametrize(
    ("kind", "parameters", "out", "message"),
    [
        ("cast", {"dtype": ("STRING", "fp8")}, ("FLOAT16", (2, 3)), "a cast to 'fp8'"),
        ("cast", {"dtype": ("STRING", "int32")}, ("INT32", (2, 3)), "numbers beyond int32"),
        ("gelu", {"mode": ("STRING", "FAST")}, ("FLOAT32", (2, 3)), "mode 'FAST'"),
        ("gelu", {"mode": ("INT32", 1)}, ("FLOAT32", (2, 3)), "op gelu r: mode: a text is expected"),
        ("softmax", {"axis": ("STRING", "x")}, ("FLOAT32", (2, 3)), "axis: a tensor is expected"),
        ("softmax", {"axis": ("FLOAT32", 1.5)}, ("FLOAT32", (2, 3)), "axis: one integer is expected"),
        ("softmax", {"axis": ("INT32", 2)}, ("FLOAT32", (2, 3)), "op softmax r"),
        ("reshape", {"shape": ("INT32", [4, 2])}, ("FLOAT32", (4, 2)), "op reshape r"),
        ("tile", {"reps": ("INT32", [10**9, 10**9])}, ("FLOAT32", (2, 3)), r"declared FLOAT32 \[2, 3\]"),
        ("pad", {"pad": ("INT32", [0, 10**9])}, ("FLOAT32", (2, 3)), r"declared FLOAT32 \[2, 3\]"),
        ("gather", {"indices": ("INT32", [2]), "axis": ("INT32", 0)}, ("FLOAT32", (1, 3)), "an index outside 0 to 1"),
        ("gather", {"indices": ("INT32", [-1]), "axis": ("INT32", 0)}, ("FLOAT32", (1, 3)), "an index outside 0 to 1"),
        ("transpose", {}, ("FLOAT32", (2, 3)), "op transpose r has no perm"),
        (
            "upsample_nearest_neighbor",
            {"scale_factor_height": ("FLOAT32", 1.5)},
            ("FLOAT32", (3, 3)),
            "only whole ones are known",
        ),
        ("reduce_sum", {"axes": ("INT32", np.zeros(0))}, ("FLOAT32", ()), r"axes \[\]"),
        ("reduce_sum", {"axes": ("INT32", [0, -2])}, ("FLOAT32", (3,)), r"axes \[0, -2\]"),
        ("add", {"y": ("INT32", [1, 2, 3])}, ("FLOAT32", (2, 3)), "x is torch.float32, y is torch.int32"),
    ],
)
def test_what_the_format_leaves_open_is_refused(
    tmp_path: Path, kind: str, parameters: dict[str, Any], out: tuple[str, tuple[int, ...]], message: str
) -> None:
    refused(tmp_path, kind, parameters, out, message)


def test_integers_that_do_not_fit_their_type_are_refused(tmp_path: Path) -> None:
    def main(x: Any) -> Any:
        return mb.cast(x=mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="int16", name="short"), dtype="fp32")

    x = np.float32([[40000.0]])
    program = Program.open(save_built(tmp_path / "short.mlpackage", main, {"x": x}))
    np.testing.assert_array_equal(Evaluator(program).run({"x": x / 2}, also=["short"])["short"], [[20000]])
    with pytest.raises(TurbopocketError, match="op cast short has numbers beyond INT16"):
        Evaluator(program).run({"x": x})


def test_shapes_that_vary_are_refused(tmp_path: Path) -> None:
    def main(x: Any) -> Any:
        count = mb.cast(x=mb.reduce_max(x=x, axes=[0]), dtype="int32")
        return mb.range_1d(end=count, start=np.int32(0), step=np.int32(1), name="counted")

    with pytest.raises(TurbopocketError, match="a shape that varies"):
        Program.open(save_built(tmp_path / "varies.mlpackage", main, {"x": np.float32([1, 2, 3])}))


def test_fill_and_dequantize(tmp_path: Path) -> None:
    """Ops that the table of cases cannot hold: one without a tensor, one that needs a quantised one."""
    x = np.float32([1, 2, 3])

    def main(x: Any) -> Any:
        stored = mb.quantize(input=x, scale=np.float32(0.5), zero_point=np.int8(1), output_dtype="int8", name="steps")
        return [
            mb.dequantize(input=stored, scale=np.float32(0.5), zero_point=np.int8(1), name="back"),
            mb.add(x=mb.fill(shape=mb.const(val=np.int32([3])), value=np.float32(7), name="sevens"), y=x, name="more"),
        ]

    found = Evaluator(Program.open(save_built(tmp_path / "f.mlpackage", main, {"x": x}))).run({"x": x}, ["steps"])
    np.testing.assert_array_equal(found["steps"], [3, 5, 7])
    np.testing.assert_array_equal(found["back"], x)
    np.testing.assert_array_equal(found["more"], x + 7)
