# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a package holds: it runs, or TurbopocketError says why not. Never another error, never a hang.

The same 400 runs of each kind every time; `make test-fuzz` makes 6,000 of each.
"""

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.coreml.evaluate.evaluator import Evaluator
from turbopocket.runtimes.coreml.file.program import Program
from turbopocket.runtimes.coreml.lint import lint

from .conftest import MODEL_PATH, WEIGHTS_PATH, Attentive, Model, Written, convert_module, weights

FILES = (MODEL_PATH, "Manifest.json", WEIGHTS_PATH)
RUNS = max(400, settings.default.max_examples)
"""Hypothesis' own default is lower; the profile of `make test-fuzz` is not."""
fuzzed = settings(
    max_examples=RUNS,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MORE_MEMORY_BYTES = 2 * 2**30


def compressed_net() -> Written:
    """Ops that allocate by what constants say, and each kind of compressed value."""
    written = Written()
    rng = np.random.default_rng(0)
    indices, data = rng.integers(0, 16, (4, 2)).astype(np.uint8), rng.integers(-8, 8, (4, 8)).astype(np.int8)
    mask = rng.integers(0, 2, (4, 8)).astype(np.uint8)
    values = {
        "constexpr_lut_to_dense": {
            "indices": written.blob("UINT4", indices),
            "lut": written.blob("FLOAT16", rng.standard_normal((1, 1, 16, 4))),
            "vector_axis": written.inline("INT32", 1),
        },
        "constexpr_blockwise_shift_scale": {
            "data": written.blob("INT4", data),
            "scale": written.blob("FLOAT16", rng.standard_normal((4, 2))),
            "offset": written.blob("INT4", data[:, :2]),
        },
        "constexpr_sparse_to_dense": {
            "nonzero_data": written.blob("FLOAT16", rng.standard_normal(int(mask.sum()))),
            "mask": written.blob("UINT1", mask),
        },
    }
    name = "x"
    for kind, inputs in values.items():
        written.op(kind, {f"{kind}_w": ("FLOAT16", (4, 8))}, inputs)
        written.op(
            "cast", {f"{kind}_f": ("FLOAT32", (4, 8))}, {"x": f"{kind}_w", "dtype": written.inline("STRING", "fp32")}
        )
        written.op("add", {f"{kind}_s": ("FLOAT32", (4, 8))}, {"x": name, "y": f"{kind}_f"})
        name = f"{kind}_s"
    for kind, shape, inputs in (
        ("tile", (4, 16), {"reps": written.inline("INT32", [1, 2])}),
        ("pad", (5, 18), {"pad": written.inline("INT32", [0, 1, 1, 1])}),
        ("expand_dims", (1, 1, 5, 18), {"axes": written.inline("INT32", [0, 1])}),
        ("upsample_nearest_neighbor", (1, 1, 10, 18), {"scale_factor_height": written.inline("FLOAT32", 2)}),
        ("conv", (1, 2, 10, 18), {
            "weight": written.blob("FLOAT32", rng.standard_normal((2, 1, 3, 3))),
            "pad_type": written.inline("STRING", "custom"),
            "pad": written.inline("INT32", [1, 1, 1, 1]),
            "strides": written.inline("INT32", [1, 1]),
        }),
        ("slice_by_size", (1, 1, 4, 18), {
            "begin": written.inline("INT32", [0, 0, 0, 0]), "size": written.inline("INT32", [1, 1, 4, -1]),
        }),
        ("reshape", (4, 18), {"shape": written.inline("INT32", [4, 18])}),
        ("softmax", (4, 18), {"axis": written.inline("INT32", -1)}),
    ):  # fmt: skip
        written.op(kind, {f"{kind}_r": ("FLOAT32", shape)}, {"x": name, **inputs})
        name = f"{kind}_r"
    shape = written.inline("INT32", [4, 1])
    written.op("fill", {"f": ("FLOAT32", (4, 1))}, {"shape": shape, "value": written.inline("FLOAT32", 2.0)})
    written.op("add", {"y": ("FLOAT32", (4, 18))}, {"x": name, "y": "f"})
    written.ends({"x": (4, 8)}, {"y": (4, 18)})
    return written


@contextmanager
def bounded_memory() -> Iterator[None]:
    """An allocation beyond what the process has by now, and the bound, fails rather than fills the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: a bit, a byte, a stretch of zeros or noise, a cut, a repeat, a move."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if not changed:
            break
        at, length = rng.randrange(len(changed)), rng.randint(1, 16)
        match rng.randrange(7):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.randrange(256)
            case 2:
                changed[at : at + length] = bytes(length)
            case 3:
                changed[at : at + length] = rng.randbytes(length)
            case 4:
                del changed[at:]
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6:
                del changed[at : at + length]
    return bytes(changed)


def misdescribed(content: bytes, rng: random.Random) -> bytes:
    """A sound protobuf in which one number is another: of a written-out value, a shape, an offset, a type."""
    model = Model.FromString(content)
    function = model.mlProgram.functions["main"]
    operation = rng.choice(function.block_specializations[function.opset].operations)
    values = [argument.value for inputs in operation.inputs.values() for argument in inputs.arguments]
    values += [value for name, value in operation.attributes.items() if name != "name"]
    number = rng.choice([-(2**31), -9, -1, 0, 1, 2, 3, 5, 64, 2**20, 2**31 - 1])
    tensor = rng.choice(operation.outputs).type.tensorType
    value = rng.choice(values) if values else None
    ints = value.immediateValue.tensor.ints.values if value is not None else []
    match rng.randrange(4):
        case 0 | 1 if len(ints):
            ints[rng.randrange(len(ints))] = number
        case 2 if value is not None and value.blobFileValue.offset:
            value.blobFileValue.offset = 64 * abs(number)
        case 3:
            tensor.dataType = rng.randrange(45)
        case _ if len(tensor.dimensions):
            rng.choice(tensor.dimensions).constant.size = abs(number)
    return bytes(model.SerializeToString())


def survives(package: Path, name: str, content: bytes, inputs: dict[str, np.ndarray]) -> str | None:
    """Opens, lints and runs `package` with one file replaced; the message of the refusal, or None when it ran."""
    file = package / name
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        with bounded_memory(), np.errstate(all="ignore"):
            lint(package)
            program = Program.open(package)
            weights(program)
            Evaluator(program, "acc16", statistics=True).run(inputs)
    except TurbopocketError as error:
        return str(error)
    finally:
        file.write_bytes(original)
    return None


def subjects(folder: Path) -> list[tuple[Path, dict[str, np.ndarray]]]:
    """The packages that are damaged, with inputs that fit them."""
    x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    written = compressed_net().save(folder / "written.mlpackage")
    convert_module(Attentive(), {"x": torch.zeros(1, 4, 8, 8)}, precision="FLOAT16").save(str(folder / "net.mlpackage"))
    return [(written, {"x": x}), (folder / "net.mlpackage", {"x": np.ones((1, 4, 8, 8), np.float32)})]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, np.ndarray]]]:
    return subjects(tmp_path_factory.mktemp("fuzz"))


def test_whole_packages_run(packages: list[tuple[Path, dict[str, np.ndarray]]]) -> None:
    for package, inputs in packages:
        for name in FILES:
            assert survives(package, name, (package / name).read_bytes(), inputs) is None


@fuzzed
@given(seed=st.integers(0, 2**32), subject=st.integers(0, 1), name=st.sampled_from(FILES))
def test_damaged_packages_are_refused_or_run(
    packages: list[tuple[Path, dict[str, np.ndarray]]], seed: int, subject: int, name: str
) -> None:
    package, inputs = packages[subject]
    survives(package, name, mutated((package / name).read_bytes(), random.Random(seed)), inputs)


@fuzzed
@given(seed=st.integers(0, 2**32), subject=st.integers(0, 1))
def test_sound_packages_with_other_numbers_are_refused_or_run(
    packages: list[tuple[Path, dict[str, np.ndarray]]], seed: int, subject: int
) -> None:
    package, inputs = packages[subject]
    survives(package, MODEL_PATH, misdescribed((package / MODEL_PATH).read_bytes(), random.Random(seed)), inputs)
