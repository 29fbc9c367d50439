# SPDX-License-Identifier: Apache-2.0
"""The drawing loop's tensors as a Core ML package has them, and back: other names, fp16 halves, a fixed batch.

Names and shapes of the packages are those that Apple's Swift package StableDiffusion asks for (its `TextEncoder`,
`TextEncoderXL`, `Unet`, `Encoder` and `Decoder`); names of the loop are those of every other target.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..drawing.latents import LATENT_PARAMETERS, LATENT_SAMPLE
from ..manifest import ComponentSpec, TensorSpec

PACKAGE_NAMES = {
    "text_encoder": "TextEncoder",
    "text_encoder_2": "TextEncoder2",
    "vae_encoder": "VAEEncoder",
    "unet": "Unet",
    "vae_decoder": "VAEDecoder",
}
"""What the Swift package calls the compiled file of each component."""

BATCH = "batch"
"""The loop's first dimension: as many items as it likes, the package's calls are repeated."""

CHUNKS = 2
"""Into how many packages a UNet is cut that is too large for one: the Swift package looks for two."""

INPUT_NAMES = {"vae_encoder": {"sample": "x"}, "vae_decoder": {"latent_sample": "z"}}
"""By component, the package's names by the loop's."""

OUTPUT_NAMES = {
    "text_encoder": {"pooled_outputs": "pooler_output"},
    "text_encoder_2": {"pooled_outputs": "text_embeds"},
    "vae_encoder": {"latent": LATENT_PARAMETERS, "latent_sample": LATENT_SAMPLE},
    "unet": {"noise_pred": "out_sample"},
    "vae_decoder": {"image": "sample"},
}
"""By component, the loop's names by the package's."""

_EXACT_INPUTS = ("input_ids", "sample", "timestep", "time_ids")
"""Inputs that stay float32: fp16 ends being exact at 2048, a UNet's sines need their argument exactly, and the less
noise is left in latents, the more their rounding counts beside it. `sample` may also be a picture, which could be
rounded, and which Apple's own packages of SDXL take as float32."""


def package_file(component: str, chunk: int | None = None) -> str:
    """File name of the component's package, or of one chunk of it, counted from 1."""
    if component not in PACKAGE_NAMES:
        known = ", ".join(PACKAGE_NAMES)
        raise TurbopocketError(f"Core ML packages have no component {component}: they have {known}")
    return f"{PACKAGE_NAMES[component]}{'.mlpackage' if chunk is None else _chunk_ending(chunk)}"


def package_names(file: str) -> list[str]:
    """File names of the package, or of all chunks in order, whose first file a manifest names."""
    first, ending = file.split("/")[0], _chunk_ending(1)
    if not first.endswith(ending):
        return [first]
    return [first.removesuffix(ending) + _chunk_ending(chunk) for chunk in range(1, CHUNKS + 1)]


def _chunk_ending(chunk: int) -> str:
    return f"Chunk{chunk}.mlpackage"


def loop_output(component: str, name: str) -> str:
    """The loop's name of a package's output."""
    return OUTPUT_NAMES[component].get(name, name)


def layer_value(path: str, use: int = 1) -> str:
    """Name of the program's value that a layer of that module path computes when it runs for the `use`-th time."""
    name = path.replace(".", "_")
    return name if use == 1 else f"{name}_use_{use}"


def loop_spec(component: str, package: ComponentSpec) -> ComponentSpec:
    """What a manifest says of a component, from the tensors of its package: the loop's names, types and shapes."""
    inputs = [_loop_input(component, spec) for spec in package.inputs]
    outputs = [
        TensorSpec(name=loop_output(component, spec.name), dtype="float32", shape=[BATCH, *spec.shape[1:]])
        for spec in package.outputs
    ]
    return ComponentSpec(file=package.file, inputs=inputs, outputs=outputs)


def _loop_input(component: str, spec: TensorSpec) -> TensorSpec:
    _, *rest = spec.shape
    if spec.name == "timestep":
        return TensorSpec(name="timestep", dtype="float32", shape=[])
    if spec.name == "input_ids":
        return TensorSpec(name="input_ids", dtype="int64", shape=[BATCH, *rest])
    if spec.name == "encoder_hidden_states":
        width, _, tokens = rest
        return TensorSpec(name=spec.name, dtype="float32", shape=[BATCH, tokens, width])
    name = {package: loop for loop, package in _input_names(component).items()}.get(spec.name, spec.name)
    return TensorSpec(name=name, dtype="float32", shape=[BATCH, *rest])


def package_inputs(component: str, values: Mapping[str, NDArray[Any]], batch: int) -> list[Arrays]:
    """The package's inputs for each call of it, which takes `batch` items; the last item fills up the last call.

    Floats become fp16 but for `sample`, `timestep` and `time_ids`; `input_ids` become float32; `timestep` [] or [1]
    becomes [batch]; `encoder_hidden_states` [B, T, D] become [batch, D, 1, T]. Raises TurbopocketError when the
    inputs have no items, or differ in their number.
    """
    single = {name: value for name, value in values.items() if name == "timestep"}
    items = {name: value for name, value in values.items() if name != "timestep"}
    count = _item_count(component, items)
    calls = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        call = {name: value[rows] for name, value in items.items()}
        call |= {name: np.broadcast_to(np.ravel(value)[:1], (batch,)) for name, value in single.items()}
        names = _input_names(component)
        calls.append({names.get(name, name): _as_package_has_it(name, value) for name, value in call.items()})
    return calls


def _input_names(component: str) -> Mapping[str, str]:
    return INPUT_NAMES.get(component, {})


def loop_outputs(component: str, calls: Sequence[Mapping[str, NDArray[Any]]], count: int) -> Arrays:
    """The loop's outputs, float32, of `count` items, from what the package gave in each of `package_inputs`' calls."""
    return {
        loop_output(component, name): np.concatenate([call[name] for call in calls])[:count].astype(np.float32)
        for name in calls[0]
    }


def _item_count(component: str, items: Mapping[str, NDArray[Any]]) -> int:
    counts = {name: len(value) if value.ndim else 0 for name, value in items.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        found = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise TurbopocketError(f"{component}: all inputs must have one number of items, at least 1; found: {found}")
    return next(iter(counts.values()))


def _as_package_has_it(name: str, value: NDArray[Any]) -> NDArray[Any]:
    if name == "encoder_hidden_states":
        value = value.transpose(0, 2, 1)[:, :, None, :]
    return np.ascontiguousarray(value, dtype=np.float32 if name in _EXACT_INPUTS else np.float16)
