# SPDX-License-Identifier: Apache-2.0
"""Ranges of each timestep in ONNX: looked up in the file by its timestep, and rounded alike in PyTorch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import OnnxOptions
from turbopocket.export.targets.onnx.program import fixed_bytes, lowered_bytes
from turbopocket.export.targets.onnx.target import Onnx
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.ground.names import at_place
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.scheme import Scheme, parse_scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.compare.replay import Call, compare_by_layer
from turbopocket.runtimes.compare.rows import ParityRow
from turbopocket.runtimes.manifest import ComponentSpec

WIDTH, PICTURES = 32, 16
STEPS = (800.0, 300.0, 20.0)
LAYERS = ("strided", "point", "query", "out")


class Part(nn.Module):
    """Convolutions with and without bias, of one tap and nine; Linears with and without."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, WIDTH, 3, stride=2, padding=1)
        self.point = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.query, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.point(torch.nn.functional.silu(self.strided(x)))
        return self.out(torch.nn.functional.gelu(self.query(pixels.flatten(2).transpose(1, 2))))


class Timed(ComponentModule):
    """The part, whose input is as large as the timestep."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.model(sample * timestep / STEPS[0])


@dataclass(frozen=True)
class OneComponent:
    """As much of a manifest as a runner reads."""

    components: dict[str, ComponentSpec]
    name: str = "part"
    plan: None = None


@dataclass(frozen=True)
class Built:
    """The part, lowered in schemes of one kind."""

    target: Onnx
    component: Component
    traced: Any
    ranges: dict[str, Ranges]
    weights: dict[str, CompressedTensor]
    schemes: dict[str, Scheme]
    folder: Path
    manifest: Any

    def runner(self) -> Any:
        limit = self.target.lowering_limit(self.schemes)
        (runtime,) = self.target.runtimes(self.folder, self.manifest, self.weights, limit, self.schemes).values()
        return runtime

    def parity(self, inputs: dict[str, Any], ranges: dict[str, Ranges] | None = None) -> ParityRow:
        """The worst layer of a call, against PyTorch that rounds in these ranges."""
        as_run = torch_runner([self.target.as_run(self.component, self.weights, ranges or self.ranges, self.schemes)])
        runtime = self.runner()
        call = Call("part", inputs, as_run.run("part", inputs))
        found = runtime.runner.run("part", inputs)
        return compare_by_layer(as_run, runtime.runner, call, found, 0, runtime.limits)[0]


def part(timestep: Tensor) -> Component:
    torch.manual_seed(0)
    inputs = {"sample": torch.zeros(2, 4, 8, 8), "timestep": timestep}
    return Component("part", Timed("part", Part().eval()), inputs, ("row",), role="denoiser")


def seen(component: Component) -> dict[str, Ranges]:
    samples = torch.randn(PICTURES, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def run() -> None:
        for sample in samples:
            for timestep in STEPS:
                with at_place(timestep=timestep):
                    component.module(sample, torch.tensor(timestep))

    return ranges_of(calibrate({"part": component.module.model}, run))


def scheme_of(layer: str, rounded: str) -> Scheme:
    """The query alone hands on floats."""
    return parse_scheme(f"int8-row+{rounded}{'+float' if layer == 'query' else ''}")


def built(rounded: str, folder: Path, timestep: Tensor | None = None) -> Built:
    example = torch.tensor(999.0) if timestep is None else timestep
    component, target, format = part(example), Onnx(), parse_format("int8-row")
    model, ranges = component.module.model, seen(component)
    weights = {f"part.{each}": format.compress(model.get_parameter(f"{each}.weight"), ABSMAX) for each in LAYERS}
    schemes = {f"part.{each}": scheme_of(each, rounded) for each in LAYERS}
    traced = target.fitted(target.trace(component), component, ranges)
    spec = target.lower(traced, weights, folder, schemes)
    return Built(target, component, traced, ranges, weights, schemes, folder, OneComponent({"part": spec}))


@pytest.fixture(scope="module")
def by_step(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built("a8-step", tmp_path_factory.mktemp("step"))


def asked(timestep: float, pictures: int = 2, seed: int = 1) -> dict[str, Any]:
    sample = np.random.default_rng(seed).standard_normal((pictures, 4, 8, 8), dtype=np.float32)
    return {"sample": sample, "timestep": np.array(timestep, np.float32)}


@pytest.mark.parametrize("timestep", [*STEPS, 900.0, 560.0, 540.0, 0.0])
def test_every_layer_is_the_one_that_pytorch_rounds_at_that_timestep(timestep: float, by_step: Built) -> None:
    """Between timesteps, and beyond, those of the nearest."""
    row = by_step.parity(asked(timestep))
    assert row.passed, row


def test_one_range_for_all_steps_is_found(by_step: Built, tmp_path: Path) -> None:
    """Planted in PyTorch against a file with several, then in the file against PyTorch with several."""
    one = {
        name: replace(each, steps=tuple(replace(s, input=each.input, output=each.output) for s in each.steps))
        for name, each in by_step.ranges.items()
    }
    for timestep in STEPS[1:]:
        assert not by_step.parity(asked(timestep), one).passed
    planted = replace(by_step, folder=tmp_path)
    by_step.target.lower(replace(by_step.traced, ranges=one), by_step.weights, tmp_path, by_step.schemes)
    assert not planted.parity(asked(STEPS[1])).passed
    assert planted.parity(asked(STEPS[1]), one).passed


def test_late_steps_keep_the_digits_that_one_range_takes(by_step: Built, tmp_path: Path) -> None:
    static, floats = built("a8-static", tmp_path), torch_runner([by_step.component])

    def error(of: Built, timestep: float) -> float:
        inputs = asked(timestep)
        return relative_error(of.runner().runner.run("part", inputs)["row"], floats.run("part", inputs)["row"])

    assert error(by_step, STEPS[0]) == pytest.approx(error(static, STEPS[0]), rel=0.3)
    assert error(by_step, STEPS[2]) < error(static, STEPS[2]) / 2


def test_a_batch_may_have_a_timestep_each_that_is_the_same(tmp_path: Path) -> None:
    """As the input `timestep` of some graphs has a batch."""
    found = built("a8-step", tmp_path, torch.full((2, 1, 1, 1), 999.0))
    one = asked(STEPS[2])
    several = one | {"timestep": np.full((2, 1, 1, 1), STEPS[2], np.float32)}
    assert found.parity(several).passed


def test_a_graph_has_one_table_and_its_bytes_are_planned(by_step: Built) -> None:
    model = onnx.load(by_step.folder / "part/model.onnx", load_external_data=False)
    tables = {each.name: tuple(each.dims) for each in model.graph.initializer if each.name.startswith("step.")}
    tensors = 2 + 2 + 2  # what `point` gives is what `query` is given
    assert tables == {
        "step.timesteps": (3,),
        "step.scales": (3, tensors),
        "step.zero_points": (3, tensors),
    }
    files = by_step.target.files(by_step.manifest.components["part"])
    written = sum((by_step.folder / file).stat().st_size for file in files)
    assert written == lowered_bytes(by_step.traced, by_step.schemes)
    weights = sum(scheme.nbytes(by_step.weights[name].shape) for name, scheme in by_step.schemes.items())
    candidates = {name: [scheme, parse_scheme("int8-row")] for name, scheme in by_step.schemes.items()}
    assert written <= weights + fixed_bytes(by_step.traced, candidates)


def test_formats_that_say_nothing_get_steps_where_the_options_say_so(by_step: Built) -> None:
    target, plain = Onnx(OnnxOptions(activations="step")), parse_scheme("int8-row")
    loud = {name: replace(each, quietest_output_power=1.0) for name, each in by_step.ranges.items()}
    assert str(target.resolved("part.out", plain, "linear", loud)) == "int8-row+a8-step+float"
    assert str(target.resolved("part.strided", plain, "conv2d", loud)) == "int8-row+a8-step"
    without = {name: replace(each, steps=()) for name, each in loud.items()}
    assert str(target.resolved("part.out", plain, "linear", without)) == "int8-row+a8-static+float"
    assert str(target.resolved("part.strided", plain, "conv2d", without)) == "int8-row+a8-static"


def test_steps_that_calibration_did_not_tell_are_asked_for(by_step: Built, tmp_path: Path) -> None:
    without = {name: replace(each, steps=()) for name, each in by_step.ranges.items()}
    with pytest.raises(TurbopocketError) as caught:
        by_step.target.lower(replace(by_step.traced, ranges=without), by_step.weights, tmp_path, by_step.schemes)
    needed = "part.strided: int8-row+a8-step needs ranges of each timestep, calibration did not tell the timesteps"
    assert str(caught.value) == needed
    fewer = by_step.ranges | {
        "part.out": replace(by_step.ranges["part.out"], steps=by_step.ranges["part.out"].steps[:2])
    }
    with pytest.raises(TurbopocketError, match="calibrated at timesteps 800, 300, 20, others at 800, 300"):
        by_step.target.lower(replace(by_step.traced, ranges=fewer), by_step.weights, tmp_path, by_step.schemes)
