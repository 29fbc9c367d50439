# SPDX-License-Identifier: Apache-2.0
"""Layers whose activations are rounded, in ONNX: which are, by what scales, and against which PyTorch they are held."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from turbopocket.export.families.graphs import Component, ComponentModule
from turbopocket.export.target_options import OnnxOptions
from turbopocket.export.targets.onnx.target import ROUNDED_OUTPUT_ERROR, Onnx
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.calibrate import calibrate, ranges_of
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import CompressedTensor, parse_format
from turbopocket.quant.ranges import Ranges
from turbopocket.quant.scheme import parse_scheme
from turbopocket.runtimes.compare.metrics import relative_error
from turbopocket.runtimes.compare.replay import Call, compare_by_layer
from turbopocket.runtimes.compare.rows import Limits

from ...stand_ins import OneComponent

WIDTH = 32


class Part(nn.Module):
    """Layers of every kind: strided, 1x1, with and without bias, one channel whose weights are next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, WIDTH, 3, stride=2, padding=1)
        self.point = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.query, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH)
        with torch.no_grad():
            self.strided.weight[3] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.point(torch.nn.functional.silu(self.strided(x)))
        return self.out(torch.nn.functional.gelu(self.query(pixels.flatten(2).transpose(1, 2))))


class Wrapped(ComponentModule):
    def forward(self, sample: Tensor) -> Tensor:
        return self.model(sample)


LAYERS = ("strided", "point", "query", "out")


@dataclass(frozen=True)
class Built:
    """A part in one format, lowered with one way of rounding."""

    target: Onnx
    component: Component
    ranges: dict[str, Ranges]
    weights: dict[str, CompressedTensor]
    folder: Path
    manifest: Any

    @property
    def runner(self) -> Any:
        return self.target.runtimes(self.folder, self.manifest, self.weights, 1.0)["onnxruntime"].runner


@pytest.fixture(scope="module")
def part() -> tuple[Component, dict[str, Ranges]]:
    torch.manual_seed(0)
    model = Part().eval()
    sample = {"sample": torch.zeros(2, 4, 8, 8)}
    component = Component("part", Wrapped("part", model), sample, ("row",), role="denoiser")
    samples = torch.randn(16, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return component, ranges_of(calibrate({"part": model}, lambda: [component.module(each) for each in samples]))


def build(part: tuple[Component, dict[str, Ranges]], activations: str, folder: Path) -> Built:
    component, ranges = part
    target = Onnx(OnnxOptions(activations=activations))  # type: ignore[arg-type]
    model, format = component.module.model, parse_format("int8-row")
    weights = {f"part.{each}": format.compress(model.get_parameter(f"{each}.weight"), ABSMAX) for each in LAYERS}
    spec = target.lower(target.fitted(target.trace(component), component, ranges), weights, folder)
    return Built(target, component, ranges, weights, folder, OneComponent({"part": spec}))


def sample(pictures: int, seed: int = 1) -> dict[str, Any]:
    return {"sample": np.random.default_rng(seed).standard_normal((pictures, 4, 8, 8), dtype=np.float32)}


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_picture_is_the_one_it_would_be_alone(activations: str, part: Any, tmp_path: Path) -> None:
    """Scales of a whole tensor would be those of the largest picture."""
    runner, both = build(part, activations, tmp_path).runner, sample(2)
    both["sample"][1] *= 0.1
    together = runner.run("part", both)["row"]
    alone = [runner.run("part", {"sample": both["sample"][index : index + 1]})["row"] for index in range(2)]
    assert relative_error(together, np.concatenate(alone)) < 1e-6


@pytest.mark.parametrize(
    ("activations", "linear"), [("static", "int8-row+a8-static+float"), ("dynamic", "int8-row+a8-dynamic")]
)
def test_every_layer_is_the_one_that_pytorch_rounds(activations: str, linear: str, part: Any, tmp_path: Path) -> None:
    built = build(part, activations, tmp_path)
    schemes = built.target.schemes_of(built.weights, ranges=built.ranges)
    assert {str(schemes[f"part.{each}"]) for each in ("strided", "point")} == {"int8-row+a8-static"}
    assert str(schemes["part.out"]) == linear
    limit = built.target.lowering_limit(schemes)
    assert limit == ROUNDED_OUTPUT_ERROR > built.target.lowering_limit({"part.out": schemes["part.out"]})
    (runtime,) = built.target.runtimes(built.folder, built.manifest, built.weights, limit, schemes).values()
    assert runtime.limits.by_layer
    found = runtime.runner.run("part", sample(1))
    as_run = torch_runner([built.target.as_run(built.component, built.weights, built.ranges, schemes)])
    call = Call("part", sample(1), as_run.run("part", sample(1)))
    row, first = compare_by_layer(as_run, runtime.runner, call, found, 0, runtime.limits)
    assert first is None
    assert row.passed
    floats = torch_runner([built.component])
    row, first = compare_by_layer(floats, runtime.runner, call, found, 0, Limits(max_relative_error=3e-3))
    assert first is not None, "is anything rounded?"


def test_other_scales_than_those_of_the_file_turn_the_layer_red(part: Any, tmp_path: Path) -> None:
    built = build(part, "static", tmp_path)
    for layer in LAYERS:
        seen = built.ranges[f"part.{layer}"]
        wider = built.ranges | {f"part.{layer}": replace(seen, input=(-20.0, 20.0))}
        schemes = built.target.schemes_of(built.weights, ranges=built.ranges)
        as_run = torch_runner([built.target.as_run(built.component, built.weights, wider, schemes)])
        (runtime,) = built.target.runtimes(built.folder, built.manifest, built.weights, 1.5e-2, schemes).values()
        call = Call("part", sample(1), as_run.run("part", sample(1)))
        found = runtime.runner.run("part", sample(1))
        _, first = compare_by_layer(as_run, runtime.runner, call, found, 0, runtime.limits)
        assert first is not None
        assert first.layer == layer


def test_layers_that_static_scales_would_ruin_keep_their_digits(part: Any) -> None:
    _, ranges = part
    target = Onnx(OnnxOptions(activations="static"))
    faint = {name: replace(seen, input_power=1e-9) for name, seen in ranges.items()}
    quiet = {name: replace(seen, quietest_output_power=1e-9) for name, seen in ranges.items()}
    scheme = parse_scheme("int8-row")
    for seen, linear in ((faint, "int8-row+a8-dynamic"), (quiet, "int8-row+a8-static+float")):
        assert str(target.resolved("part.out", scheme, "linear", seen)) == linear
        assert str(target.resolved("part.strided", scheme, "conv2d", seen)) == "int8-row"


def test_formats_without_one_scale_a_row_stay_beside_floats() -> None:
    target = Onnx(OnnxOptions(activations="static"))
    for name in ("int8-g32", "int4-row", "int4-g32", "int8-row-asym", "fp16"):
        assert str(target.resolved("part.out", parse_scheme(name), "linear", {})) == name


def test_static_scales_need_calibration(part: Any, tmp_path: Path) -> None:
    built = build(part, "static", tmp_path)
    with pytest.raises(TurbopocketError) as caught:
        built.target.lower(built.target.trace(built.component), built.weights, tmp_path / "again")
    assert str(caught.value) == "part.strided: int8-row+a8-static needs the ranges that calibration saw"
    assert not (tmp_path / "again").exists()


def test_a_convolution_has_no_scales_found_while_it_runs() -> None:
    reason = Onnx().storable(parse_scheme("int8-row+a8-dynamic"), "conv2d", (32, 32, 3, 3))
    assert reason == "ONNX Runtime's convolution with scales found while it runs takes several times as long as fp32"
