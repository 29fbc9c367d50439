# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning inside a build: what is trained is what is shipped, checked and reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.build.build import build
from turbopocket.export.check import check
from turbopocket.export.output.staging import run_folder
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe

QUIET = StageProgress(quiet=True)
TUNE = {"iterations": 30, "pictures": 8, "batch": 8, "learning_rate": 5e-4}


@pytest.fixture(scope="module")
def values(tiny_sd: Path, recipe_values: dict[str, Any]) -> dict[str, Any]:
    """With bytes to spare: tuned norms are no longer equal, and what they take costs a model this small a format.

    Four pictures, since one may be lucky: the first one's UNet is three times closer than that of any other.
    """
    compress = recipe_values["compress"] | {"budget": "1200kB"}
    return {**recipe_values, "model": {"source": str(tiny_sd)}, "compress": compress, "parity": {"pictures": 4}}


@pytest.fixture(scope="module")
def built(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(make_recipe(values, "test"), tmp_path_factory.mktemp("plain") / "art", progress=QUIET, keep=True)


@pytest.fixture(scope="module")
def tuned(values: dict[str, Any], built: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """It goes on from what the plain one measured and compressed."""
    recipe = make_recipe({**values, "finetune": TUNE}, "test")
    out = tmp_path_factory.mktemp("tuned") / "art"
    return build(recipe, out, progress=QUIET, run=run_folder(built.folder), keep=True)


def worst(gaps: Any, component: str) -> float:
    return max(row.relative_error for row in gaps.compression.rows if row.component == component)


def test_artifact_is_closer_to_the_float_model_at_the_same_bytes(built: Any, tuned: Any) -> None:
    assert worst(tuned.gaps, "unet") < worst(built.gaps, "unet")
    assert {choice.scheme for choice in tuned.plan.choices} == {choice.scheme for choice in built.plan.choices}
    assert 0.99 * tuned.plan.total_bytes <= tuned.total_bytes <= tuned.plan.total_bytes


def test_runtime_computes_what_the_tuned_model_computes(tuned: Any) -> None:
    assert tuned.gaps.failure is None
    assert max(row.relative_error for row in tuned.gaps.lowering["onnxruntime"].rows) <= 1e-4


def test_check_knows_the_tuned_norms_and_biases(tuned: Any) -> None:
    checked = check(tuned.folder, QUIET)
    assert checked.failure is None
    assert checked.gaps is not None
    assert worst(checked.gaps, "unet") == pytest.approx(worst(tuned.gaps, "unet"), rel=1e-3)


def test_report_tells_what_it_gained(tuned: Any) -> None:
    told = json.loads((tuned.report.parent / "measurements.json").read_text())["fine_tuning"]
    assert set(told) == {"text_encoder", "unet", "vae_decoder"}
    assert told["unet"]["after"] < told["unet"]["before"]
    assert "on calls it did not train on" in tuned.report.read_text()
