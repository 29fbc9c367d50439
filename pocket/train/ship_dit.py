# SPDX-License-Identifier: Apache-2.0
"""The last stage of pocket-dit: chooses its guidance on selection prompts, writes the shipped folder, measures it on
test ones."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import PixArtAlphaPipeline

from ..evaluate import SAMPLING_FILE, evaluate, pipeline_images, write_json
from ..judge import load_judge
from ..sheet import write_sheet
from .ship import GUIDANCES, SELECTION_PROMPTS, STEPS, TEST_PROMPTS, last_logged

CARD = """---
license: apache-2.0
author: the turbopocket project
---
# pocket-dit

A diffusion transformer of PixArt's topology that draws pictures of two coloured shapes, with the VAE of `pocket` and a
T5 encoder of its own.
"""


def ship_dit(folder: Path, model: Path, weights: Path, results: Path, sheet: Path, seed: int = 0) -> None:
    """Write `weights` (diffusers folder), the results JSON and the picture sheet.

    Args:
        folder: where the earlier stages ran.
        model: pipeline folder of the transformer stage.
    """
    judge = load_judge()
    pipeline = PixArtAlphaPipeline.from_pretrained(model, dtype=torch.float32)
    trials = {}
    for guidance in GUIDANCES:
        images_for = pipeline_images(pipeline, STEPS, guidance)
        trials[guidance] = evaluate(images_for, judge, split="selection", prompts=SELECTION_PROMPTS, seed=seed)
    guidance = min(trials, key=lambda choice: (-trials[choice].alignment, trials[choice].frechet))
    shutil.copytree(model, weights, dirs_exist_ok=True)
    write_json(weights / SAMPLING_FILE, {"steps": STEPS, "guidance_scale": guidance})
    write_json(weights / "evidence.json", {"prompts": "scenes"})
    (weights / "README.md").write_text(CARD, encoding="utf-8")
    for file in weights.rglob("*.safetensors"):
        file.chmod(0o644)
    shipped = PixArtAlphaPipeline.from_pretrained(weights, dtype=torch.float32)
    images_for = pipeline_images(shipped, STEPS, guidance)
    content = {
        "model": "float",
        "steps": STEPS,
        "guidance": guidance,
        "selection_alignment": {str(choice): trial.alignment for choice, trial in trials.items()},
        "test": asdict(evaluate(images_for, judge, split="test", prompts=TEST_PROMPTS, seed=seed)),
        "training": {stage: last_logged(folder / stage / "log.jsonl") for stage in ("t5", "dit")},
    }
    write_json(results, content)
    write_sheet(images_for, sheet, seed)
