# SPDX-License-Identifier: Apache-2.0
"""From words to what the UNet is told at every step (for SDXL: Podell et al. 2023, arXiv 2307.01952)."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..manifest import Manifest
from ..runner import Runner, component_spec
from .tokenizer import Tokenizer

_HIDDEN_STATES = "hidden_states."
_PENULTIMATE = "hidden_embeds"
"""Its name where a graph gives no other hidden state but the last."""


TIMESTEP_COND = "timestep_cond"
"""The UNet's input for the guidance, where it is told that; optimum-onnx's name for it."""


class PromptCut(UserWarning):
    """The prompt is longer than the text encoder reads; the message says which words were left out."""


def feed(manifest: Manifest, component: str, values: Mapping[str, NDArray[Any]]) -> Arrays:
    """`values` in the number types of the component's inputs; TurbopocketError if fractions would be lost."""
    dtypes = {spec.name: np.dtype(spec.dtype) for spec in component_spec(manifest, component).inputs}
    inputs = {name: value.astype(dtypes.get(name, value.dtype)) for name, value in values.items()}
    for name, value in inputs.items():
        if value.dtype.kind == "i" and (value != values[name]).any():
            raise TurbopocketError(f"{component}: input {name} is {value.dtype}, {values[name]} is no whole number")
    return inputs


def condition(
    runner: Runner, manifest: Manifest, tokenizers: Mapping[str, Tokenizer], prompt: str
) -> dict[str, NDArray[np.float32]]:
    """The UNet inputs that hold for all steps: `encoder_hidden_states` [1, T, D], and what SDXL adds.

    That is `text_embeds` [1, P] and `time_ids` [1, 6]. Warns `PromptCut` when words are left out.
    """
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in manifest.components]
    encoded = {name: _encode(runner, manifest, tokenizers, name, prompt) for name in encoders}
    if manifest.family == "sd":
        return {"encoder_hidden_states": _output("text_encoder", encoded["text_encoder"], "last_hidden_state")}
    states = [_penultimate(name, outputs) for name, outputs in encoded.items()]
    return {
        "encoder_hidden_states": np.concatenate(states, axis=-1),
        "text_embeds": _output("text_encoder_2", encoded["text_encoder_2"], "text_embeds"),
        "time_ids": _time_ids(manifest),
    }


def guidance_condition(manifest: Manifest, scale: float) -> dict[str, NDArray[np.float32]]:
    """`timestep_cond` [1, E] for a UNet that is told the guidance scale, instead of being asked twice; else nothing.

    Told are LCMs (Luo et al. 2023, arXiv 2310.04378, section 4.2).
    """
    widths = {spec.name: spec.shape[-1] for spec in component_spec(manifest, "unet").inputs if spec.shape}
    if TIMESTEP_COND not in widths:
        return {}
    return {TIMESTEP_COND: guidance_embedding(scale, int(widths[TIMESTEP_COND]))}


def guidance_embedding(scale: float, width: int) -> NDArray[np.float32]:
    """`timestep_cond` [1, width] of a guidance scale: sines, then cosines of 1000 (scale - 1) f_k.

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


def unconditional(
    runner: Runner,
    manifest: Manifest,
    tokenizers: Mapping[str, Tokenizer],
    negative_prompt: str | None,
    conditional: Mapping[str, NDArray[np.float32]],
) -> dict[str, NDArray[np.float32]]:
    """What guidance steers away from: the negative prompt, else zeros or the empty prompt, as the model has it."""
    if negative_prompt is None and manifest.force_zeros_for_empty_prompt:
        return {n: value if n == "time_ids" else np.zeros_like(value) for n, value in conditional.items()}
    return condition(runner, manifest, tokenizers, negative_prompt or "")


def _encode(
    runner: Runner, manifest: Manifest, tokenizers: Mapping[str, Tokenizer], component: str, prompt: str
) -> Arrays:
    tokens = tokenizers[component].encode(prompt)
    if tokens.cut is not None:
        warnings.warn(PromptCut(f"{component} reads {len(tokens.ids)} tokens, left out: {tokens.cut!r}"), stacklevel=2)
    return runner.run(component, feed(manifest, component, {"input_ids": tokens.ids[None]}))


def _output(component: str, outputs: Arrays, name: str) -> NDArray[np.float32]:
    if name not in outputs:
        raise TurbopocketError(f"{component} has no output {name}: it has {', '.join(outputs)}")
    return outputs[name].astype(np.float32)


def _penultimate(component: str, outputs: Arrays) -> NDArray[np.float32]:
    """The state before the last layer, which SDXL was trained on; states count from the embedding up."""
    if _PENULTIMATE in outputs:
        return _output(component, outputs, _PENULTIMATE)
    count = sum(name.startswith(_HIDDEN_STATES) for name in outputs)
    return _output(component, outputs, f"{_HIDDEN_STATES}{count - 2}")


def _time_ids(manifest: Manifest) -> NDArray[np.float32]:
    """Original size, crop and target size, [1, 6]: an uncropped picture of the artifact's own size."""
    height, width = manifest.image.height, manifest.image.width
    return np.array([[height, width, 0, 0, height, width]], dtype=np.float32)
