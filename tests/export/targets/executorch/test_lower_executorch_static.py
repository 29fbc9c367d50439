# SPDX-License-Identifier: Apache-2.0
"""Programs whose activations are rounded in steps that calibration chose: the same integers, step for step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turbopocket.export.families.graphs import Component
from turbopocket.export.recipe import make_recipe
from turbopocket.export.target_options import ExecuTorchOptions
from turbopocket.export.targets.executorch import program as lowering
from turbopocket.export.targets.executorch.stores import form_of_weight
from turbopocket.export.targets.executorch.target import FLOAT_ERROR, LAYER_ERROR, STATIC_LAYER_ERROR, ExecuTorch
from turbopocket.export.targets.registry import open_target
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.activations import QParams
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.formats import CompressedTensor
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.rounding import MIN_SNR_DB, StaticQParams, keeps_digits, rounded
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.compare.replay import Call, compare_by_layer
from turbopocket.runtimes.compare.rows import Limits
from turbopocket.runtimes.executorch.runner import ExecuTorchRunner

from ...stand_ins import OneComponent
from .test_lower_executorch import component, compressed

pytest.importorskip("executorch")

FORMATS = {**dict.fromkeys(("conv", "strided", "point", "query", "value", "out"), "int8-row"), "key": "int4-g32"}
TARGET = ExecuTorch(ExecuTorchOptions(activations="static"))


@dataclass(frozen=True)
class Built:
    folder: Path
    component: Component
    traced: lowering.TracedProgram
    weights: dict[str, CompressedTensor]
    ranges: dict[str, Ranges]
    manifest: Any

    @property
    def runner(self) -> ExecuTorchRunner:
        return ExecuTorchRunner(self.folder, self.manifest, lowering.layers_by_key(self.weights))

    @property
    def reference(self) -> Any:
        return torch_runner([TARGET.as_run(self.component, self.weights, self.ranges)])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    part = component()
    random = torch.Generator().manual_seed(3)
    samples = torch.randn(16, 1, 4, 8, 8, generator=random)
    stats = calibrate({"part": part.module.model}, lambda: [part.module(sample) for sample in samples])
    ranges, weights = ranges_of(stats), compressed(part, FORMATS)
    traced = TARGET.fitted(TARGET.trace(part), part, ranges)
    folder = tmp_path_factory.mktemp("static")
    return Built(folder, part, traced, weights, ranges, OneComponent({"part": TARGET.lower(traced, weights, folder)}))


@pytest.fixture
def sample() -> dict[str, Any]:
    return {"sample": np.random.default_rng(1).standard_normal((1, 4, 8, 8), dtype=np.float32)}


def test_every_layer_is_pytorchs_or_one_step_beside_it(built: Built, sample: dict[str, Any]) -> None:
    layers = list(FORMATS)
    found = built.runner.run_layers("part", sample, layers)
    _, own = built.reference.run_following("part", sample, found)
    assert set(found) == set(layers)
    for layer in layers:
        if layer == "key":
            assert relative_error(found[layer], own[layer]) < 1e-5
            continue
        scale = StaticQParams.of(built.ranges[f"part.{layer}"]).output.scale
        steps = np.abs(found[layer] - own[layer]) / scale
        assert steps.max() < 1.01, layer
        assert (steps > 0.5).mean() < 0.01, layer
        codes = found[layer] / scale
        assert np.abs(codes - codes.round()).max() < 1e-3, f"{layer} is not rounded"
        assert len(np.unique(codes.round())) <= 256


def test_what_is_shown_layer_by_layer_is_the_shipped_program_to_the_last_bit(
    built: Built, sample: dict[str, Any]
) -> None:
    """Steps that are no decimal fractions must come through the copy that has more outputs."""
    runner = built.runner
    shown = runner.run_layers("part", sample, ["out"])["out"]
    assert np.array_equal(shown, runner.run("part", sample)["row"])


def test_it_differs_from_the_program_that_finds_its_steps_while_it_runs(
    built: Built, sample: dict[str, Any], tmp_path: Path
) -> None:
    dynamic = ExecuTorch()
    traced = dynamic.fitted(dynamic.trace(built.component), built.component, built.ranges)
    manifest: Any = OneComponent({"part": dynamic.lower(traced, built.weights, tmp_path)})
    there = ExecuTorchRunner(tmp_path, manifest).run("part", sample)["row"]
    floats = torch_runner([built.component]).run("part", sample)["row"]
    here = built.runner.run("part", sample)["row"]
    assert relative_error(here, there) > 1e-3
    assert relative_error(there, floats) < relative_error(here, floats) < 0.1


def test_a_wrong_step_or_weight_turns_its_layer_red(built: Built, sample: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "part.pte"
    program = bytearray((built.folder / path.name).read_bytes())
    weight = built.weights["part.query"]
    stored = form_of_weight("part.query", weight).arrays(weight)[0].view(torch.uint8).numpy().tobytes()
    at = program.index(stored)
    program[at : at + 200] = bytes(byte ^ 0x44 for byte in program[at : at + 200])
    path.write_bytes(program)
    damaged = ExecuTorchRunner(tmp_path, built.manifest, lowering.layers_by_key(built.weights))
    reference, limits = built.reference, Limits(max_relative_error=STATIC_LAYER_ERROR, by_layer=True)
    call = Call("part", sample, reference.run("part", sample))
    row, first = compare_by_layer(reference, damaged, call, damaged.run("part", sample), 0, limits)
    assert not row.passed
    assert first is not None
    assert first.layer == "query"
    wider = {**built.ranges, "part.strided": Ranges((-9.0, 9.0), (-9.0, 9.0), 9.0, 9.0)}
    reference = torch_runner([TARGET.as_run(built.component, built.weights, wider)])
    runner = built.runner
    row, first = compare_by_layer(reference, runner, call, runner.run("part", sample), 0, limits)
    assert not row.passed
    assert first is not None
    assert first.layer == "strided"


def test_planned_bytes_hold_before_and_after_the_steps_are_known(built: Built) -> None:
    found = (built.folder / "part.pte").stat().st_size
    formats = {name: Scheme(weight.format) for name, weight in built.weights.items()}
    not_yet_known = TARGET.trace(built.component)
    after, before = (lowering.lowered_bytes(traced, formats) for traced in (built.traced, not_yet_known))
    assert found <= after <= found + 12_000
    layers = sum(weight.nbytes for weight in built.weights.values())
    assert (
        after
        <= before
        <= lowering.fixed_bytes(not_yet_known, dict.fromkeys(formats, frozenset(formats.values()))) + layers
    )


@pytest.mark.parametrize(("least", "greatest"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-1e-3, 700.0)])
def test_scales_span_the_range_and_hold_zero_exactly(least: float, greatest: float) -> None:
    qparams = QParams.over(least, greatest)
    assert -128 <= qparams.zero_point <= 127
    ends = torch.tensor([min(least, 0.0), 0.0, max(greatest, 0.0)])
    found = rounded(ends, qparams)
    assert found[1] == 0
    assert (found - ends).abs().max() <= qparams.scale * 0.51
    beyond = rounded(torch.tensor([least - 1e6, greatest + 1e6]), qparams)
    assert (beyond - torch.tensor([ends[0], ends[2]])).abs().max() <= qparams.scale * 0.51


def test_a_layer_that_saw_nothing_but_zeros_has_a_scale_all_the_same() -> None:
    assert rounded(torch.zeros(3), QParams.over(0.0, 0.0)).tolist() == [0.0, 0.0, 0.0]


def test_layers_that_keep_hardly_any_digits_stay_dynamic() -> None:
    """A few giants among the input, or a call whose output is far below what others give."""
    enough = (8 / 255) ** 2 / 12 * 10 ** (MIN_SNR_DB / 10)
    ranges = (-4.0, 4.0), (-4.0, 4.0)
    assert keeps_digits(Ranges(*ranges, 1.01 * enough, 1.01 * enough))
    assert not keeps_digits(Ranges(*ranges, 0.99 * enough, 1.01 * enough))
    assert not keeps_digits(Ranges(*ranges, 1.01 * enough, 0.99 * enough))
    seen = {"a": Ranges(*ranges, 1.0, 1.0), "b": Ranges((-400.0, 4.0), (-4.0, 4.0), 1.0, 1.0)}
    int8, int4 = parse_scheme("int8-row"), parse_scheme("int4-row")
    static, dynamic = parse_scheme("int8-row+a8-static"), parse_scheme("int8-row+a8-dynamic")
    assert [TARGET.resolved(name, int8, "linear", seen) for name in seen] == [static, dynamic]
    assert TARGET.resolved("a", int8, "linear") == static
    assert TARGET.resolved("a", int4, "linear", seen) == parse_scheme("int4-row+a8-dynamic")
    assert ExecuTorch().resolved("a", int8, "linear", seen) == dynamic
    for whole in (static, dynamic):  # a scheme that tells its activations is taken at its word
        assert TARGET.resolved("b", whole, "linear", seen) == ExecuTorch().resolved("a", whole, "linear", seen) == whole


def test_the_plan_decides_and_not_the_ranges(built: Built, tmp_path: Path) -> None:
    """Both ways: a layer that might be static is not, and one is that the target's options leave dynamic."""
    dynamic, static = parse_scheme("int8-row+a8-dynamic"), parse_scheme("int8-row+a8-static")
    every = [name for name, weight in built.weights.items() if str(weight.format) == "int8-row"]
    planned = {name: static if name == "part.query" else dynamic for name in every}
    programs = {}
    for target in (TARGET, ExecuTorch()):
        traced = target.fitted(target.trace(built.component), built.component, built.ranges)
        target.lower(traced, built.weights, tmp_path, planned)
        programs[target] = (tmp_path / "part.pte").read_bytes()
        shown = target.as_run(built.component, built.weights, built.ranges, planned).module.model
        assert {name: shown.get_submodule(name.removeprefix("part.")).static is not None for name in every} == {
            name: name == "part.query" for name in every
        }
    assert programs[TARGET] == programs[ExecuTorch()]
    assert programs[TARGET] != (built.folder / "part.pte").read_bytes()


def test_static_scales_need_what_calibration_saw(built: Built, tmp_path: Path) -> None:
    traced = TARGET.trace(built.component)
    with pytest.raises(TurbopocketError) as caught:
        TARGET.lower(traced, built.weights, tmp_path)
    assert str(caught.value) == "part.conv: int8-row+a8-static needs the ranges that calibration saw"


def test_a_plan_of_another_format_than_the_weights_is_refused(built: Built, tmp_path: Path) -> None:
    with pytest.raises(TurbopocketError) as caught:
        TARGET.lower(built.traced, built.weights, tmp_path, {"part.key": parse_scheme("int8-row+a8-static")})
    assert str(caught.value) == "part.key: its weight is stored in int4-g32, planned is int8-row+a8-static"


def test_the_recipe_chooses(built: Built) -> None:
    asked = make_recipe({"target": {"name": "executorch", "executorch": {"activations": "static"}}}, "test")
    assert open_target(asked.target) == TARGET
    assert open_target(make_recipe({"target": {"name": "executorch"}}, "test").target) == ExecuTorch()
    schemes = TARGET.schemes_of(built.weights, ranges=built.ranges)
    assert TARGET.lowering_limit(schemes) == STATIC_LAYER_ERROR
    assert TARGET.lowering_limit({"a": schemes["part.key"]}) == LAYER_ERROR
    assert TARGET.lowering_limit({"a": parse_scheme("fp32")}) == FLOAT_ERROR
