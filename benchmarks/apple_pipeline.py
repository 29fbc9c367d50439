# SPDX-License-Identifier: Apache-2.0
"""What Apple's Swift package StableDiffusion would draw from an artifact: its two schedulers in our words, our graphs.

    python benchmarks/apple_pipeline.py build/demo [--prompts 32]

The package (github.com/apple/ml-stable-diffusion) knows no scheduler config. It walks 1,000 training steps with
DPM-Solver++ of second order (midpoint) or PNDM, always with two items a call, encodes an empty negative prompt, and
decodes the last estimate of the clean latents. Any artifact will do: graphs of all targets compute the same.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbopocket.pocket.judge import alignment, load_judge
from turbopocket.pocket.scenes import sample_scenes
from turbopocket.runtimes.compare.metrics import psnr_db
from turbopocket.runtimes.drawing.conditioning import condition, feed
from turbopocket.runtimes.drawing.text_to_image import decode, generate_batch, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import Manifest, load_manifest
from turbopocket.runtimes.open import open_runner
from turbopocket.runtimes.runner import Runner

TRAIN_STEPS = 1000
Array = NDArray[np.float32]
Predict = Callable[[Array, int], Array]


def signal_and_noise() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """sqrt(ᾱ) and sqrt(1 - ᾱ) of the 1,000 steps, `scaledLinear` from 0.00085 to 0.012."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS) ** 2)
    return np.sqrt(alphas), np.sqrt(1 - alphas)


def dpm_timesteps(count: int, spacing: str) -> list[int]:
    """`TimeStepSpacing.linspace` and `.leading`."""
    if spacing == "linspace":
        return [round(each) for each in np.linspace(0, TRAIN_STEPS - 1, count + 1)[:0:-1]]
    ratio = (TRAIN_STEPS - 1) // (count + 1)
    return [1 + index * ratio for index in range(count, 0, -1)]


def dpm_walk(predict: Predict, x: Array, count: int, spacing: str) -> Array:
    """DPM-Solver++ (2M) down to timestep 0 (arXiv 2211.01095); of fewer than 15 steps the first and the last two are of
    first order. Returns the last estimate of the clean latents."""
    signal, noise = signal_and_noise()
    half_log_snr = np.log(signal) - np.log(noise)
    steps, estimates = dpm_timesteps(count, spacing), list[Array]()
    for index, step in enumerate(steps):
        to = steps[index + 1] if index + 1 < count else 0
        estimates.append(((x - noise[step] * predict(x, step)) / signal[step]).astype(np.float32))
        h = half_log_snr[to] - half_log_snr[step]
        target = estimates[-1]
        if index > 0 and not (count < 15 and index >= count - 2):
            ratio = (half_log_snr[step] - half_log_snr[steps[index - 1]]) / h
            target = target + 0.5 / ratio * (target - estimates[-2])
        x = (noise[to] / noise[step] * x - signal[to] * np.expm1(-h) * target).astype(np.float32)
    return estimates[-1]


def pndm_walk(predict: Predict, x: Array, count: int) -> Array:
    """PLMS (arXiv 2202.09778) without Runge-Kutta: the second call repeats the first step. Returns as `dpm_walk`."""
    signal, noise = signal_and_noise()
    increment = TRAIN_STEPS // count
    forward = [index * increment + 1 for index in range(count)]
    steps = [*forward[:-1], forward[-2], forward[-1]][::-1]
    kept, begin, estimate = list[Array](), x, x
    for call, step in enumerate(steps):
        output, at, to = predict(x, step), step, step - increment
        if call == 1:
            at, to, x = step + increment, step, begin
            used = (output + kept[-1]) / 2
        else:
            kept = [*kept[-3:], output]
            weights = {
                1: (1,),
                2: (3 / 2, -1 / 2),
                3: (23 / 12, -16 / 12, 5 / 12),
                4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
            }
            used = sum(factor * each for factor, each in zip(weights[len(kept)], kept[::-1], strict=True))
        estimate = ((x - noise[at] * used) / signal[at]).astype(np.float32)
        a, b = signal[at] ** 2, signal[max(0, to)] ** 2
        down = a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b)
        x = (np.sqrt(b / a) * x - (b - a) / down * used).astype(np.float32)
    return estimate


def drawn(
    runner: Runner,
    folder: Path,
    manifest: Manifest,
    prompts: Sequence[str],
    walk: Callable[[Predict, Array], Array],
    guidance: float,
) -> NDArray[np.uint8]:
    """Pictures uint8 [N, H, W, 3], prompt i from the noise of seed i."""
    tokenizers, denoiser, image = open_tokenizers(folder, manifest), manifest.pipeline.denoiser, manifest.image
    with_prompt = condition(runner, manifest, tokenizers, prompts)
    without = condition(runner, manifest, tokenizers, [""] * len(prompts))
    scalar = (
        next(each for each in manifest.components["unet"].loop_inputs if each.name == denoiser.timestep).shape == []
    )

    def asked(x: Array, step: int, told: dict[str, Any]) -> Array:
        when = np.float32(step) if scalar else np.full(len(x), step, np.float32)
        values = {denoiser.latents: x, denoiser.timestep: np.asarray(when), **told}
        return runner.run("unet", feed(manifest, "unet", values))[denoiser.output].astype(np.float32)

    def predict(x: Array, step: int) -> Array:
        conditional = asked(x, step, with_prompt)
        if guidance == 1:
            return conditional
        away_from = asked(x, step, without)
        return away_from + np.float32(guidance) * (conditional - away_from)

    shape = (1, image.latent_channels, image.latent_height, image.latent_width)
    first = np.concatenate([seeded_noise(seed)(shape) for seed in range(len(prompts))])
    return np.round(decode(runner, manifest, walk(predict, first)) * 255).astype(np.uint8)


def configurations(steps: int) -> dict[str, tuple[Callable[[Predict, Array], Array], float]]:
    """Scheduler and guidance by name, all with the right `decoderScaleFactor` and sizes."""
    return {
        "`.dpmSolverMultistepScheduler`, `.leading`": (lambda p, x: dpm_walk(p, x, steps, "leading"), 1.0),
        "`.dpmSolverMultistepScheduler`, `.linspace`": (lambda p, x: dpm_walk(p, x, steps, "linspace"), 1.0),
        "`.pndmScheduler`": (lambda p, x: pndm_walk(p, x, steps), 1.0),
        "`.dpmSolverMultistepScheduler`, `.leading`, `guidanceScale` left at 7.5": (
            lambda p, x: dpm_walk(p, x, steps, "leading"),
            7.5,
        ),
    }


def measured(folder: Path, count: int) -> dict[str, Any]:
    """Alignment of each configuration, and its pictures' median PSNR to those of our own loop."""
    manifest = load_manifest(folder)
    runner, scenes, judge = open_runner(folder, manifest), sample_scenes("test", count, seed=0), load_judge()
    prompts = [scene.caption for scene in scenes]
    own = generate_batch(runner, manifest, open_tokenizers(folder, manifest), prompts, range(count))
    rows: dict[str, Any] = {"our own loop": {"alignment": alignment(judge, own, scenes).all_right}}
    for name, (walk, guidance) in configurations(manifest.sampler.steps).items():
        found = drawn(runner, folder, manifest, prompts, walk, guidance)
        psnr = float(np.median([psnr_db(*pair) for pair in zip(found, own, strict=True)]))
        rows[name] = {"alignment": alignment(judge, found, scenes).all_right, "median_psnr_db_to_own": psnr}
        print(name, rows[name], flush=True)
    return {"prompts": count, "split": "test", "steps": manifest.sampler.steps, "rows": rows}


def main() -> None:
    """Draws, judges and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "apple_pipeline.json")
    options = parser.parse_args()
    options.out.write_text(json.dumps(measured(options.artifact, options.prompts), indent=2) + "\n")


if __name__ == "__main__":
    main()
