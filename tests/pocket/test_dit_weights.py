# SPDX-License-Identifier: Apache-2.0
"""The shipped transformer: a plain diffusers folder that draws what its results say, and is built and drawn from."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import PixArtAlphaPipeline

from turbopocket.export.artifact import Artifact
from turbopocket.export.build.build import build
from turbopocket.export.checkpoint.bundled import BUNDLED
from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import SceneEvidence, evidence_for
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.pocket.evaluate import evaluate, pipeline_images
from turbopocket.pocket.judge import load_judge
from turbopocket.pocket.scenes import sample_scenes

FOLDER = BUNDLED["pocket-dit"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "pocket_dit.json"


def test_held_out_prompts_are_drawn_about_as_well_as_the_results_say() -> None:
    results = json.loads(RESULTS.read_text())
    assert results["test"]["alignment"] >= 0.95
    pipeline = PixArtAlphaPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    images_for = pipeline_images(pipeline, results["steps"], results["guidance"])
    assert evaluate(images_for, load_judge(), split="test", prompts=16, seed=7).alignment >= 0.85


def test_its_pictures_are_judged_as_those_of_pocket_are() -> None:
    assert isinstance(evidence_for(load("pocket-dit")), SceneEvidence)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_it_is_built_and_drawn_from(target: str, tmp_path: Path) -> None:
    values = {
        "model": {"source": "pocket-dit"},
        "target": {"name": target},
        "compress": {"budget": "12MB"},
        "parity": {"pictures": 8},
    }
    built = build(make_recipe(values, "test"), tmp_path / "art", overwrite=False, progress=StageProgress(quiet=True))
    assert built.gaps.failure is None
    assert built.total_bytes <= 12_000_000
    assert built.gaps.alignment["artifact"] is not None
    assert built.gaps.alignment["artifact"] >= 0.85
    prompt = sample_scenes("test", 1, 0)[0].caption
    assert Artifact.open(tmp_path / "art").generate(prompt, seed=7).size == (64, 64)
