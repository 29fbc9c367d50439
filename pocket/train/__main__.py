# SPDX-License-Identifier: Apache-2.0
"""Command line of the training stages: judge, text encoders, VAE, UNet, ship; and of pocket-dit's: T5, transformer,
ship.

    python -m turbopocket.pocket.train all --folder build/pocket
    python -m turbopocket.pocket.train pocket-dit --folder build/pocket-dit --preview build/pocket-dit-preview

A stage that was stopped goes on where its last checkpoint lies; a finished one returns at once.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..evaluate import DIT_WEIGHTS, WEIGHTS, evaluate, pipeline_images
from ..judge import JUDGE_FILE, load_judge
from .dit import train_dit
from .judge import train_judge
from .ship import ship
from .ship_dit import ship_dit
from .t5 import train_t5
from .text import train_text
from .unet import train_unet
from .vae import train_vae

SEED = 1
STAGES = ("judge", "text", "vae", "unet", "ship")
DIT_STAGES = ("t5", "dit", "ship-dit")
"""Of pocket-dit, which takes VAE and judge from the shipped `pocket`."""
STAGES_OF = {"all": STAGES, "pocket-dit": DIT_STAGES}
WATCHED_PROMPTS, WATCHED_STEPS, WATCHED_GUIDANCE = 64, 12, 3.0


def watch(model: Path, judge_file: Path) -> None:
    """Print how a preview does on a few selection prompts."""
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    images_for = pipeline_images(pipeline, WATCHED_STEPS, WATCHED_GUIDANCE)
    result = evaluate(images_for, load_judge(judge_file), split="selection", prompts=WATCHED_PROMPTS, seed=SEED)
    print("selection:", asdict(result), flush=True)


def run_stage(stage: str, options: argparse.Namespace) -> None:
    """Train one stage in `options.folder`; each needs those before it in `STAGES`."""
    folder: Path = options.folder
    judge_file = folder / "judge" / "judge.safetensors"
    if stage == "judge":
        train_judge(folder / "judge", steps=800, batch=128, seed=SEED)
    elif stage == "text":
        train_text(folder / "text", steps=900, batch=64, seed=SEED)
    elif stage == "vae":
        train_vae(folder / "vae", steps=3000, batch=16, seed=SEED)
    elif stage == "unet":
        train_unet(
            folder,
            steps=options.unet_steps,
            captions=40,
            seed=SEED,
            preview=options.preview,
            watch=lambda model: watch(model, judge_file),
        )
    elif stage == "t5":
        train_t5(folder / "t5", steps=800, batch=64, seed=SEED)
    elif stage == "dit":
        train_dit(
            folder,
            WEIGHTS / "vae",
            steps=options.dit_steps,
            pictures=320,
            seed=SEED,
            preview=options.preview,
            watch=lambda model: watch(model, JUDGE_FILE),
        )
    elif stage == "ship-dit":
        ship_dit(folder, options.preview, DIT_WEIGHTS, options.dit_results, options.dit_sheet)
    else:
        ship(folder, options.preview, options.weights, options.results, options.sheet)


def main() -> None:
    """Run the stages the command line asks for, in order."""
    parser = argparse.ArgumentParser(prog="turbopocket.pocket.train", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, *DIT_STAGES, *STAGES_OF))
    parser.add_argument("--folder", type=Path, default=Path("build/pocket"), help="where the runs live")
    parser.add_argument("--preview", type=Path, default=Path("build/pocket-preview"), help="pipeline of the UNet stage")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where `ship` writes the finished model")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/pocket_float.json"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/pocket_sheet.png"))
    parser.add_argument("--dit-results", type=Path, default=Path("benchmarks/results/pocket_dit.json"))
    parser.add_argument("--dit-sheet", type=Path, default=Path("docs/pocket_dit_sheet.png"))
    parser.add_argument("--unet-steps", type=int, default=3400, help="optimiser steps of the UNet, 160 pictures each")
    parser.add_argument(
        "--dit-steps", type=int, default=2000, help="optimiser steps of the transformer, 320 pictures each"
    )
    options = parser.parse_args()
    for stage in STAGES_OF.get(options.stage, (options.stage,)):
        run_stage(stage, options)


if __name__ == "__main__":
    main()
