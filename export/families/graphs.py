# SPDX-License-Identifier: Apache-2.0
"""The graphs a phone runs: one PyTorch module per component, with a name for every tensor that goes in or out.

Names, order and number types of the tensors are those of optimum-onnx's pipelines, so that its users can open
our artifacts. Layers are named `<component>.<module path>`, as in `quant`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...ground.names import LayerName
from ...quant.layers import compressible_layers, without_weights

EXAMPLE_BATCH = 2
"""The batch of all example inputs: 1 would let tracing take the batch for a constant."""

TIMESTEP = "timestep"
"""A denoiser's input for the timestep, one for all of a batch."""

TIMESTEP_COND = "timestep_cond"
"""A UNet's input for the guidance, where it is told that."""

LATENT_PARAMETERS, LATENT_SAMPLE = "latent_parameters", "latent_sample"
"""What a VAE's encoder gives: means and logarithms of variances, or z itself where it has no variances."""

Role = Literal["text encoder", "denoiser", "decoder", "encoder"]
"""What a graph is for: reading prompts, predicting at every step, latents to a picture, a picture to latents."""


_BLOCK = re.compile(
    r"(.+?\.(?:(?:single_)?transformer_blocks|resnets|layers)\.\d+"  # of UNets and transformers, CLIP and TAESD
    r"|.+?\.block\.\d+\.layer\.0"  # of T5 the attention, as its graph calls no more than that as one module
    r"|.+?\.attentions\.\d+(?=\.(?:group_norm|to_[qkv]|to_out)\b))\."  # of a VAE; a UNet's hold transformer blocks
)


def block_name(layer: str) -> str:
    """The block that a layer belongs to: `unet.mid_block.resnets.0`, `text_encoder.encoder.layers.3`, …

    Blocks are transformer blocks, resnets, a VAE's attentions and encoder layers, by the name of the module that they
    are; a layer outside all of them is its own block.
    """
    found = _BLOCK.match(layer)
    return found[1] if found else layer


class ComponentModule(nn.Module):
    """A module with positional tensors in and out, whose only child is the traced model.

    The child is registered under the component's name, so parameter names start with `<component>.`.
    """

    def __init__(self, component: str, model: nn.Module) -> None:
        super().__init__()
        self.component = component
        self.add_module(component, model)

    @property
    def model(self) -> Any:
        """The wrapped model: its module paths, behind the component's name, are the layers' names."""
        return self.get_submodule(self.component)


@dataclass(frozen=True)
class Component:
    """One graph: its module, and the names of the tensors that go in (with an example of each) and come out.

    The first dimension of every input that has dimensions is the batch and may vary. So may those in `free`, which has
    their names by tensor (inputs and outputs) and index; all others are fixed. `role` is what the graph is for.
    """

    name: str
    module: ComponentModule
    example_inputs: dict[str, Tensor]
    output_names: tuple[str, ...]
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    role: Role = field(kw_only=True)

    @property
    def layer_prefix(self) -> str:
        """What a parameter's or layer's name has in front of the path inside the model: `unet.`."""
        return f"{self.name}."

    def without_weights(self) -> "Component":
        """The same graph for what reads shapes alone: its layers hold no weights, all other tensors are shared."""
        module = without_weights(self.module)
        assert isinstance(module, ComponentModule)
        return replace(self, module=module)

    def blocks(self) -> dict[str, nn.Module]:
        """Every block by its name, in the order of registration: each layer is in exactly one."""
        names = dict.fromkeys(block_name(layer) for layer in compressible_layers(self.name, self.module.model))
        return {name: self.module.model.get_submodule(LayerName.parse(name).path) for name in names}


LATENT_SIDES = {2: "latent_height", 3: "latent_width"}
PICTURE_SIDES = {2: "height", 3: "width"}
"""Names of free dimensions: those of the manifest's `image`."""

PENULTIMATE = "hidden_embeds"
"""Apple's name of the hidden state that SDXL reads: the one before the last layer."""


class _TextEncoder(ComponentModule):
    def __init__(self, component: str, model: nn.Module, all_states: bool) -> None:
        super().__init__(component, model)
        self.all_states = all_states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        # Positions are computed, not read from the model's buffer, which may be on the meta device.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        encoded = self.model(input_ids, position_ids=positions, output_hidden_states=True)
        if not self.all_states:
            return encoded.hidden_states[-2], encoded.last_hidden_state, encoded[self.pooled_name]
        if self.has_projection:
            return encoded.text_embeds, encoded.last_hidden_state, *encoded.hidden_states
        return encoded.last_hidden_state, encoded.pooler_output, *encoded.hidden_states

    @property
    def has_projection(self) -> bool:
        return hasattr(self.model, "text_projection")

    @property
    def pooled_name(self) -> str:
        return "text_embeds" if self.has_projection else "pooler_output"


def text_encoder_component(
    clip_model: nn.Module, name: str = "text_encoder", all_states: bool = True, tokens: int | None = None
) -> Component:
    """`input_ids` [B, T] int64 to `last_hidden_state` [B, T, D], `pooler_output` [B, D] (CLIPTextModel) or to
    `text_embeds` [B, P], `last_hidden_state` (CLIPTextModelWithProjection), then `hidden_states.0` … `.L` for L layers.

    Without `all_states`: `hidden_embeds` (the state before the last layer), `last_hidden_state`, and the pooled one.
    T is `tokens`, by default as many as the model has positions.
    """
    module = _TextEncoder(name, clip_model, all_states)
    config = module.model.config
    length = tokens or config.max_position_embeddings
    states = tuple(f"hidden_states.{index}" for index in range(config.num_hidden_layers + 1))
    if not all_states:
        names: tuple[str, ...] = (PENULTIMATE, "last_hidden_state", module.pooled_name)
    elif module.has_projection:
        names = (module.pooled_name, "last_hidden_state", *states)
    else:
        names = ("last_hidden_state", module.pooled_name, *states)
    return Component(
        name=name,
        module=module,
        example_inputs={"input_ids": torch.zeros(EXAMPLE_BATCH, length, dtype=torch.int64)},
        output_names=names,
        role="text encoder",
    )


class UNetModule(ComponentModule):
    """A UNet whose further inputs, beside the three that every one has, are those in `added_names`, in this order."""

    def __init__(self, component: str, model: nn.Module, added_names: Sequence[str]) -> None:
        super().__init__(component, model)
        self.added_names = tuple(added_names)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *added: Tensor) -> Tensor:
        for tensor in (encoder_hidden_states, *added):
            torch._check(tensor.shape[0] == sample.shape[0])  # one batch size, so that tracing finds one symbol
        return self.predict(sample, timestep, encoder_hidden_states, dict(zip(self.added_names, added, strict=True)))

    def predict(self, sample: Tensor, timestep: Tensor, states: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """What the model says, given its further inputs by name."""
        pooled = {name: tensor for name, tensor in added.items() if name != TIMESTEP_COND}
        return self.model(
            sample,
            timestep,
            states,
            timestep_cond=added.get(TIMESTEP_COND),
            added_cond_kwargs=pooled or None,
            return_dict=False,
        )[0]


def unet_component(
    unet: nn.Module, latent_size: tuple[int, int] | None = None, text_tokens: int = 77, free_size: bool = False
) -> Component:
    """`sample` [B, C, h, w], `timestep` [] and `encoder_hidden_states` [B, T, D] to `out_sample` [B, C, h, w].

    A UNet that is told its guidance (LCM) also takes `timestep_cond` [B, E], SDXL's `text_embeds` [B, P] and
    `time_ids` [B, 6]. All float32. `latent_size` is (h, w), by default the size the model was trained for; with
    `free_size` it is an example.
    """
    model: Any = unet
    config = model.config
    own = config.sample_size
    height, width = latent_size or ((own, own) if isinstance(own, int) else own)
    inputs = {
        "sample": torch.zeros(EXAMPLE_BATCH, config.in_channels, height, width),
        TIMESTEP: torch.tensor(999.0),
        "encoder_hidden_states": torch.zeros(EXAMPLE_BATCH, text_tokens, config.cross_attention_dim),
    }
    plain = len(inputs)
    if config.time_cond_proj_dim is not None:
        inputs[TIMESTEP_COND] = torch.zeros(EXAMPLE_BATCH, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        time_ids = 6
        pooled_width = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
        inputs["text_embeds"] = torch.zeros(EXAMPLE_BATCH, pooled_width)
        inputs["time_ids"] = torch.zeros(EXAMPLE_BATCH, time_ids)
    free = {"sample": LATENT_SIDES, "out_sample": LATENT_SIDES} if free_size else {}
    return Component(
        "unet", UNetModule("unet", unet, tuple(inputs)[plain:]), inputs, ("out_sample",), free, role="denoiser"
    )


class _DecoderHalf(nn.Module):
    """The half of an AutoencoderKL or AutoencoderTiny that draws, with the module paths it has in the whole."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.decoder = vae.decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(latent if self.post_quant_conv is None else self.post_quant_conv(latent))


class _VaeDecoder(ComponentModule):
    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model(latent_sample)


class _EncoderHalf(nn.Module):
    """The half of an AutoencoderKL or AutoencoderTiny that reads pictures, with module paths as in the whole."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = getattr(vae, "quant_conv", None)

    def forward(self, sample: Tensor) -> Tensor:
        z: Tensor = self.encoder(sample)
        return z if self.quant_conv is None else self.quant_conv(z)


class _VaeEncoder(ComponentModule):
    def forward(self, sample: Tensor) -> Tensor:
        return self.model(sample)


def vae_encoder_component(vae: Any, image_size: tuple[int, int], free_size: bool = False) -> Component:
    """`sample` [B, 3, H, W] in -1..1 to `latent_parameters` [B, 2C, h, w]: means, then logarithms of variances.

    An AutoencoderTiny has no variances and gives `latent_sample` [B, C, h, w]. Both are still to be multiplied by the
    scaling factor. With `free_size` the picture's size is an example.
    """
    from diffusers import AutoencoderTiny

    output = LATENT_SAMPLE if isinstance(vae, AutoencoderTiny) else LATENT_PARAMETERS
    return Component(
        name="vae_encoder",
        module=_VaeEncoder("vae_encoder", _EncoderHalf(vae)),
        example_inputs={"sample": torch.zeros(EXAMPLE_BATCH, vae.config.in_channels, *image_size)},
        output_names=(output,),
        free={"sample": PICTURE_SIDES, output: LATENT_SIDES} if free_size else {},
        role="encoder",
    )


def vae_decoder_component(vae: Any, latent_size: tuple[int, int], free_size: bool = False) -> Component:
    """`latent_sample` [B, C, h, w] (already divided by the scaling factor) to `sample` [B, 3, H, W] in -1..1.

    With `free_size` the latents' size is an example.
    """
    return Component(
        name="vae_decoder",
        module=_VaeDecoder("vae_decoder", _DecoderHalf(vae)),
        example_inputs={"latent_sample": torch.zeros(EXAMPLE_BATCH, vae.config.latent_channels, *latent_size)},
        output_names=("sample",),
        free={"latent_sample": LATENT_SIDES, "sample": PICTURE_SIDES} if free_size else {},
        role="decoder",
    )
