# SPDX-License-Identifier: Apache-2.0
"""A component with the tensors that Apple's Swift package StableDiffusion gives it and takes from it.

Everything has a fixed shape. Numbers are fp16 but for those that fp16 would falsify: token ids (to 49,407), time
steps and picture sizes, whose sines are taken, and latents on their way into the UNet, whose noise is a small part of
them in the last steps (rounded, they cost 13 dB at timestep 49); and the picture, which `Decoder` reads as float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ....runtimes.manifest import TensorSpec
from ...families.graphs import LATENT_PARAMETERS, LATENT_SAMPLE, PENULTIMATE, TIMESTEP_COND, Component, UNetModule

PackageDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class Wrapped:
    """A module whose positional inputs and outputs are those of the package."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: Mapping[str, PackageDtype]

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Zeros: tracing needs shapes only."""
        return tuple(torch.zeros([int(size) for size in spec.shape]) for spec in self.inputs)


def wrapped(component: Component, batch: int) -> Wrapped:
    """The component as its package has it; `batch` is the UNet's (text encoders and the VAE's halves take one item)."""
    match component.role:
        case "text encoder":
            return _wrapped_text_encoder(component)
        case "denoiser":
            return _wrapped_unet(component, batch)
        case "encoder":
            return _wrapped_encoder(component)
        case "decoder":
            return _wrapped_decoder(component)


class _TextEncoder(nn.Module):
    """`hidden_embeds` is the state before the last layer, which SDXL reads; SD 1 reads `last_hidden_state`."""

    def __init__(self, component: Component) -> None:
        super().__init__()
        self.component = component.module
        self.names = component.output_names

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = dict(zip(self.names, self.component(input_ids.to(torch.int32)), strict=True))
        pooled = outputs["text_embeds"] if "text_embeds" in outputs else outputs["pooler_output"]
        states = [state for name, state in outputs.items() if name.startswith("hidden_states.")]
        penultimate = states[-2] if states else outputs[PENULTIMATE]
        return penultimate, outputs["last_hidden_state"], pooled


def _wrapped_text_encoder(component: Component) -> Wrapped:
    tokens = component.example_inputs["input_ids"].shape[1]
    names = (PENULTIMATE, "last_hidden_state", "pooled_outputs")
    return Wrapped(
        _TextEncoder(component), (_spec("input_ids", (1, tokens), "float32"),), dict.fromkeys(names, "float16")
    )


_ADDED_INPUTS: Mapping[str, PackageDtype] = {"time_ids": "float32", "text_embeds": "float16", TIMESTEP_COND: "float16"}
"""What a UNet may take beside what all take, in the package's order."""


class _UNet(nn.Module):
    def __init__(self, component: Component, added_names: Sequence[str]) -> None:
        super().__init__()
        assert isinstance(component.module, UNetModule)
        self.component = component.module
        self.added_names = added_names

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *added: Tensor) -> Tensor:
        states_BTD = encoder_hidden_states.squeeze(2).transpose(1, 2)
        return self.component.predict(sample, timestep, states_BTD, dict(zip(self.added_names, added, strict=True)))


def _wrapped_unet(component: Component, batch: int) -> Wrapped:
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in component.example_inputs.items()}
    tokens, width = shapes["encoder_hidden_states"]
    inputs = (
        _spec("sample", (batch, *shapes["sample"]), "float32"),
        _spec("timestep", (batch,), "float32"),
        _spec("encoder_hidden_states", (batch, width, 1, tokens)),
    )
    added = [_spec(name, (batch, *shapes[name]), dtype) for name, dtype in _ADDED_INPUTS.items() if name in shapes]
    names = [spec.name for spec in added]
    return Wrapped(_UNet(component, names), (*inputs, *added), {"noise_pred": "float16"})


def _wrapped_encoder(component: Component) -> Wrapped:
    """`Encoder` reads one output, means and logarithms of variances, as float32; a tiny VAE has no variances for it."""
    picture_shape = component.example_inputs["sample"].shape[1:]
    output = "latent" if LATENT_PARAMETERS in component.output_names else LATENT_SAMPLE
    return Wrapped(component.module, (_spec("x", (1, *picture_shape), "float32"),), {output: "float32"})


def _wrapped_decoder(component: Component) -> Wrapped:
    latent_shape = component.example_inputs["latent_sample"].shape[1:]
    return Wrapped(component.module, (_spec("z", (1, *latent_shape)),), {"image": "float32"})


def _spec(name: str, shape: Sequence[int], dtype: PackageDtype = "float16") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=list(shape))
