# SPDX-License-Identifier: Apache-2.0
"""The shipped student: a plain diffusers folder that draws what its results say, in four steps and in one."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from turbopocket.export.checkpoint.bundled import BUNDLED
from turbopocket.export.checkpoint.load import load
from turbopocket.export.evidence import SceneEvidence, evidence_for
from turbopocket.pocket.evaluate import evaluate, pipeline_images
from turbopocket.pocket.judge import load_judge

FOLDER = BUNDLED["pocket-turbo"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "distillation_students.json"


@pytest.mark.parametrize("steps", [4, 1])
def test_held_out_prompts_are_drawn_about_as_well_as_the_results_say(steps: int) -> None:
    results = json.loads(RESULTS.read_text())["results"]
    least = {4: 0.97, 1: 0.85}[steps] * results["teacher 20"]["alignment"]
    assert results[f"tdm {steps}"]["alignment"] >= least
    pipeline = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.unet = load("pocket-turbo", steps=steps).modules["unet"]
    measured = evaluate(pipeline_images(pipeline, steps, 1.0), load_judge(), split="test", prompts=32, seed=7)
    assert measured.alignment >= results[f"tdm {steps}"]["alignment"] - 0.1


def test_it_differs_from_its_teacher_in_the_unet_and_the_way_to_sample_only() -> None:
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        for file in (FOLDER / part).iterdir():
            assert file.read_bytes() == (BUNDLED["pocket"] / part / file.name).read_bytes(), file


def test_its_pictures_are_judged_as_its_teachers_are() -> None:
    assert isinstance(evidence_for(load("pocket-turbo")), SceneEvidence)
