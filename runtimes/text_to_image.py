# SPDX-License-Identifier: Apache-2.0
"""SDXL and Stable Diffusion in numpy over any runner: the loop a phone has to repeat."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conditioning import condition, feed, guidance_condition, unconditional
from .errors import TurbopocketError
from .latents import to_vae
from .manifest import Manifest
from .runner import Runner, component_spec
from .sampler import Memory, NoiseSource, Sampler, make_sampler
from .tokenizer import Tokenizer

Array = NDArray[np.float32]


class NotFinite(TurbopocketError):
    """A runtime's picture holds NaN: the artifact overflows, or was damaged."""


def generate(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompt: str,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
) -> NDArray[np.uint8]:
    """The picture [H, W, 3], the same for every runtime that computes right: noise comes from numpy's PCG64.

    `steps` and `guidance` default to the manifest's. Raises TurbopocketError for an empty prompt, and for steps
    that a student's artifact was not built for; `NotFinite` when the runtime computes nonsense. Warns `PromptCut` for
    a prompt that is too long.
    """
    noise = seeded_noise(seed)
    picture = draw(runner, manifest, tokenizers, prompt, noise, steps, guidance, negative_prompt)
    if odd := int(picture.size - np.isfinite(picture).sum()):
        raise NotFinite(f"{manifest.name}: {odd} of {picture.size} values of the picture are not finite")
    return np.round(picture * 255).astype(np.uint8)


def draw(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompt: str,
    noise: NoiseSource,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
) -> Array:
    """The picture [H, W, 3] in 0..1; `noise` gives the initial latents, then what single steps need."""
    if not prompt.strip():
        raise TurbopocketError("the prompt is empty: say what the picture should show")
    built_for = manifest.sampler.steps
    if manifest.only_these_steps and steps not in (None, built_for):
        raise TurbopocketError(
            f"{manifest.name} was distilled, and this artifact built for {built_for} steps; {steps} were asked",
            hint=f"build another with --steps {steps}",
        )
    scale = manifest.sampler.guidance_scale if guidance is None else guidance
    sampler = make_sampler(manifest.sampler, steps)
    told = guidance_condition(manifest, scale)
    if told and negative_prompt is not None:
        raise TurbopocketError(
            f"a negative prompt has no effect on {manifest.name}: its UNet is told the guidance, and asked once"
        )
    conditions = [condition(runner, manifest, tokenizers, prompt) | told]
    if scale > 1 and not told:
        conditions.append(unconditional(runner, manifest, tokenizers, negative_prompt, conditions[0]))
    elif negative_prompt is not None:
        raise TurbopocketError(f"a negative prompt has no effect at guidance {scale:g}: it needs more than 1")
    return decode(runner, manifest, _denoise(runner, manifest, sampler, conditions, scale, noise))


def seeded_noise(seed: int) -> NoiseSource:
    """Standard normal float32 numbers from `numpy.random.default_rng(seed)`, in the order of asking."""
    rng = np.random.default_rng(seed)
    return lambda shape: rng.standard_normal(shape, dtype=np.float32)


def decode(runner: Runner, manifest: Manifest, latents: Array) -> Array:
    """The picture [H, W, 3] in 0..1 that clean latents [1, C, h, w] stand for."""
    z = {"latent_sample": to_vae(manifest.image, latents)}
    sample = runner.run("vae_decoder", feed(manifest, "vae_decoder", z))["sample"].astype(np.float32)
    return np.clip(sample[0] / 2 + 0.5, 0, 1).transpose(1, 2, 0)


def _denoise(
    runner: Runner,
    manifest: Manifest,
    sampler: Sampler,
    conditions: list[dict[str, NDArray[np.float32]]],
    scale: float,
    noise: NoiseSource,
) -> Array:
    image = manifest.image
    x_t = noise((1, image.latent_channels, image.latent_height, image.latent_width))
    x_t, memory = x_t * np.float32(sampler.init_noise_sigma), Memory()
    for index, timestep in enumerate(sampler.timesteps):
        asked = {
            "sample": sampler.scale_model_input(x_t, index),
            "timestep": _shaped_timestep(manifest, timestep),
        }
        outputs = [_ask_unet(runner, manifest, asked | conditioned) for conditioned in conditions]
        x_t, memory = sampler.step(index, x_t, _guided(outputs, scale), memory, noise)
    return x_t


def _ask_unet(runner: Runner, manifest: Manifest, values: dict[str, NDArray[Any]]) -> Array:
    return runner.run("unet", feed(manifest, "unet", values))["out_sample"].astype(np.float32)


def _guided(outputs: list[Array], scale: float) -> Array:
    """Classifier-free guidance of [conditional, unconditional] (Ho and Salimans 2022, arXiv 2207.12598)."""
    if len(outputs) == 1:
        return outputs[0]
    conditional, away_from = outputs
    return away_from + np.float32(scale) * (conditional - away_from)


def _shaped_timestep(manifest: Manifest, timestep: np.float32) -> Array:
    """A scalar or [1], as the UNet's `timestep` input has it."""
    for spec in component_spec(manifest, "unet").inputs:
        if spec.name == "timestep":
            return np.full([1] * len(spec.shape), timestep, dtype=np.float32)
    raise TurbopocketError("unet has no input `timestep`")
