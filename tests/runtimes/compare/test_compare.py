# SPDX-License-Identifier: Apache-2.0
"""A runtime that computes right passes; a planted fault is found, in its component, step and layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from turbopocket.ground.arrays import Arrays
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.compare.reference import PyTorchRunner
from turbopocket.runtimes.compare.replay import (
    Call,
    Limits,
    ParityReport,
    compare,
    compare_by_layer,
    compare_call,
    first_divergence,
    record,
)

from ..conftest import TinyModel, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

GUILTY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
LIMITS = Limits(max_relative_error=1e-5)
CALL = Call("unet", {"timestep": np.array([999.0])}, {})


@pytest.fixture
def model(tiny_sdxl: Path, tmp_path: Path) -> TinyModel:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    return tiny_model(pipeline, "sdxl", tmp_path, scheduler, guidance=0.0, steps=2)


class Faulty:
    """A runner that computes as `runner` does, with one layer's bias or weight moved while it runs."""

    def __init__(self, runner: PyTorchRunner, component: str, layer: str, by: float) -> None:
        self.runner, self.component, self.layer, self.by = runner, component, layer, by

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._moved(component, lambda: self.runner.run(component, inputs))

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        return self._moved(component, lambda: self.runner.run_layers(component, inputs, layers))

    def _moved(self, component: str, run: Any) -> Arrays:
        found = self.runner.components[component]
        if component != self.component:
            return run()
        weight = found.module.get_submodule(found.layer_prefix + self.layer).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1 + self.by)
        try:
            return run()
        finally:
            with torch.no_grad():
                weight.copy_(before)


def report_of(model: TinyModel, candidate: Any, **options: Any) -> ParityReport:
    drawing = model.manifest, model.tokenizers
    recordings = record(model.runner, *drawing, ["a red circle", "blue cat"], 0)
    return compare(model.runner, recordings, candidate, *drawing, LIMITS, **options)[0]


def test_reference_passes_against_itself(model: TinyModel) -> None:
    report = report_of(model, model.runner)
    assert report.passed
    assert report.failure is None
    assert report.first_divergence is None
    called = ["text_encoder", "text_encoder_2", "unet", "unet", "vae_decoder"]
    assert [row.component for row in report.rows] == 2 * called
    assert [row.timestep for row in report.rows[:5]] == [None, None, 999, 499, None]
    assert [row.picture for row in report.rows] == [0] * 5 + [1] * 5
    assert [(row.prompt, row.seed, row.psnr_db, row.ssim) for row in report.pictures] == [
        ("a red circle", 0, None, pytest.approx(1)),
        ("blue cat", 1, None, pytest.approx(1)),
    ]


def test_planted_fault_is_blamed_on_its_layer(model: TinyModel) -> None:
    report = report_of(model, Faulty(model.runner, "unet", GUILTY, by=0.5))
    assert not report.passed
    assert {row.component for row in report.rows if not row.passed} == {"unet"}
    assert report.first_divergence is not None
    assert report.first_divergence.layer == GUILTY
    assert report.first_divergence.relative_error == pytest.approx(0.5, rel=1e-4)
    assert report.first_divergence.timestep == 999
    assert report.failure is not None
    assert f"the first layer to diverge is unet.{GUILTY} (0.5)" in report.failure
    assert "is over 1e-05 in output out_sample" in report.failure


def test_a_fault_of_the_text_encoder_is_not_charged_to_the_unet(model: TinyModel) -> None:
    layers = model.runner.layers("text_encoder")
    guilty = next(layer for layer in layers if layer.endswith("layers.0.self_attn.v_proj"))
    report = report_of(model, Faulty(model.runner, "text_encoder", guilty, by=0.5))
    assert {row.component for row in report.rows if not row.passed} == {"text_encoder"}
    assert report.first_divergence is not None
    assert (report.first_divergence.component, report.first_divergence.layer) == ("text_encoder", guilty)


def test_report_reads_back_equal_even_with_infinite_errors(model: TinyModel) -> None:
    report = report_of(model, Faulty(model.runner, "vae_decoder", "decoder.conv_out", by=math.inf))
    assert report.worst is not None
    assert report.worst.relative_error == math.inf
    assert not report.passed
    assert [(row.psnr_db, row.ssim) for row in report.pictures] == [(-math.inf, 0), (-math.inf, 0)]
    assert ParityReport.model_validate_json(report.model_dump_json()) == report


def test_feature_distance_is_asked_about_each_pair_of_pictures(model: TinyModel) -> None:
    report = report_of(model, model.runner, feature_distance=lambda a, b: float((a == b).mean()) + a.shape[0])
    assert [row.feature_distance for row in report.pictures] == [33.0, 33.0]


def test_first_divergence_is_the_first_in_execution_order_not_the_worst() -> None:
    one = np.ones(4)
    expected = {"a": one, "b": one, "c": one}
    found = first_divergence(CALL, expected, {"c": one * 9, "b": one * 1.2, "a": one * 1.01}, 0.1)
    assert found is not None
    assert found.layer == "b"
    assert found.relative_error == pytest.approx(0.2)
    assert found.max_abs_error == pytest.approx(0.2)


def test_layers_shown_by_one_side_only_are_passed_over() -> None:
    one = np.ones(4)
    assert first_divergence(CALL, {"a": one, "b": one}, {"b": one, "c": one}, 0.1) is None


def test_layer_of_another_shape_has_diverged() -> None:
    found = first_divergence(CALL, {"a": np.ones((2, 3))}, {"a": np.ones((3, 2))}, 0.1)
    assert found is not None
    assert found.relative_error == math.inf


class Misnaming:
    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return {"noise_pred": np.zeros(1)}


def test_outputs_of_another_name_are_refused() -> None:
    call = Call("unet", {}, {"out_sample": np.zeros(1)})
    with pytest.raises(TurbopocketError, match="unet: outputs are missing out_sample; unknown noise_pred"):
        compare_call(Misnaming(), call, 0, LIMITS)


class OneLayer:
    """Shows `shown` as what its only layer computes; as a reference, it computes ones."""

    def __init__(self, shown: NDArray[Any]) -> None:
        self.shown = shown

    def layers(self, component: str) -> list[str]:
        return ["a"]

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return {"y": np.ones(4)}

    def run_layers(self, component: str, inputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> Arrays:
        return {"a": self.shown}

    def run_following(
        self, component: str, inputs: Mapping[str, NDArray[Any]], followed: Mapping[str, NDArray[Any]]
    ) -> tuple[Arrays, Arrays]:
        return self.run(component, inputs), {"a": np.ones((2, 3))}


@pytest.mark.parametrize(
    ("shown", "passed"),
    [(np.ones((2, 3)), True), (np.ones((3, 2)), False), (np.full((2, 3), np.nan), False), (np.zeros((2, 3)), False)],
    ids=["right", "another shape", "not a number", "wrong"],
)
def test_by_layer_a_wrong_layer_fails_a_call_whose_outputs_are_right(shown: NDArray[Any], passed: bool) -> None:
    reference, call = OneLayer(np.ones((2, 3))), Call("unet", {}, {"y": np.ones(4)})
    row, first = compare_by_layer(reference, OneLayer(shown), call, {"y": np.ones(4)}, 0, LIMITS)
    assert row.passed is passed
    assert (first is None) is passed
