# SPDX-License-Identifier: Apache-2.0
"""Draws the test prompts with float PyTorch and with artifacts in their runtimes; counts what the judge reads right.

    python benchmarks/alignment.py build/int8 build/demo [--prompts 500] [--out benchmarks/results/alignment.json]

Paired: prompt i starts from the noise of seed i for everyone. The prompts are of the test split, which neither
training, calibration nor planning has seen.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.components import components_of, parameter_count
from turbopocket.export.recipe import parse_recipe
from turbopocket.export.targets.registry import open_target
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.pocket.judge import alignment, load_judge
from turbopocket.pocket.scenes import sample_scenes
from turbopocket.runtimes.compare.metrics import psnr_db
from turbopocket.runtimes.drawing.text_to_image import Pictures, generate_batch
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import Manifest, load_manifest
from turbopocket.runtimes.open import open_runner
from turbopocket.runtimes.runner import Runner

BATCH = 50


def draw_all(runner: Runner, folder: Path, manifest: Manifest, prompts: Sequence[str]) -> Pictures:
    """uint8 [N, H, W, 3] for all prompts, prompt i from the noise of seed i."""
    tokenizers = open_tokenizers(folder, manifest)
    parts = [range(start, min(start + BATCH, len(prompts))) for start in range(0, len(prompts), BATCH)]
    return np.concatenate(
        [generate_batch(runner, manifest, tokenizers, prompts[seeds.start : seeds.stop], seeds) for seeds in parts]
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in the artifact."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Draws, judges and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "alignment.json")
    options = parser.parse_args()
    scenes = sample_scenes("test", options.prompts, seed=0)
    prompts = [scene.caption for scene in scenes]
    judge = load_judge()
    first = load_manifest(options.artifacts[0])
    model = load(parse_recipe(first.recipe, "manifest").model.source)
    components = components_of(model)
    expected = draw_all(torch_runner(components), options.artifacts[0], first, prompts)
    judged = alignment(judge, expected, scenes)
    rows: dict[str, Any] = {"float": {"runtime": "pytorch", "alignment": judged.all_right, "by_label": judged.by_label}}
    print(json.dumps(rows), flush=True)
    for folder in options.artifacts:
        manifest = load_manifest(folder)
        found = draw_all(open_runner(folder, manifest), folder, manifest, prompts)
        judged = alignment(judge, found, scenes)
        rows[folder.name] = {
            "runtime": open_target(parse_recipe(manifest.recipe, "manifest").target).runtime_names[0],
            "bytes": folder_bytes(folder),
            "alignment": judged.all_right,
            "by_label": judged.by_label,
            "median_psnr_db_to_float": float(np.median([psnr_db(*pair) for pair in zip(found, expected, strict=True)])),
        }
        print(json.dumps(rows[folder.name]), flush=True)
    sampling = {"steps": first.sampler.steps, "guidance_scale": first.sampler.guidance_scale}
    fp16_bytes = 2 * sum(parameter_count(component) for component in components)
    about = {"model": model.name, "fp16_bytes": fp16_bytes, "prompts": options.prompts, "split": "test"}
    result = {**about, **sampling, "results": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
