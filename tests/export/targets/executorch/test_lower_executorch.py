# SPDX-License-Identifier: Apache-2.0
"""A component as an ExecuTorch program: the stored values inside, PyTorch's numbers outside, faults named."""

import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.targets.executorch import integer as executorch_layers
from turbopocket.export.targets.executorch import program as target
from turbopocket.export.targets.executorch.form import FormOptions
from turbopocket.export.targets.executorch.gate import require_constants
from turbopocket.export.targets.executorch.integer import GROUP_SCALE_DIGITS
from turbopocket.export.targets.executorch.stores import form_of_weight
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.compress import decompressed
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.scheme import Scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.compare.replay import Call, compare_by_layer, locate_divergence
from turbopocket.runtimes.compare.rows import Limits
from turbopocket.runtimes.executorch.runner import ExecuTorchRunner
from turbopocket.runtimes.manifest import ComponentSpec

from ...stand_ins import OneComponent

pytest.importorskip("executorch")

FORMATS = {
    "conv": "int8-row",
    "strided": "fp32",
    "point": "int4-g32",
    "query": "int8-row",
    "key": "int4-g32",
    "value": "int4-row",
    "out": "fp32",
}
"""Each kind of layer in each of its formats."""
BY_LAYER = Limits(max_relative_error=1e-4, by_layer=True)


class Part(nn.Module):
    """A picture to a row of attended pixels, through every kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 32, 3, padding=1)
        self.strided = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(32, 64, 1)
        self.norm = nn.LayerNorm(64)
        self.query, self.key, self.value = (nn.Linear(64, 64, bias=index > 0) for index in range(3))
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(self.point(F.silu(self.strided(F.silu(self.conv(x))))).flatten(2).transpose(1, 2))
        heads = [layer(pixels).unflatten(-1, (2, 32)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        left, right = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).chunk(2, dim=-1)
        return self.out(left * F.gelu(right))


class Wrapped(ComponentModule):
    def forward(self, sample: Tensor) -> Tensor:
        return self.model(sample)


@dataclass(frozen=True)
class Lowered:
    folder: Path
    component: Component
    traced: target.TracedProgram
    weights: Mapping[str, CompressedTensor]
    spec: ComponentSpec


def component() -> Component:
    torch.manual_seed(0)
    return Component(
        "part", Wrapped("part", Part().eval()), {"sample": torch.zeros(2, 4, 8, 8)}, ("row",), role="denoiser"
    )


def compressed(component: Component, formats: Mapping[str, str]) -> dict[str, CompressedTensor]:
    fit = replace(ABSMAX, group_scale_digits=GROUP_SCALE_DIGITS)
    layers = dict(component.module.model.named_modules())
    return {
        f"part.{path}": parse_format(text).compress(layers[path].weight.detach(), fit) for path, text in formats.items()
    }


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    part = component()
    traced = target.trace(part)
    weights = compressed(part, FORMATS)
    folder = tmp_path_factory.mktemp("executorch")
    return Lowered(folder, part, traced, weights, target.lower(traced, weights, folder))


@pytest.fixture
def sample() -> dict[str, Any]:
    return {"sample": np.random.default_rng(1).standard_normal((1, 4, 8, 8), dtype=np.float32)}


def runner(lowered: Lowered, folder: Path | None = None, spec: ComponentSpec | None = None) -> ExecuTorchRunner:
    manifest: Any = OneComponent({"part": spec or lowered.spec})
    return ExecuTorchRunner(folder or lowered.folder, manifest, target.layers_by_key(lowered.weights))


def test_what_it_is_compared_with_has_the_biases_that_the_module_has_then(lowered: Lowered) -> None:
    as_run, sample = target.as_run(lowered.component, lowered.weights, FormOptions()).module, torch.ones(1, 4, 8, 8)
    with torch.no_grad():
        before = as_run(sample)
        for name in ("part.conv.bias", "part.value.bias", "part.out.bias", "part.norm.weight"):
            tuned = {name: parse_format("fp32").compress(lowered.component.module.get_parameter(name) + 0.5, ABSMAX)}
            with decompressed({"part": lowered.component.module.model}, tuned):
                assert not torch.allclose(as_run(sample), before, atol=1e-3), name
        assert torch.equal(as_run(sample), before)


def test_the_program_computes_what_pytorch_does_with_the_same_values_and_roundings(
    lowered: Lowered, sample: dict[str, Any]
) -> None:
    found = runner(lowered).run("part", sample)["row"]
    as_run = torch_runner([target.as_run(lowered.component, lowered.weights, FormOptions())]).run("part", sample)["row"]
    floats = torch_runner([lowered.component]).run("part", sample)["row"]
    assert relative_error(found, as_run) < 1e-5
    assert relative_error(found, floats) > 1e-2, "4 bits cost nothing: are they in the program?"


def test_layers_show_their_outputs_in_order_of_execution(lowered: Lowered, sample: dict[str, Any]) -> None:
    layers = list(FORMATS)
    expected = torch_runner([target.as_run(lowered.component, lowered.weights, FormOptions())]).run_layers(
        "part", sample, layers
    )
    found = runner(lowered).run_layers("part", sample, layers)
    assert list(found)[:3] == ["conv", "strided", "point"]
    assert set(found) == set(layers)
    for layer in layers:
        assert found[layer].shape == expected[layer].shape
        assert relative_error(found[layer], expected[layer]) < 1e-5, layer


@pytest.mark.parametrize("layer", ["strided", "key"])
def test_a_wrong_weight_in_the_file_is_found_and_its_layer_named(
    lowered: Lowered, sample: dict[str, Any], tmp_path: Path, layer: str
) -> None:
    path = tmp_path / lowered.spec.file
    program = bytearray((lowered.folder / lowered.spec.file).read_bytes())
    weight = lowered.weights[f"part.{layer}"]
    stored = form_of_weight(layer, weight).arrays(weight)[0].view(torch.uint8).numpy().tobytes()
    at = program.index(stored)
    program[at : at + 200] = bytes(byte ^ 0x44 for byte in program[at : at + 200])
    path.write_bytes(program)
    reference = torch_runner([target.as_run(lowered.component, lowered.weights, FormOptions())])
    call = Call("part", sample, reference.run("part", sample))
    damaged = runner(lowered, tmp_path)
    assert relative_error(damaged.run("part", sample)["row"], call.outputs["row"]) > 1e-3
    divergence = locate_divergence(reference, damaged, call, 1e-4)
    assert divergence is not None
    assert divergence.layer == layer
    row, first = compare_by_layer(reference, damaged, call, damaged.run("part", sample), 0, BY_LAYER)
    assert not row.passed
    assert row.output == layer, "layers behind it got the same inputs, and are right"
    assert first is not None
    assert first.layer == layer


def test_layer_by_layer_the_program_is_pytorchs_whatever_comes_before(lowered: Lowered, sample: dict[str, Any]) -> None:
    reference = torch_runner([target.as_run(lowered.component, lowered.weights, FormOptions())])
    elsewhere = {"sample": sample["sample"] * np.float32(1.001)}
    call = Call("part", sample, reference.run("part", sample))
    row, first = compare_by_layer(reference, runner(lowered), call, runner(lowered).run("part", sample), 0, BY_LAYER)
    assert row.passed
    assert first is None
    wrong = runner(lowered).run("part", elsewhere)
    assert not compare_by_layer(reference, runner(lowered), call, wrong, 0, BY_LAYER)[0].passed


def test_the_file_is_no_larger_than_planned_and_hardly_smaller(lowered: Lowered) -> None:
    found = (lowered.folder / lowered.spec.file).stat().st_size
    formats = {name: Scheme(weight.format) for name, weight in lowered.weights.items()}
    planned = target.lowered_bytes(lowered.traced, formats)
    assert found <= planned <= found + 12_000
    layers = sum(weight.nbytes for weight in lowered.weights.values())
    assert planned <= target.fixed_bytes(lowered.traced, dict.fromkeys(formats, frozenset(formats.values()))) + layers


def test_a_layer_whose_input_is_not_rounded_is_refused_by_name(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_layers, "rounded_by_row", lambda x: x)
    with pytest.raises(TurbopocketError, match=r"part\.point: its weight is integers, its input is not"):
        target.lower(lowered.traced, lowered.weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def weight_only(self: executorch_layers.IntegerLinear) -> Tensor:
    """The weight by torchao's operator, as its weight-only configurations write it."""
    from torchao.quantization.quant_primitives import dequantize_affine

    block, limits = (1, self.codes.shape[1]), (self.lowest, self.highest)
    scale, zero = self.scale.unsqueeze(1), self.zero.unsqueeze(1)
    return dequantize_affine(self.codes, block, scale, zero, torch.int8, *limits, output_dtype=torch.float32)


def test_a_weight_only_layer_as_torchao_writes_it_is_refused(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that upstream miscompiles without a word: scales dropped, codes stored as fp32."""
    weights = compressed(lowered.component, {**dict.fromkeys(FORMATS, "fp32"), "query": "int8-row"})
    monkeypatch.setattr(executorch_layers.IntegerLinear, "_weight", weight_only)
    monkeypatch.setattr(executorch_layers, "rounded_by_row", lambda x: x)
    with pytest.raises(TurbopocketError, match=r"part\.query: its weight is integers, its input is not"):
        target.lower(lowered.traced, weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_codes_that_were_widened_to_fp32_are_missed_in_the_finished_file(lowered: Lowered, tmp_path: Path) -> None:
    target.lower(lowered.traced, compressed(lowered.component, dict.fromkeys(FORMATS, "fp32")), tmp_path)
    wanted = compressed(lowered.component, {**dict.fromkeys(FORMATS, "fp32"), "query": "int8-row"})
    with pytest.raises(TurbopocketError, match=r"part\.query: part\.pte does not hold its int8-row values"):
        require_constants(tmp_path / "part.pte", wanted)


def test_a_program_that_is_cut_off_is_refused(lowered: Lowered, sample: dict[str, Any], tmp_path: Path) -> None:
    whole = (lowered.folder / lowered.spec.file).read_bytes()
    for kept in (20, len(whole) // 2, len(whole) - 1):
        (tmp_path / lowered.spec.file).write_bytes(whole[:kept])
        with pytest.raises(TurbopocketError, match=r"part\.pte is cut off: .*bytes"):
            runner(lowered, tmp_path).run("part", sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda program: program.__setitem__(slice(4, 8), b"ET13"), "is an ExecuTorch program of format ET13"),
        (lambda program: program.__setitem__(slice(4, 8), b"PK\x03\x04"), "is no ExecuTorch program"),
        (lambda program: with_version(program, 7), "is of schema version 7: this ExecuTorch reads up to 0"),
        (lambda program: program.__setitem__(slice(0, 4), b"\xff\xff\xff\x7f"), "is damaged"),
    ],
)
def test_programs_of_other_making_are_refused(
    lowered: Lowered, sample: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    program = bytearray((lowered.folder / lowered.spec.file).read_bytes())
    change(program)
    (tmp_path / lowered.spec.file).write_bytes(program)
    with pytest.raises(TurbopocketError, match=message):
        runner(lowered, tmp_path).run("part", sample)


def with_version(program: bytearray, version: int) -> None:
    """Writes the schema's version into the root table, whose vtable is made to have the field."""
    (root,) = struct.unpack_from("<I", program, 0)
    (to_vtable,) = struct.unpack_from("<i", program, root)
    entry = root - to_vtable + 4
    (other,) = struct.unpack_from("<H", program, entry + 2)
    struct.pack_into("<H", program, entry, other)
    struct.pack_into("<I", program, root + other, version)


def test_a_newer_schema_is_what_upstream_calls_newer() -> None:
    from executorch.exir.version import EXECUTORCH_SCHEMA_VERSION

    from turbopocket.runtimes.executorch.file import SCHEMA_VERSION

    assert SCHEMA_VERSION == EXECUTORCH_SCHEMA_VERSION


def test_a_program_for_other_shapes_is_refused(lowered: Lowered, sample: dict[str, Any], tmp_path: Path) -> None:
    (given,) = lowered.spec.inputs
    wider = lowered.spec.model_copy(update={"inputs": [given.model_copy(update={"shape": [1, 4, 16, 16]})]})
    larger = {"sample": np.zeros((1, 4, 16, 16), np.float32)}
    with pytest.raises(TurbopocketError, match=r"sample as float32 \[1, 4, 8, 8\], the manifest says .*16, 16"):
        runner(lowered, spec=wider).run("part", larger)


def test_a_missing_program_is_one_clear_error(lowered: Lowered, sample: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(lowered.folder, tmp_path / "art")
    (tmp_path / "art" / lowered.spec.file).unlink()
    with pytest.raises(TurbopocketError, match=r"part\.pte is missing"):
        runner(lowered, tmp_path / "art").run("part", sample)


def test_what_executorch_fails_on_is_one_clear_error(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import executorch.exir as exir

    def fails(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Invalid partition, found dependency cycles\nand a page more")

    monkeypatch.setattr(exir, "to_edge_transform_and_lower", fails)
    with pytest.raises(
        TurbopocketError, match=r"^part: ExecuTorch can not lower it: Invalid partition, found .*cycles$"
    ):
        target.lower(lowered.traced, lowered.weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_program_with_a_damaged_table_is_one_sentence(
    lowered: Lowered, sample: dict[str, Any], tmp_path: Path
) -> None:
    whole = (lowered.folder / lowered.spec.file).read_bytes()
    for at in range(64, 1024, 160):
        damaged = bytearray(whole)
        damaged[at : at + 160] = b"\xff" * 160
        (tmp_path / lowered.spec.file).write_bytes(damaged)
        with pytest.raises(TurbopocketError, match=r"part\.pte"):
            runner(lowered, tmp_path).run("part", sample)
