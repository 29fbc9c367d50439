# SPDX-License-Identifier: Apache-2.0
"""Text to image in numpy over any runner, as the manifest's pipeline says it: the loop a phone has to repeat.

Shape suffixes: N pictures, H rows and W columns of pixels, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ...ground.names import at_place
from ..manifest import Manifest
from ..pipeline import Encoder
from ..runner import Runner, component_spec
from .conditioning import condition, feed, guidance_condition, unconditional
from .latents import encoded, from_vae, to_vae
from .sampler import Memory, NoiseSource, Sampler, make_sampler
from .tokenizer import Tokenizer

Array = NDArray[np.float32]
Pictures = NDArray[np.uint8]


class NotFinite(TurbopocketError):
    """A runtime's picture holds NaN: the artifact overflows, or was damaged."""


@dataclass(frozen=True)
class FirstPicture:
    """What a walk begins with in the place of noise: pixels uint8 [H, W, 3] of the artifact's size, and the share of
    the walk's steps that change them, in (0, 1]."""

    pixels: NDArray[np.uint8]
    strength: float


def generate(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompt: str,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    first: FirstPicture | None = None,
) -> Pictures:
    """The picture [H, W, 3], the same for every runtime that computes right: noise comes from numpy's PCG64.

    `steps` and `guidance` default to the manifest's. Raises TurbopocketError for an empty prompt, for steps that a
    student's artifact was not built for, and for a first picture that does not fit; `NotFinite` when the runtime
    computes nonsense. Warns `PromptCut` for a prompt that is too long.
    """
    asked = steps, guidance, negative_prompt, first
    return generate_batch(runner, manifest, tokenizers, [prompt], [seed], *asked)[0]


def generate_batch(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    first: FirstPicture | None = None,
) -> Pictures:
    """The pictures [N, H, W, 3] that `generate` gives for each prompt and its seed, drawn at once."""
    noises = [seeded_noise(seed) for seed in seeds]
    pictures = draw_batch(runner, manifest, tokenizers, prompts, noises, steps, guidance, negative_prompt, first)
    if odd := int(pictures.size - np.isfinite(pictures).sum()):
        what = "the picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
        raise NotFinite(f"{manifest.name}: {odd} of {pictures.size} values of {what} are not finite")
    return np.round(pictures * 255).astype(np.uint8)


def draw(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompt: str,
    noise: NoiseSource,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    first: FirstPicture | None = None,
) -> Array:
    """The picture [H, W, 3] in 0..1; `noise` gives the initial latents, then what single steps need.

    With a first picture it gives what the encoder's distribution needs, then what makes its latents noisy.
    """
    asked = steps, guidance, negative_prompt, first
    return draw_batch(runner, manifest, tokenizers, [prompt], [noise], *asked)[0]


def draw_batch(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompts: Sequence[str],
    noises: Sequence[NoiseSource],
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    first: FirstPicture | None = None,
) -> Array:
    """The pictures [N, H, W, 3] in 0..1 of N prompts, all of the manifest's size: each component is asked once a step
    for all of them. A picture depends on its own prompt and noise alone; see `draw`.
    """
    asked = prompts, noises, steps, guidance, negative_prompt, first
    return decode(runner, manifest, walk(runner, manifest, tokenizers, *asked))


def walk(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompts: Sequence[str],
    noises: Sequence[NoiseSource],
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    first: FirstPicture | None = None,
    end: int | None = None,
) -> Array:
    """The latents [N, C, h, w] of `draw_batch`'s pictures: clean, or as they are after the first `end` calls."""
    for text in (*prompts, negative_prompt or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise TurbopocketError(f"the prompt {text[:40]!r} is not UTF-8 text")
    if not all(prompt.strip() for prompt in prompts):
        raise TurbopocketError("the prompt is empty: say what the picture should show")
    built_for, count = manifest.sampler.steps, len(prompts)
    if manifest.only_these_steps and steps not in (None, built_for):
        raise TurbopocketError(
            f"{manifest.name}: this artifact was built for {built_for} steps and draws in no other; {steps} were asked",
            hint=f"build another with --steps {steps}",
        )
    scale = manifest.sampler.guidance_scale if guidance is None else guidance
    if not math.isfinite(scale):
        raise TurbopocketError(f"guidance is {scale:g}; a finite number is needed")
    sampler = make_sampler(manifest.sampler, steps)
    start = 0 if first is None else _start(manifest, sampler, first)
    told = guidance_condition(manifest, scale, count)
    if told and negative_prompt is not None:
        raise TurbopocketError(
            f"a negative prompt has no effect on {manifest.name}: its denoiser is told the guidance, and asked once"
        )
    with at_place(guided=True):
        conditions = [condition(runner, manifest, tokenizers, prompts) | told]
    if scale > 1 and not told:
        with at_place(guided=False):
            away_from = unconditional(runner, manifest, tokenizers, negative_prompt, conditions[0], count)
        conditions.append(away_from)
    elif negative_prompt is not None:
        raise TurbopocketError(f"a negative prompt has no effect at guidance {scale:g}: it needs more than 1")
    noise = _joined(noises)
    if first is None:
        image = manifest.image
        x_t = noise((count, image.latent_channels, image.latent_height, image.latent_width))
        x_t = x_t * np.float32(sampler.init_noise_sigma)
    else:
        x_0 = encode(runner, manifest, np.stack([first.pixels] * count), noise)
        x_t = sampler.add_noise(x_0, noise(x_0.shape), start)
    calls = range(start, len(sampler.timesteps) if end is None else end)
    return _denoise(runner, manifest, sampler, conditions, scale, x_t, calls, noise)


def exercise(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
) -> Pictures:
    """`generate_batch`, with a call of every component: the encoder, which text needs not, reads finished pictures."""
    pictures = generate_batch(runner, manifest, tokenizers, prompts, seeds, steps)
    if manifest.pipeline.encoder is not None:
        _ask_encoder(runner, manifest, pictures)
    return pictures


def seeded_noise(seed: int) -> NoiseSource:
    """Standard normal float32 numbers from `numpy.random.default_rng(seed)`, in the order of asking."""
    rng = np.random.default_rng(seed)
    return lambda shape: rng.standard_normal(shape, dtype=np.float32)


def _joined(noises: Sequence[NoiseSource]) -> NoiseSource:
    """Noise [N, …] of N pictures, each from its own source."""
    if len(noises) == 1:
        return noises[0]
    return lambda shape: np.concatenate([noise((1, *shape[1:])) for noise in noises])


def require_encoder(manifest: Manifest) -> None:
    """Raises TurbopocketError when the artifact can not begin with a picture."""
    _encoder(manifest)


def _encoder(manifest: Manifest) -> Encoder:
    if manifest.pipeline.encoder is None:
        raise TurbopocketError(
            f"{manifest.name} can not begin with a picture: this artifact was built without the VAE's encoder",
            hint="build another with image_to_image = true under [sampler] of its recipe",
        )
    return manifest.pipeline.encoder


def encode(runner: Runner, manifest: Manifest, pictures: Pictures, noise: NoiseSource) -> Array:
    """Clean latents [N, C, h, w] of pictures uint8 [N, H, W, 3], drawn from what the encoder takes for possible."""
    outputs = _ask_encoder(runner, manifest, pictures)
    return from_vae(manifest.image, encoded(_encoder(manifest), outputs, noise))


def _ask_encoder(runner: Runner, manifest: Manifest, pictures: Pictures) -> Arrays:
    sample_NHWC = pictures.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
    encoder = _encoder(manifest)
    picture = {encoder.picture: sample_NHWC.transpose(0, 3, 1, 2)}
    return runner.run(encoder.component, feed(manifest, encoder.component, picture))


def _start(manifest: Manifest, sampler: Sampler, first: FirstPicture) -> int:
    """The call at which a walk from this picture begins."""
    require_encoder(manifest)
    wanted = (*manifest.image.size, 3)
    if first.pixels.shape != wanted or first.pixels.dtype != np.uint8:
        raise TurbopocketError(
            f"the first picture is {first.pixels.dtype} {list(first.pixels.shape)}, uint8 {list(wanted)} is needed"
        )
    return sampler.start_index(first.strength)


def decode(runner: Runner, manifest: Manifest, latents: Array) -> Array:
    """The pictures [N, H, W, 3] in 0..1 that clean latents [N, C, h, w] stand for."""
    decoder = manifest.pipeline.decoder
    z = {decoder.latents: to_vae(manifest.image, latents)}
    outputs = runner.run(decoder.component, feed(manifest, decoder.component, z))
    sample = outputs[decoder.output].astype(np.float32)
    _require_shape(decoder.component, decoder.output, sample, (len(latents), 3, *manifest.image.size))
    pictures_NCHW: NDArray[Any] = np.clip(sample / 2 + 0.5, 0, 1)
    return pictures_NCHW.transpose(0, 2, 3, 1)


def _denoise(
    runner: Runner,
    manifest: Manifest,
    sampler: Sampler,
    conditions: list[dict[str, NDArray[np.float32]]],
    scale: float,
    x_t: Array,
    calls: range,
    noise: NoiseSource,
) -> Array:
    """Latents after these calls of a walk, from those that are as noisy as the model expects them at the first."""
    memory, denoiser = Memory(), manifest.pipeline.denoiser
    for index in calls:
        asked = {
            denoiser.latents: sampler.scale_model_input(x_t, index),
            denoiser.timestep: _shaped_timestep(manifest, sampler.timesteps[index], len(x_t)),
        }
        outputs = []
        for guided, conditioned in zip((True, False), conditions, strict=False):
            with at_place(timestep=float(sampler.timesteps[index]), step=index, guided=guided):
                outputs.append(_prediction(runner, manifest, asked | conditioned))
        x_t, memory = sampler.step(index, x_t, _guided(outputs, scale), memory, noise)
    return x_t


def _prediction(runner: Runner, manifest: Manifest, values: dict[str, NDArray[Any]]) -> Array:
    denoiser = manifest.pipeline.denoiser
    outputs = runner.run(denoiser.component, feed(manifest, denoiser.component, values))
    output = outputs[denoiser.output].astype(np.float32)
    batch, channels, *sides = values[denoiser.latents].shape
    given = channels if denoiser.channels == "all" else 2 * channels
    _require_shape(denoiser.component, denoiser.output, output, (batch, given, *sides))
    return output[:, :channels]


def _require_shape(component: str, name: str, found: Array, wanted: tuple[int, ...]) -> None:
    """What broadcasts or is cut to fit would be a picture all the same, of something else."""
    if found.shape != wanted:
        raise TurbopocketError(f"{component} gives {name} of {list(found.shape)}, {list(wanted)} is needed")


def _guided(outputs: list[Array], scale: float) -> Array:
    """Classifier-free guidance of [conditional, unconditional] (Ho and Salimans 2022, arXiv 2207.12598)."""
    if len(outputs) == 1:
        return outputs[0]
    conditional, away_from = outputs
    return away_from + np.float32(scale) * (conditional - away_from)


def _shaped_timestep(manifest: Manifest, timestep: np.float32, count: int) -> Array:
    """A scalar or [N], as the denoiser has it."""
    denoiser = manifest.pipeline.denoiser
    for spec in component_spec(manifest, denoiser.component).loop_inputs:
        if spec.name == denoiser.timestep:
            return np.full([count] * len(spec.shape), timestep, dtype=np.float32)
    raise TurbopocketError(f"{denoiser.component} has no input {denoiser.timestep}")
