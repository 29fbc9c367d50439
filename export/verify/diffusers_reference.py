# SPDX-License-Identifier: Apache-2.0
"""The float model drawn by diffusers' own pipeline: what our loop, which every phone repeats, has to equal."""

import inspect
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.autoencoders import vae as vae_module
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ...runtimes.compare.metrics import relative_error
from ...runtimes.drawing.sampler import NoiseSource
from ...runtimes.drawing.text_to_image import FirstPicture, draw, seeded_noise
from ...runtimes.manifest import Manifest
from ...runtimes.pipeline import Pipeline
from ...runtimes.runner import Runner
from ..families.base import LoadedModel
from ..sampling.spec import scheduler_config
from .gaps import TO_DIFFUSERS_ERROR, Difference, Session, ToDiffusers

Picture = NDArray[np.float32]
GUIDANCE_ERROR = 1e-3
"""Of what the denoiser is told of the guidance: sines of numbers in the thousands, which a frequency rounded the other
way moves. PyTorch does so with one of 128, which makes 4e-5 at a guidance of 8.5 and 3.5e-4 at 50; a guidance that is
0.01 off makes 0.8."""


def compare_with_diffusers(model: LoadedModel, runner: Runner, session: Session) -> ToDiffusers:
    """Draws a picture of each size with diffusers' pipeline, then with our loop, and compares as they go.

    Where the artifact can begin with a picture, both then draw on from that one. `runner` runs the float modules of
    `model`. Compared are all inputs of each call of denoiser and VAE's halves, what each gives on equal inputs, and the
    picture. Our loop goes on from the outputs that diffusers had: with some samplers a difference of 1e-6
    becomes another picture (33 dB between two right loops in thirty steps of DDIM with clipped samples, random weights
    and a guidance of 7.5).
    """
    sizes = range(len(session.manifest.sizes))
    return ToDiffusers(tuple(each for index in sizes for each in _differences(model, runner, session, index)))


def _differences(model: LoadedModel, runner: Runner, session: Session, index: int) -> list[Difference]:
    """What was compared for the session's picture of that number, and where one can begin with it, for the next."""
    drawn, differences = _drawn_by_both(model, runner, session, index, None)
    if session.manifest.pipeline.encoder is not None:
        strength = 0.5 if session.manifest.sampler.steps > 1 else 1.0
        first = FirstPicture(np.round(drawn * 255).astype(np.uint8), strength)
        differences += _drawn_by_both(model, runner, session, index, first)[1]
    return differences


def _drawn_by_both(
    model: LoadedModel, runner: Runner, session: Session, index: int, first: FirstPicture | None
) -> tuple[Picture, list[Difference]]:
    """diffusers' picture, and how ours and what led to it differ."""
    manifest, prompt, seed = session.manifest.of_picture(index), session.prompts[index], session.seed + index
    with _recorded(model, manifest.pipeline) as calls:
        expected = diffusers_picture(model, manifest, prompt, seed, first=first)
    size = f" at {manifest.image.size}" if len(manifest.sizes) > 1 else ""
    how = size + ("" if first is None else " from a first picture")
    following = _Following(runner, manifest.pipeline, calls, how)
    found = draw(following, manifest, session.tokenizers, prompt, seeded_noise(seed), first=first)
    for component in calls:
        made, due = following.made[component], len(calls[component])
        following.note(f"the number of calls of {component}, {made} of {due}", np.array(made), np.array(due))
    following.note("the finished picture", found, expected)
    return expected, following.differences


def diffusers_picture(
    model: LoadedModel,
    manifest: Manifest,
    prompt: str,
    seed: int,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    first: FirstPicture | None = None,
) -> Picture:
    """Returns the picture [H, W, 3] in 0..1 that diffusers' pipeline of the model's family draws from our noise.

    The pipeline is made of the very modules of `model`, of its tokenizer folders as diffusers loads them, and of the
    scheduler class that the manifest's sampler stands for, with the config of the model's folder; there is no safety
    checker. With a first picture it is the family's pipeline for image to image. Sizes are the manifest's, and so are
    steps and guidance by default. Raises TurbopocketError when the pipeline refuses, or draws random numbers that are
    not ours.
    """
    noise, image, sampler = seeded_noise(seed), manifest.image, manifest.sampler
    if first is None:
        latents = noise((1, image.latent_channels, image.latent_height, image.latent_width))
        begin = {"height": image.height, "width": image.width, "latents": torch.from_numpy(latents)}
    else:
        begin = {"image": Image.fromarray(first.pixels), "strength": first.strength}
    with _pipeline(model, sampler.kind, first is not None) as pipeline, _drawing_from(noise, pipeline):
        try:
            pictures = pipeline(
                prompt,
                num_inference_steps=sampler.steps if steps is None else steps,
                guidance_scale=sampler.guidance_scale if guidance is None else guidance,
                output_type="np",
                **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
                **begin,
                **model.family.diffusers_call,
            ).images
        except ValueError as error:  # what its checks of the request raise
            raise TurbopocketError(f"{type(pipeline).__name__} of diffusers refuses to draw: {error}") from error
    picture: Picture = pictures[0]
    return picture


@dataclass(frozen=True)
class _Call:
    """What diffusers gave a module for one picture, under the names of our inputs, and what came out."""

    inputs: Arrays
    output: NDArray[np.float32]


class _Following:
    """A runner whose denoiser and VAE are asked and answer as diffusers' did in the same call; differences are noted.

    `how` tells this walk from others.
    """

    def __init__(self, runner: Runner, pipeline: Pipeline, calls: Mapping[str, list[_Call]], how: str) -> None:
        self._runner, self._pipeline, self._calls, self._how = runner, pipeline, calls, how
        self.made = dict.fromkeys(calls, 0)
        self.differences: list[Difference] = []

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The component's own outputs, or those of the same call in diffusers' pipeline."""
        if component not in self._calls:
            return self._runner.run(component, inputs)
        self.made[component] += 1
        if self.made[component] > len(self._calls[component]):
            return self._runner.run(component, inputs)
        theirs, where = self._calls[component][self.made[component] - 1], f"call {self.made[component]} of {component}"
        # What only this step decides comes first, latents last: they carry the faults of the steps before.
        latents = self._pipeline.denoiser.latents
        for name in sorted(inputs.keys() | theirs.inputs.keys(), key=lambda name: (name == latents, name)):
            limit = GUIDANCE_ERROR if name in self._pipeline.guidance_inputs else TO_DIFFUSERS_ERROR
            self.note(f"input {name} of {where}", inputs.get(name), theirs.inputs.get(name), limit)
        asked = {name: _like(theirs.inputs.get(name), value) for name, value in inputs.items()}
        ((name, output),) = self._runner.run(component, asked).items()
        self.note(f"the output of {where}", output, theirs.output)
        return {name: theirs.output}

    def note(
        self,
        array: str,
        found: NDArray[Any] | None,
        expected: NDArray[Any] | None,
        limit: float = TO_DIFFUSERS_ERROR,
    ) -> None:
        """Keeps the difference of two arrays; it is infinite when one is absent or has another shape."""
        error = math.inf
        if found is not None and expected is not None and found.squeeze().shape == expected.squeeze().shape:
            error = relative_error(found.squeeze(), expected.squeeze())
        self.differences.append(Difference(f"{array}{self._how}", error, limit))


def _like(theirs: NDArray[Any] | None, ours: NDArray[Any]) -> NDArray[Any]:
    """Their numbers in the form of ours, where they fit."""
    if theirs is None or theirs.squeeze().shape != ours.squeeze().shape:
        return ours
    return theirs.reshape(ours.shape).astype(ours.dtype)


@contextmanager
def _recorded(model: LoadedModel, pipeline: Pipeline) -> Iterator[dict[str, list[_Call]]]:
    """Lists that fill with the calls of denoiser and VAE, one a picture of the batch, while the context is open.

    With guidance diffusers asks for two pictures at once, the unconditional one first; our loop asks for that last.
    """
    calls: dict[str, list[_Call]] = {component: [] for component in pipeline.drawn_with}
    vae: Any = model.modules["vae"]
    decode, encode = vae.decode, vae.encode
    denoiser, decoder, encoder = pipeline.denoiser, pipeline.decoder, pipeline.encoder

    def denoiser_ran(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any], outputs: Any) -> None:
        arrays = _given(module, given, options, denoiser.latents)
        for index in reversed(range(len(outputs[0]))):
            own = {name: value if value.ndim == 0 else np.asarray(value[index]) for name, value in arrays.items()}
            calls[denoiser.component].append(_Call(own, outputs[0][index].numpy()[None]))

    def vae_decode(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        outputs = decode(latents, *arguments, **options)
        calls[decoder.component].append(_Call({decoder.latents: latents.numpy()}, outputs[0].numpy()))
        return outputs

    def vae_encode(sample: Tensor, *arguments: Any, **options: Any) -> Any:
        outputs = encode(sample, *arguments, **options)
        said = outputs.latent_dist.parameters if hasattr(outputs, "latent_dist") else outputs.latents
        if encoder is not None:
            calls[encoder.component].append(_Call({encoder.picture: sample.numpy()}, said.numpy()))
        return outputs

    hook = model.denoiser.register_forward_hook(denoiser_ran, with_kwargs=True)
    vae.decode, vae.encode = vae_decode, vae_encode
    try:
        yield calls
    finally:
        hook.remove()
        del vae.decode, vae.encode


def _given(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], latents: str) -> Arrays:
    """Every tensor of a call by its parameter's name, or its name in a dictionary; the first parameter is `latents`."""
    signature = inspect.signature(module.forward)
    first, *_ = signature.parameters
    named: dict[str, Any] = {}
    for name, value in signature.bind(*arguments, **options).arguments.items():
        named |= value if isinstance(value, dict) else {latents if name == first else name: value}
    return {name: value.numpy() for name, value in named.items() if isinstance(value, Tensor)}


@contextmanager
def _pipeline(model: LoadedModel, kind: str, image_to_image: bool) -> Iterator[Any]:
    """diffusers' pipeline around the model's modules, whose configs are afterwards as they were.

    StableDiffusionPipeline corrects configs that it takes for outdated, in place and with a warning.
    """
    config = scheduler_config(model, kind)
    parts: dict[str, Any] = {
        **model.modules,
        "scheduler": getattr(diffusers, config["_class_name"]).from_config(config),
        **{name.replace("text_encoder", "tokenizer"): _tokenizer(model, name) for name in model.tokenizers},
        **model.pipeline_config,
        **model.family.diffusers_parts,
    }
    own_config = model.denoiser._internal_dict
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ending = "Img2ImgPipeline" if image_to_image else "Pipeline"
            pipeline = getattr(diffusers, model.family.pipeline_class.removesuffix("Pipeline") + ending)(**parts)
            pipeline.set_progress_bar_config(disable=True)
            yield pipeline
    finally:
        model.denoiser._internal_dict = own_config


def _tokenizer(model: LoadedModel, encoder: str) -> Any:
    """diffusers takes the number of a prompt's ids from here, and fails where the folder names none (1e30)."""
    tokenizer_class = getattr(transformers, model.family.tokenizer.class_name)
    tokenizer = tokenizer_class.from_pretrained(model.tokenizers[encoder], local_files_only=True)
    tokenizer.model_max_length = model.text_tokens
    return tokenizer


@contextmanager
def _drawing_from(noise: NoiseSource, pipeline: Any) -> Iterator[None]:
    """Hands the pipeline our noise: its module, its scheduler's and that of VAEs ask `randn_tensor` for every number.

    Raises TurbopocketError when PyTorch's own generator was asked as well: then the pictures can not be compared.
    """
    modules: list[Any] = [sys.modules[type(part).__module__] for part in (pipeline, pipeline.scheduler)]
    own = {module: module.randn_tensor for module in (*modules, vae_module) if hasattr(module, "randn_tensor")}
    state = torch.get_rng_state()

    def ours(shape: tuple[int, ...], *_: object, **__: object) -> Tensor:
        return torch.from_numpy(noise(tuple(shape)))

    try:
        for module in own:
            module.randn_tensor = ours
        yield
        if not torch.equal(torch.get_rng_state(), state):
            raise TurbopocketError(
                f"{type(pipeline.scheduler).__name__} draws random numbers that can not be replaced by our noise, "
                "so its picture can not be compared"
            )
    finally:
        torch.set_rng_state(state)
        for module, function in own.items():
            module.randn_tensor = function
