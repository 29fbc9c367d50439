# SPDX-License-Identifier: Apache-2.0
"""Codebooks in ExecuTorch programs: codes inside, PyTorch's numbers outside, memory of one layer at a time."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import Codebooks, ExecuTorchOptions
from turbopocket.export.targets.executorch import program as target
from turbopocket.export.targets.executorch.form import FormOptions
from turbopocket.export.targets.executorch.gate import require_constants
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import MSE
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.compare.replay import Call, compare_by_layer
from turbopocket.runtimes.compare.rows import Limits
from turbopocket.runtimes.executorch import runner as bindings
from turbopocket.runtimes.executorch.native.runner import ExecuTorchNativeRunner
from turbopocket.runtimes.executorch.runner import ExecuTorchRunner
from turbopocket.runtimes.kernels.library import executorch_operators
from turbopocket.runtimes.manifest import ComponentSpec

from ...stand_ins import OneComponent

pytest.importorskip("executorch")

needs_kernels = pytest.mark.skipif(executorch_operators() is None, reason="no kernels for ExecuTorch: make kernels")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="the C++ runner is built with cmake")
FORMS = ["portable", pytest.param("kernel", marks=needs_kernels)]
FORMATS = {
    "conv": "avq2x8-d8",
    "strided": "vq8-d4",
    "point": "avq3x8-d8-shared",
    "query": "avq2x8-d4",
    "key": "avq3x8-d8-shared",
    "out": "vq8-d8",
}
"""Convolutions of every geometry and Linear layers, in one codebook, several, and shared ones."""


class Part(nn.Module):
    """A picture to a row of pixels that look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 64, 3, padding=(2, 1), dilation=(2, 1))
        self.strided = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(64, 64, 1)
        self.norm = nn.LayerNorm(64)
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.out = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(self.point(F.silu(self.strided(F.silu(self.conv(x))))).flatten(2).transpose(1, 2))
        scores = torch.bmm(self.query(pixels), self.key(pixels).transpose(1, 2)).softmax(-1)
        return self.out(F.gelu(torch.bmm(scores, pixels)))


class Stack(nn.Module):
    """As many layers, all of which read the input, so that nothing but their order keeps them apart."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for layer in self.layers:
            total = total + F.gelu(layer(x))
        return total


class Wrapped(ComponentModule):
    def forward(self, sample: Tensor) -> Tensor:
        return self.model(sample)


@dataclass(frozen=True)
class Built:
    folder: Path
    component: Component
    traced: target.TracedProgram
    weights: Mapping[str, CompressedTensor]
    spec: ComponentSpec

    @property
    def program(self) -> Path:
        return self.folder / self.spec.file

    @property
    def manifest(self) -> Any:
        return OneComponent({"part": self.spec})

    def runner(self) -> ExecuTorchRunner:
        return ExecuTorchRunner(self.folder, self.manifest, target.layers_by_key(self.weights))


Build = Callable[..., Built]


def built(folder: Path, module: nn.Module, sample: Tensor, formats: Mapping[str, str], form: Codebooks) -> Built:
    component = Component("part", Wrapped("part", module.eval()), {"sample": sample}, ("row",), role="denoiser")
    traced = target.trace(component, ExecuTorchOptions(codebooks=form))
    layers = dict(module.named_modules())
    weights = {
        f"part.{path}": parse_format(text).compress(layers[path].weight.detach(), MSE) for path, text in formats.items()
    }
    return Built(folder, component, traced, weights, target.lower(traced, weights, folder))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """One program for each form and change of formats."""
    made: dict[Any, Built] = {}

    def make(form: Codebooks, **changed: str) -> Built:
        key = form, *changed.items()
        if key not in made:
            torch.manual_seed(0)
            folder, formats = tmp_path_factory.mktemp("codebooks"), {**FORMATS, **changed}
            made[key] = built(folder, Part(), torch.zeros(1, 8, 12, 12), formats, form)
        return made[key]

    return make


@pytest.fixture
def sample() -> dict[str, Any]:
    return {"sample": np.random.default_rng(1).standard_normal((1, 8, 12, 12), dtype=np.float32)}


def decompressed_row(built: Built, sample: Mapping[str, Any]) -> Any:
    """What PyTorch makes of the stored weights, by its own layers."""
    with decompressed({"part": built.component.module.model}, built.weights):
        return torch_runner([built.component]).run("part", sample)["row"]


@pytest.mark.parametrize("form", FORMS)
def test_the_program_computes_what_pytorch_does_with_the_stored_weights(
    build: Build, form: Codebooks, sample: dict[str, Any]
) -> None:
    part = build(form)
    assert relative_error(part.runner().run("part", sample)["row"], decompressed_row(part, sample)) < 1e-5


@needs_cmake
@pytest.mark.parametrize("form", ["portable", "kernel"])
def test_the_cpp_runner_has_our_kernels_and_computes_the_same(
    build: Build, form: Codebooks, sample: dict[str, Any]
) -> None:
    part = build(form)
    with ExecuTorchNativeRunner(part.folder, part.manifest, {}) as native:
        found = native.run("part", sample)["row"]
    assert relative_error(found, decompressed_row(part, sample)) < 1e-5


def test_layers_that_round_are_compared_one_by_one_between_those_of_codebooks(
    build: Build, sample: dict[str, Any]
) -> None:
    part = build("portable", query="int8-row", strided="int8-row")
    limits = Limits(max_relative_error=1e-4, by_layer=True)
    reference = torch_runner([target.as_run(part.component, part.weights, FormOptions())])
    call = Call("part", sample, reference.run("part", sample))
    runner = part.runner()
    found = runner.run("part", sample)
    row, first = compare_by_layer(reference, runner, call, found, 0, limits)
    assert row.passed
    assert first is None
    changed = part.weights | {"part.conv": altered(part.weights["part.conv"], "scale")}
    elsewhere = torch_runner([target.as_run(part.component, changed, FormOptions())])
    assert not compare_by_layer(elsewhere, runner, call, found, 0, limits)[0].passed


@pytest.mark.parametrize("form", FORMS)
def test_the_file_is_no_larger_than_planned_and_hardly_smaller(build: Build, form: Codebooks) -> None:
    part = build(form)
    formats = {name: Scheme(weight.format) for name, weight in part.weights.items()}
    planned, found = target.lowered_bytes(part.traced, formats), part.program.stat().st_size
    assert found <= planned <= found + 12_000
    own = sum(weight.nbytes for weight in part.weights.values())
    shared = 3 * 256 * 8 * 2
    assert (
        planned - shared
        <= target.fixed_bytes(part.traced, dict.fromkeys(formats, frozenset(formats.values()))) + own + 1000
    )


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_depth(tmp_path: Path, form: Codebooks) -> None:
    shallow, deep = (planned_memory(tmp_path / str(depth), depth, form) for depth in (2, 5))
    assert deep - shallow < 256 * 256  # a decoded weight has 4 bytes for each of these


def planned_memory(folder: Path, depth: int, form: Codebooks) -> int:
    """Bytes that ExecuTorch plans for activations, decoded weights among them."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    folder.mkdir()
    torch.manual_seed(0)
    formats = {f"layers.{index}": "avq2x8-d8" for index in range(depth)}
    stack = built(folder, Stack(depth), torch.zeros(1, 16, 256), formats, form)
    (plan,) = deserialize_pte_binary(stack.program.read_bytes()).program.execution_plan
    return int(plan.non_const_buffer_sizes[1])


def test_shared_codebooks_are_held_once(tmp_path: Path) -> None:
    sizes = []
    for text in ("avq2x8-d8", "avq2x8-d8-shared"):
        folder = tmp_path / text
        folder.mkdir()
        torch.manual_seed(0)
        stack = built(folder, Stack(3), torch.zeros(1, 16, 256), {f"layers.{i}": text for i in range(3)}, "kernel")
        formats = {name: Scheme(weight.format) for name, weight in stack.weights.items()}
        sizes.append((stack.program.stat().st_size, target.lowered_bytes(stack.traced, formats)))
    codebooks = 2 * 256 * 8 * 2
    for own, shared in zip(*sizes, strict=True):
        assert own - shared == pytest.approx(2 * codebooks, abs=1000)


def altered(weight: CompressedTensor, part: str) -> CompressedTensor:
    """The weight with the first value of a part made another."""
    changed = weight.parts[part].clone()
    changed.view(-1)[0] = changed.view(-1)[0] * 2 + 1
    return replace(weight, parts=weight.parts | {part: changed})


@pytest.mark.parametrize("form", ["portable", "kernel"])
@pytest.mark.parametrize(("layer", "part"), [("conv", "codes"), ("strided", "codebook"), ("key", "scale")])
def test_a_program_without_a_stored_value_is_refused(build: Build, form: Codebooks, layer: str, part: str) -> None:
    whole = build(form)
    require_constants(whole.program, whole.weights)
    name = f"part.{layer}"
    with pytest.raises(TurbopocketError, match=rf"{name}: part\.pte does not hold its .* as they were compressed"):
        require_constants(whole.program, whole.weights | {name: altered(whole.weights[name], part)})


def test_convolutions_that_pad_anything_but_zeros_are_refused() -> None:
    part = Part()
    part.conv.padding_mode = "circular"
    component = Component(
        "part", Wrapped("part", part.eval()), {"sample": torch.zeros(1, 8, 12, 12)}, ("row",), role="denoiser"
    )
    with pytest.raises(TurbopocketError, match=r"part\.conv: a Conv2d that pads circular is not supported"):
        target.trace(component)


def test_kernels_that_were_not_built_are_one_clear_error(
    build: Build, sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "executorch_operators", lambda: None)
    with pytest.raises(TurbopocketError, match="part: the program needs codebook kernels") as caught:
        build("kernel").runner().run("part", sample)
    assert "make kernels" in str(caught.value.hint)


@needs_kernels
@pytest.mark.parametrize("fault", ["codes of another shape", "a number for a list", "a list of three", "a float scale"])
def test_a_program_with_other_arguments_is_refused(
    build: Build, sample: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    part = build("kernel")
    (tmp_path / part.spec.file).write_bytes(with_fault(part.program.read_bytes(), fault))
    with pytest.raises(TurbopocketError, match="ExecuTorch, part"):
        replace(part, folder=tmp_path).runner().run("part", sample)


def with_fault(program: bytes, fault: str) -> bytes:
    """The program, whose first codebook convolution has another argument."""
    from executorch.exir import schema
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
    from executorch.exir.scalar_type import ScalarType

    opened = deserialize_pte_binary(program)
    (plan,) = opened.program.execution_plan
    names = [operator.name for operator in plan.operators]
    wanted = names.index("turbopocket::codebook_conv2d")
    calls = [each.instr_args for each in plan.chains[0].instructions]
    args = next(call.args for call in calls if getattr(call, "op_index", None) == wanted)
    values = plan.values
    if fault == "codes of another shape":
        values[args[1]].val.sizes = [values[args[1]].val.sizes[0] // 2, *values[args[1]].val.sizes[1:]]
    elif fault == "a number for a list":
        values[args[6]] = schema.EValue(schema.Int(2))
    elif fault == "a list of three":
        values[args[6]].val.items = [*values[args[6]].val.items, values[args[6]].val.items[0]]
    else:
        values[args[3]].val.scalar_type = ScalarType.FLOAT
        values[args[3]].val.sizes = [values[args[3]].val.sizes[0] // 2]
    return bytes(serialize_pte_binary(opened))
