# SPDX-License-Identifier: Apache-2.0
"""Measures a text-to-image model on scene prompts: alignment, and distance to drawn pictures.

python -m turbopocket.pocket.evaluate --out result.json
"""

import argparse
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .judge import FEATURE_WIDTH, Judge, Pictures, alignment, as_pictures, features, load_judge
from .render import SIDE, render
from .scenes import SPLITS, Split, sample_scenes

WEIGHTS = Path(__file__).parent / "weights"
DIT_WEIGHTS = Path(__file__).parent / "dit_weights"
SAMPLING_FILE = "sampling.json"
"""Beside model_index.json: the steps and the guidance that a model was chosen with."""
REFERENCE_PICTURES = 2000
BATCH = 50

ImagesFor = Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]]
"""Prompts and one seed each, to (N, 64, 64, 3) pictures."""


@dataclass(frozen=True)
class Evaluation:
    """Measured on `prompts` prompts of a split.

    Attributes:
        alignment: share of pictures that show exactly what their prompt says, 0 to 1.
        by_label: the same per label, and "count" for exactly two objects.
        frechet: Frechet distance of judge features to drawn pictures of the same split (0 is best; its unit
            is this judge's, not Inception's).
        frechet_floor: the same for drawn pictures of the prompts: what perfect pictures would score.
        ms_per_picture: wall clock.
    """

    split: str
    prompts: int
    alignment: float
    by_label: dict[str, float]
    frechet: float
    frechet_floor: float
    ms_per_picture: float


def first_noise(seeds: Sequence[int]) -> Tensor:
    """(N, 4, 8, 8) float32 standard normal latents, each from numpy's PCG64 of its seed alone."""
    shape = (4, SIDE // 8, SIDE // 8)
    draws = [np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(draws))


def pipeline_images(pipeline: Any, steps: int, guidance: float) -> ImagesFor:
    """Draws with a diffusers pipeline; each picture depends on its prompt and seed alone.

    Where a pipeline would look for the nearest size that it was trained at, or clean prompts, it is told not to.
    """
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    plain = {name: False for name in ("use_resolution_binning", "clean_caption") if name in known}

    def images_for(prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        pictures: NDArray[np.float32] = pipeline(
            prompt=list(prompts),
            latents=first_noise(seeds),
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
            **plain,
        ).images
        return np.round(pictures * 255).astype(np.uint8)

    return images_for


class _JudgeFeatures(nn.Module):
    """The judge as torchmetrics wants a feature extractor."""

    num_features = FEATURE_WIDTH

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, pictures: Tensor) -> Tensor:
        return features(self.judge, pictures)


def frechet_distance(judge: Judge, pictures: Pictures, reference: Pictures) -> float:
    """Frechet distance of the judge's features of two sets of pictures (Heusel et al. 2017, eq. 6).

    Raises:
        ValueError: see `judge.as_pictures`.
    """
    metric = FrechetInceptionDistance(_JudgeFeatures(judge), normalize=True)
    metric.update(as_pictures(reference), real=True)
    metric.update(as_pictures(pictures), real=False)
    return float(metric.compute())


def evaluate(images_for: ImagesFor, judge: Judge, *, split: Split, prompts: int, seed: int) -> Evaluation:
    """Draw `prompts` sampled prompts of a split, with noise seeds `seed`, `seed` + 1, ..., and measure."""
    scenes = sample_scenes(split, prompts, seed)
    started = time.perf_counter()
    captions, seeds = [scene.caption for scene in scenes], range(seed, seed + prompts)
    batches = [slice(first, first + BATCH) for first in range(0, prompts, BATCH)]
    pictures = np.concatenate([images_for(captions[batch], seeds[batch]) for batch in batches])
    elapsed_ms = 1000 * (time.perf_counter() - started)
    result = alignment(judge, pictures, scenes)
    generator = torch.Generator().manual_seed(seed)
    drawn = render(scenes, generator)
    others = render(sample_scenes(split, REFERENCE_PICTURES, seed + 1), generator)
    return Evaluation(
        split=split,
        prompts=prompts,
        alignment=result.all_right,
        by_label=result.by_label,
        frechet=frechet_distance(judge, pictures, others),
        frechet_floor=frechet_distance(judge, drawn, others),
        ms_per_picture=elapsed_ms / prompts,
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    """`content` at `path`, appearing there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    scratch.replace(path)


def main() -> None:
    """Command line of `python -m turbopocket.pocket.evaluate`."""
    parser = argparse.ArgumentParser(description="alignment and Frechet distance of a diffusers folder")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="diffusers folder (default: the shipped model)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, help="default: what the model's sampling.json says")
    parser.add_argument("--guidance", type=float, help="likewise")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(options.model, dtype=torch.float32)
    own = json.loads((options.model / SAMPLING_FILE).read_text())
    steps = options.steps or own["steps"]
    guidance = own["guidance_scale"] if options.guidance is None else options.guidance
    images_for = pipeline_images(pipeline, steps, guidance)
    result = evaluate(images_for, load_judge(), split=options.split, prompts=options.prompts, seed=options.seed)
    settings = {"steps": steps, "guidance": guidance, "seed": options.seed}
    write_json(options.out, {**settings, **asdict(result)})
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
