# SPDX-License-Identifier: Apache-2.0
"""The drawing loop's tensors as a Core ML package has them, and back: other names, fp16 halves, a fixed batch.

Names and shapes of the packages are those that Apple's Swift package StableDiffusion asks for (its `TextEncoder`,
`TextEncoderXL`, `Unet`, `Encoder` and `Decoder`); names of the loop are those of every other target. A component's
manifest entry says which is which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ..manifest import ComponentSpec, LoopSpec, LoopTensor, TensorSpec

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

LOOP_NAMES = {
    "text_encoder": {"pooled_outputs": "pooler_output"},
    "text_encoder_2": {"pooled_outputs": "text_embeds"},
    "vae_encoder": {"x": "sample", "latent": "latent_parameters"},
    "unet": {"noise_pred": "out_sample"},
    "vae_decoder": {"z": "latent_sample", "image": "sample"},
}
"""By component, the loop's names by the package's."""


def package_file(component: str, chunk: int | None = None) -> str:
    """File name of the component's package, or of one chunk of it, counted from 1."""
    if component not in PACKAGE_NAMES:
        known = ", ".join(PACKAGE_NAMES)
        raise TurbopocketError(f"Core ML packages have no component {component}: they have {known}")
    return f"{PACKAGE_NAMES[component]}{'' if chunk is None else f'Chunk{chunk}'}.mlpackage"


def layer_value(path: str, use: int = 1) -> str:
    """Name of the program's value that a layer of that module path computes when it runs for the `use`-th time."""
    name = path.replace(".", "_")
    return name if use == 1 else f"{name}_use_{use}"


def loop_spec(component: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> LoopSpec:
    """How the loop has the tensors of a component's package."""
    return LoopSpec(
        inputs=[_loop_tensor(component, spec) for spec in inputs],
        outputs=[_loop_tensor(component, spec) for spec in outputs],
    )


def _loop_tensor(component: str, spec: TensorSpec) -> LoopTensor:
    _, *rest = spec.shape
    name = LOOP_NAMES[component].get(spec.name, spec.name)
    if spec.name == "timestep":
        return LoopTensor(name=name, dtype="float32", shape=[], tensor=spec.name, layout="repeated")
    if spec.name == "input_ids":
        return LoopTensor(name=name, dtype="int64", shape=[BATCH, *rest], tensor=spec.name)
    if spec.name == "encoder_hidden_states":
        width, _, tokens = rest
        shape = [BATCH, tokens, width]
        return LoopTensor(name=name, dtype="float32", shape=shape, tensor=spec.name, layout="B D 1 T")
    return LoopTensor(name=name, dtype="float32", shape=[BATCH, *rest], tensor=spec.name)


def items_per_call(spec: ComponentSpec) -> int:
    """The first dimension of all inputs of a package."""
    batch = spec.inputs[0].shape[0]
    assert isinstance(batch, int)
    return batch


def package_inputs(spec: ComponentSpec, values: Mapping[str, NDArray[Any]]) -> list[Arrays]:
    """The package's inputs for each call of it; the last item fills up the last call.

    Names, number types and layouts become those that the component's `loop` says. Raises TurbopocketError when the
    inputs have no items, or differ in their number.
    """
    assert spec.loop is not None
    batch, dtypes = items_per_call(spec), {each.name: np.dtype(each.dtype) for each in spec.inputs}
    count = item_count(spec, values)
    calls = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        call = {each.tensor: _as_package_has_it(each, values[each.name], rows) for each in spec.loop.inputs}
        calls.append({name: np.ascontiguousarray(value, dtype=dtypes[name]) for name, value in call.items()})
    return calls


def _as_package_has_it(tensor: LoopTensor, value: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    if tensor.layout == "repeated":
        return np.broadcast_to(np.ravel(value)[:1], rows.shape)
    items = value[rows]
    return items.transpose(0, 2, 1)[:, :, None, :] if tensor.layout == "B D 1 T" else items


def loop_outputs(spec: ComponentSpec, calls: Sequence[Mapping[str, NDArray[Any]]], count: int) -> Arrays:
    """The loop's outputs of `count` items, from what the package gave in each of `package_inputs`' calls.

    Raises TurbopocketError for an output that the package did not give.
    """
    assert spec.loop is not None
    if missing := [each.tensor for each in spec.loop.outputs if each.tensor not in calls[0]]:
        raise TurbopocketError(f"{spec.file} gives {', '.join(calls[0])}: {missing[0]} is missing")
    return {
        each.name: np.concatenate([call[each.tensor] for call in calls])[:count].astype(each.dtype)
        for each in spec.loop.outputs
    }


def item_count(spec: ComponentSpec, values: Mapping[str, NDArray[Any]]) -> int:
    """How many items the inputs have. Raises TurbopocketError when they have none, or differ in it."""
    assert spec.loop is not None
    items = {each.name: values[each.name] for each in spec.loop.inputs if each.layout != "repeated"}
    counts = {name: len(value) if value.ndim else 0 for name, value in items.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        found = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise TurbopocketError(f"{spec.file}: all inputs must have one number of items, at least 1; found: {found}")
    return next(iter(counts.values()))
