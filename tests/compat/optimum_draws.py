# SPDX-License-Identifier: Apache-2.0
"""Opens an artifact with optimum-onnx's own pipeline and draws with it: our files are no private dialect.

optimum-onnx needs older libraries than turbopocket, so this runs in an environment of its own:

    python -m venv .venv-optimum
    .venv-optimum/bin/pip install 'optimum-onnx==0.1.*' 'transformers<4.58' diffusers onnxruntime torch
    .venv-optimum/bin/python tests/compat/optimum_draws.py <artifact> [prompt] [picture.png]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTStableDiffusionPipeline, ORTStableDiffusionXLPipeline

PIPELINES = {"sdxl": ORTStableDiffusionXLPipeline, "sd": ORTStableDiffusionPipeline}


def draw(artifact: Path, prompt: str) -> np.ndarray:
    """The picture uint8 [H, W, 3] that optimum draws with the steps, guidance and size of the artifact's manifest."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    pipeline = PIPELINES[manifest["family"]].from_pretrained(artifact, export=False)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompt,
        height=manifest["image"]["height"],
        width=manifest["image"]["width"],
        num_inference_steps=manifest["sampler"]["steps"],
        guidance_scale=manifest["sampler"]["guidance_scale"],
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    if not np.isfinite(drawn).all():
        raise SystemExit("optimum drew a picture with NaN")
    return (drawn * 255).round().astype(np.uint8)


def main(artifact: str, prompt: str = "a red circle", picture: str | None = None) -> None:
    pixels = draw(Path(artifact), prompt)
    image = json.loads((Path(artifact) / "manifest.json").read_text())["image"]
    if pixels.shape != (image["height"], image["width"], 3):
        raise SystemExit(f"optimum drew {pixels.shape}, the manifest says {image['height']} x {image['width']}")
    if pixels.std() == 0:
        raise SystemExit("optimum drew one flat colour")
    if (pixels == draw(Path(artifact), prompt + " and a blue square")).all():
        raise SystemExit("optimum draws the same whatever the prompt says")
    if picture is not None:
        from PIL import Image

        Image.fromarray(pixels).save(picture)
    print(
        f"optimum drew {pixels.shape[1]} x {pixels.shape[0]} pixels, mean {pixels.mean():.1f}, std {pixels.std():.1f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
