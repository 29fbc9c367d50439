# SPDX-License-Identifier: Apache-2.0
"""From words to what the denoiser is told at every step, as the manifest's pipeline says it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..image_size import ImageSize
from ..manifest import Manifest
from ..pipeline import Feed, GuidanceFeed, MaskFeed, NumbersFeed, TextFeed
from ..runner import Runner, component_spec
from .tokenizer import Tokenizer, Tokens


class PromptCut(UserWarning):
    """The prompt is longer than the text encoder reads; the message says which words were left out."""


def feed(manifest: Manifest, component: str, values: Mapping[str, NDArray[Any]]) -> Arrays:
    """`values` in the number types of the component's inputs; TurbopocketError if fractions would be lost."""
    dtypes = {spec.name: np.dtype(spec.dtype) for spec in component_spec(manifest, component).loop_inputs}
    inputs = {name: value.astype(dtypes.get(name, value.dtype)) for name, value in values.items()}
    for name, value in inputs.items():
        if value.dtype.kind == "i" and (value != values[name]).any():
            raise TurbopocketError(f"{component}: input {name} is {value.dtype}, {values[name]} is no whole number")
    return inputs


def condition(
    runner: Runner, manifest: Manifest, tokenizers: Mapping[str, Tokenizer], prompts: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """The denoiser's inputs that hold for all steps but the guidance, by name: each [N, …] for N prompts.

    Warns `PromptCut` when words are left out.
    """
    encoders = manifest.pipeline.text_encoders
    read = {name: [_tokens(tokenizers, name, prompt) for prompt in prompts] for name in encoders}
    outputs = {name: _encoded(runner, manifest, name, tokens) for name, tokens in read.items()}
    feeds = manifest.pipeline.denoiser.inputs
    return {
        name: _fed(manifest, feed, read, outputs, len(prompts))
        for name, feed in feeds.items()
        if not isinstance(feed, GuidanceFeed)
    }


def guidance_condition(manifest: Manifest, scale: float, count: int = 1) -> dict[str, NDArray[np.float32]]:
    """What a denoiser is told that takes the guidance scale, instead of being asked twice, each [count, E]; else
    nothing.

    Told are LCMs (Luo et al. 2023, arXiv 2310.04378, section 4.2).
    """
    widths = manifest.pipeline.guidance_inputs
    return {name: guidance_embedding(scale, width).repeat(count, axis=0) for name, width in widths.items()}


def guidance_embedding(scale: float, width: int) -> NDArray[np.float32]:
    """The embedding [1, width] of a guidance scale: sines, then cosines of 1000 (scale - 1) f_k.

    f_k falls from 1 to 1/10000 in width / 2 geometric steps (Kingma et al. 2021, arXiv 2107.00630, the released code's
    embedding of time); an odd width ends in a zero. Rounded to float32 where the code that LCMs were trained with does,
    since the argument of the sines is in the thousands.
    """
    half = width // 2
    exponent = np.float32(np.log(10000)) / np.float32(half - 1) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(-exponent.astype(np.float64)).astype(np.float32)
    angles = (np.float32(scale - 1) * np.float32(1000) * frequencies).astype(np.float64)
    embedding = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])
    return embedding[None].astype(np.float32)


def picture_numbers(feed: NumbersFeed, size: ImageSize) -> NDArray[np.float32]:
    """The numbers [1, n] for a picture of that size."""
    words = {"height": size.height, "width": size.width, "aspect_ratio": size.height / size.width}
    return np.array([[words[each] if isinstance(each, str) else each for each in feed.values]], dtype=np.float32)


def unconditional(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    negative_prompt: str | None,
    conditional: Mapping[str, NDArray[np.float32]],
    count: int,
) -> dict[str, NDArray[np.float32]]:
    """What guidance steers away from, for `count` pictures: the negative prompt, else zeros or the empty prompt, as the
    model has it."""
    if negative_prompt is None and manifest.pipeline.without_prompt == "zeros":
        feeds = manifest.pipeline.denoiser.inputs
        return {n: np.zeros_like(v) if isinstance(feeds[n], TextFeed) else v for n, v in conditional.items()}
    return condition(runner, manifest, tokenizers, [negative_prompt or ""] * count)


def _tokens(tokenizers: Mapping[str, Tokenizer], component: str, prompt: str) -> Tokens:
    tokens = tokenizers[component].encode(prompt)
    if tokens.cut is not None:
        warnings.warn(PromptCut(f"{component} reads {len(tokens.ids)} tokens, left out: {tokens.cut!r}"), stacklevel=3)
    return tokens


def _encoded(runner: Runner, manifest: Manifest, component: str, tokens: Sequence[Tokens]) -> Arrays:
    encoder = manifest.pipeline.text_encoders[component]
    values = {encoder.ids: np.stack([each.ids for each in tokens])}
    if encoder.attention_mask is not None:
        values[encoder.attention_mask] = np.stack([each.mask for each in tokens])
    return runner.run(component, feed(manifest, component, values))


def _fed(
    manifest: Manifest, feed: Feed, read: Mapping[str, Sequence[Tokens]], outputs: Mapping[str, Arrays], count: int
) -> NDArray[np.float32]:
    match feed:
        case TextFeed():
            states = [_output(each.component, outputs[each.component], each.output) for each in feed.join]
            return states[0] if len(states) == 1 else np.concatenate(states, axis=-1)
        case MaskFeed():
            return np.stack([each.mask for each in read[feed.component]]).astype(np.float32)
        case NumbersFeed():
            return picture_numbers(feed, manifest.image.size).repeat(count, axis=0)
        case GuidanceFeed():
            raise TypeError("the guidance is no part of a prompt")


def _output(component: str, outputs: Arrays, name: str) -> NDArray[np.float32]:
    if name not in outputs:
        raise TurbopocketError(f"{component} has no output {name}: it has {', '.join(outputs)}")
    return outputs[name].astype(np.float32)
