# SPDX-License-Identifier: Apache-2.0
"""The last stage: chooses how to sample on selection prompts, writes the shipped folder, measures it on test ones."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

from ..evaluate import SAMPLING_FILE, Evaluation, evaluate, pipeline_images, write_json
from ..judge import Judge, alignment, load_judge
from ..render import render
from ..scenes import sample_scenes
from ..sheet import write_sheet
from .judge import held_out_accuracy
from .loop import step_generator
from .text import TextEncoders, start_ratio

STEPS = 20
SPACINGS = ("leading", "trailing")
GUIDANCES = (1.5, 2.5, 4.0)
LOGGED_STAGES = ("judge", "text", "vae", "unet")
SELECTION_PROMPTS, TEST_PROMPTS = 128, 500


def ship(folder: Path, model: Path, weights: Path, results: Path, sheet: Path, seed: int = 0) -> None:
    """Write `weights` (diffusers folder and judge), the results JSON and the picture sheet.

    Args:
        folder: where the earlier stages ran.
        model: pipeline folder of the UNet stage.
    """
    judge_file = folder / "judge" / "judge.safetensors"
    judge = load_judge(judge_file)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32)
    trials = try_samplers(pipeline, judge, seed)
    spacing, guidance = min(trials, key=lambda choice: (-trials[choice].alignment, trials[choice].frechet))
    set_spacing(pipeline, spacing)
    write_weights(pipeline, model, judge_file, weights)
    write_json(weights / SAMPLING_FILE, {"steps": STEPS, "guidance_scale": guidance})
    write_json(weights / "evidence.json", {"prompts": "scenes"})
    shipped = StableDiffusionXLPipeline.from_pretrained(weights, dtype=torch.float32)
    images_for = pipeline_images(shipped, STEPS, guidance)
    result = evaluate(images_for, judge, split="test", prompts=TEST_PROMPTS, seed=seed)
    content = {
        "model": "float",
        "steps": STEPS,
        "guidance": guidance,
        "timestep_spacing": spacing,
        "selection_alignment": {f"{s} {g}": trial.alignment for (s, g), trial in trials.items()},
        "test": asdict(result),
        "judge_accuracy": held_out_accuracy(judge, 2000, seed),
        "vae_reconstruction": reconstruction_alignment(shipped.vae, judge, seed),
        "start_token_ratio": start_ratio(TextEncoders.load(weights), seed),
        "training": {stage: last_logged(folder / stage / "log.jsonl") for stage in LOGGED_STAGES},
    }
    write_json(results, content)
    write_sheet(images_for, sheet, seed)


def last_logged(log: Path) -> dict[str, float]:
    """The last line that a stage logged: its steps, its loss, its speed."""
    last: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return last


def set_spacing(pipeline: StableDiffusionXLPipeline, spacing: str) -> None:
    """Make the pipeline's scheduler space its timesteps so."""
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)


def try_samplers(pipeline: StableDiffusionXLPipeline, judge: Judge, seed: int) -> dict[tuple[str, float], Evaluation]:
    """How each timestep spacing and guidance does on selection prompts."""
    trials = {}
    for spacing in SPACINGS:
        set_spacing(pipeline, spacing)
        for guidance in GUIDANCES:
            images_for = pipeline_images(pipeline, STEPS, guidance)
            trials[spacing, guidance] = evaluate(
                images_for, judge, split="selection", prompts=SELECTION_PROMPTS, seed=seed
            )
            print(spacing, guidance, trials[spacing, guidance], flush=True)
    return trials


def write_weights(pipeline: StableDiffusionXLPipeline, model: Path, judge_file: Path, weights: Path) -> None:
    """The pipeline in half precision, tokenizer files as `model` has them, and the judge, in `weights`."""
    shutil.copytree(model, weights, dirs_exist_ok=True)
    for part in ("unet", "vae"):
        # A fresh read keeps the pipeline itself in float32.
        module = type(getattr(pipeline, part)).from_config(getattr(pipeline, part).config)
        module.load_state_dict(getattr(pipeline, part).state_dict())
        module.half().save_pretrained(weights / part)
    pipeline.scheduler.save_pretrained(weights / "scheduler")
    (weights / "judge").mkdir(exist_ok=True)
    shutil.copyfile(judge_file, weights / "judge" / "judge.safetensors")
    for file in weights.rglob("*.safetensors"):
        file.chmod(0o644)


@torch.no_grad()
def reconstruction_alignment(vae: AutoencoderKL, judge: Judge, seed: int) -> float:
    """Share of 500 test scenes read all right after encoding and decoding."""
    scenes = sample_scenes("test", TEST_PROMPTS, seed)
    targets = (2 * render(scenes, step_generator(seed, 0)) - 1).split(50)
    decoded = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in targets])
    return alignment(judge, (decoded / 2 + 0.5).clamp(0, 1), scenes).all_right
