# SPDX-License-Identifier: Apache-2.0
"""FLUX.2-klein (Black Forest Labs 2026): Qwen3, a transformer of joint and single blocks, a VAE. Planned, not built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError
from ...runtimes.manifest import ComponentSpec
from ...runtimes.pipeline import Denoiser, Pipeline, TextEncoder
from . import flux2_keys, tokenizers
from .base import GraphOptions, LoadedModel, ModelFamily, ModuleSpec
from .flux2_graphs import flux2_decoder_component, flux2_transformer_component
from .graphs import TIMESTEP, Component
from .pipelines import DECODER, text_of
from .qwen3 import qwen3_component
from .sizes import latent_channels, latent_size

READ_LAYERS = (9, 18, 27)
"""The pipeline gives the transformer the states after so many of Qwen3's layers, side by side."""
SIDE = 64
"""Patches along a side of the pipeline's own picture, which is 1024 x 1024."""


def flux2_components(model: LoadedModel, options: GraphOptions) -> list[Component]:
    """Returns the graphs of a FLUX.2-klein. Raises TurbopocketError for more than one size, and for a first picture."""
    if len(options.sizes) > 1:
        asked = ", ".join(map(str, options.sizes))
        raise TurbopocketError(
            f"{model.name} was asked for {asked}, and its graph says where patches lie; one size is allowed",
            hint="plan one artifact for each size",
        )
    if options.image_to_image:
        raise TurbopocketError(f"{model.name} can not begin with a picture: FLUX.2-klein reads one as a reference")
    latents, tokens = latent_size(model, options.sizes[0]), model.text_tokens
    return [
        qwen3_component(model.modules["text_encoder"], "text_encoder", tokens, READ_LAYERS),
        flux2_transformer_component(model.modules["transformer"], latents, tokens),
        flux2_decoder_component(model.modules["vae"], latents),
    ]


def flux2_pipeline(model: LoadedModel, components: Mapping[str, ComponentSpec]) -> Pipeline:
    """States of three of Qwen3's layers; padding is read as well, so the transformer has no mask of it."""
    states = [("text_encoder", f"hidden_states.{count}") for count in READ_LAYERS]
    return Pipeline(
        text_encoders={"text_encoder": TextEncoder(attention_mask="attention_mask")},
        denoiser=Denoiser(
            component="transformer",
            latents="hidden_states",
            timestep=TIMESTEP,
            inputs={"encoder_hidden_states": text_of(*states)},
            output="out_sample",
        ),
        without_prompt="empty prompt",
        decoder=DECODER,
    )


def check_flux2(modules: Mapping[str, Any], folder: Path) -> None:
    """Raises TurbopocketError when modules that were made for different pipelines lie in one folder."""
    text, transformer, vae = (modules[name] for name in ("text_encoder", "transformer", "vae"))
    config, layers = transformer.config, text.config.num_hidden_layers
    if layers < max(READ_LAYERS):
        read = ", ".join(map(str, READ_LAYERS))
        raise TurbopocketError(
            f"{folder / 'text_encoder' / 'config.json'}: num_hidden_layers is {layers}; the pipeline reads the states "
            f"after layers {read}"
        )
    given = len(READ_LAYERS) * text.config.hidden_size
    if config.joint_attention_dim != given:
        raise TurbopocketError(
            f"{folder}: the transformer takes text {config.joint_attention_dim} wide, {len(READ_LAYERS)} states of "
            f"text_encoder give {given}"
        )
    channels = latent_channels(vae.config)
    if config.in_channels != channels:
        raise TurbopocketError(
            f"{folder}: the transformer takes {config.in_channels} channels, patches of the VAE's latents have "
            f"{channels}"
        )
    if transformer.out_channels != config.in_channels:
        raise TurbopocketError(
            f"{folder / 'transformer' / 'config.json'}: out_channels is {transformer.out_channels}; "
            f"{config.in_channels} are needed, as it takes"
        )


FLUX2_KLEIN = ModelFamily(
    name="flux2-klein",
    pipeline_class="Flux2KleinPipeline",
    modules={
        "text_encoder": ModuleSpec(
            "transformers",
            "Qwen3ForCausalLM",
            flux2_keys.QWEN3,
            tied={"lm_head.weight": "model.embed_tokens.weight"},
        ),
        "transformer": ModuleSpec("diffusers", "Flux2Transformer2DModel", flux2_keys.TRANSFORMER),
        "vae": ModuleSpec("diffusers", "AutoencoderKLFlux2", flux2_keys.VAE),
    },
    keys=flux2_keys.PIPELINE,
    components=flux2_components,
    pipeline=flux2_pipeline,
    check=check_flux2,
    guidance=4.0,
    denoiser="transformer",
    tokenizer=tokenizers.QWEN,
    prompt_tokens=512,
    sample_size=SIDE,
    schedulers=("FlowMatchEulerDiscreteScheduler",),
    only_planned=(
        "a build lacks a sampler that walks the straight lines of flow matching, prompts in Qwen's chat template, and "
        "a check against diffusers' pipeline"
    ),
    notes=(
        f"of text_encoder the first {max(READ_LAYERS)} layers are counted, whose states the pipeline reads; what lies "
        "behind them is not run",
    ),
)
