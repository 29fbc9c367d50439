# SPDX-License-Identifier: Apache-2.0
"""PixArt-Alpha and -Sigma (Chen et al. 2023, arXiv 2310.00426; 2024, arXiv 2403.04692): T5, a transformer, a VAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError
from ...runtimes.manifest import ComponentSpec
from ...runtimes.pipeline import Denoiser, Feed, MaskFeed, NumbersFeed, Pipeline, TextEncoder
from . import pixart_keys, tokenizers
from .base import GraphOptions, LoadedModel, ModelFamily, ModuleSpec
from .graphs import Component, vae_decoder_component
from .pipelines import DECODER, text_of
from .sd import VAE_RENAMES
from .sizes import latent_size
from .t5 import t5_encoder_component
from .transformer import ADDED, transformer_component

TOLD_AT = 128
"""The `sample_size` at which Alpha's pipeline tells the transformer resolution and aspect ratio, and at no other."""


def pixart_components(model: LoadedModel, options: GraphOptions) -> list[Component]:
    """Returns the graphs of a PixArt. Raises TurbopocketError for more than one size, and for a first picture."""
    if len(options.sizes) > 1:
        asked = ", ".join(map(str, options.sizes))
        raise TurbopocketError(
            f"{model.name} was asked for {asked}, and its graph says where patches lie; one size is allowed",
            hint="build one artifact for each size",
        )
    if options.image_to_image:
        raise TurbopocketError(
            f"{model.name} can not begin with a picture: diffusers has no pipeline of PixArt that does, with which an "
            "artifact could be compared"
        )
    latents, tokens = latent_size(model, options.sizes[0]), model.text_tokens
    return [
        t5_encoder_component(model.modules["text_encoder"], "text_encoder", tokens),
        transformer_component(model.modules["transformer"], latents, tokens),
        vae_decoder_component(model.modules["vae"], latents),
    ]


def pixart_pipeline(model: LoadedModel, components: Mapping[str, ComponentSpec]) -> Pipeline:
    """T5's last state and the mask of its padding; Alpha for 1024 pixels is told the picture's sides as well."""
    feeds: dict[str, Feed] = {
        "encoder_hidden_states": text_of(("text_encoder", "last_hidden_state")),
        "encoder_attention_mask": MaskFeed(component="text_encoder"),
    }
    if model.denoiser.use_additional_conditions:
        told = (NumbersFeed(values=["height", "width"]), NumbersFeed(values=["aspect_ratio"]))
        feeds |= dict(zip(ADDED, told, strict=True))
    return Pipeline(
        text_encoders={"text_encoder": TextEncoder(attention_mask="attention_mask")},
        denoiser=Denoiser(
            component="transformer",
            latents="hidden_states",
            timestep="timestep",
            inputs=feeds,
            output="out_sample",
            channels="all" if model.denoiser.out_channels == model.denoiser.config.in_channels else "first half",
        ),
        without_prompt="empty prompt",
        decoder=DECODER,
    )


def check_pixart(modules: Mapping[str, Any], folder: Path) -> None:
    """Raises TurbopocketError when modules that were made for different pipelines lie in one folder."""
    text, transformer, vae = (modules[name] for name in ("text_encoder", "transformer", "vae"))
    config = transformer.config
    read = config.cross_attention_dim if config.caption_channels is None else config.caption_channels
    if read != text.config.d_model:
        raise TurbopocketError(
            f"{folder}: the transformer takes text {read} wide, text_encoder gives {text.config.d_model}"
        )
    if config.in_channels != vae.config.latent_channels:
        raise TurbopocketError(
            f"{folder}: the transformer takes {config.in_channels} channels, the VAE's latents have "
            f"{vae.config.latent_channels}"
        )
    path, out = folder / "transformer" / "config.json", transformer.out_channels
    if out not in (config.in_channels, 2 * config.in_channels):
        raise TurbopocketError(
            f"{path}: out_channels is {out}; {config.in_channels}, or {2 * config.in_channels} of which half is a "
            "variance, are allowed"
        )
    if config.sample_size % config.patch_size:
        raise TurbopocketError(
            f"{path}: sample_size is {config.sample_size}; a multiple of patch_size, {config.patch_size}, is needed"
        )
    if transformer.use_additional_conditions and config.sample_size != TOLD_AT:
        raise TurbopocketError(
            f"{path}: use_additional_conditions is true and sample_size {config.sample_size}; diffusers' pipeline "
            f"tells a transformer sizes at {TOLD_AT} alone"
        )


def _modules(transformer_keys: Any) -> dict[str, ModuleSpec]:
    return {
        "text_encoder": ModuleSpec(
            "transformers",
            "T5EncoderModel",
            pixart_keys.T5_ENCODER,
            tied={"encoder.embed_tokens.weight": "shared.weight"},
        ),
        "transformer": ModuleSpec(
            "diffusers", "PixArtTransformer2DModel", transformer_keys, former_names=("Transformer2DModel",)
        ),
        "vae": ModuleSpec("diffusers", "AutoencoderKL", pixart_keys.PIXART_VAE, VAE_RENAMES),
    }


# A caption is cleaned by diffusers where beautifulsoup4 and ftfy are installed, and by default put in lower case alone;
# that is what an artifact does. It draws the size it was built for, not the nearest that diffusers has in a list.
_CALL = {"clean_caption": False, "use_resolution_binning": False}

PIXART_ALPHA = ModelFamily(
    name="pixart-alpha",
    pipeline_class="PixArtAlphaPipeline",
    modules=_modules(pixart_keys.TRANSFORMER),
    keys=pixart_keys.PIPELINE,
    components=pixart_components,
    pipeline=pixart_pipeline,
    check=check_pixart,
    guidance=4.5,
    denoiser="transformer",
    tokenizer=tokenizers.T5,
    prompt_tokens=120,
    diffusers_call=_CALL,
)

PIXART_SIGMA = ModelFamily(
    name="pixart-sigma",
    pipeline_class="PixArtSigmaPipeline",
    modules=_modules(pixart_keys.SIGMA_TRANSFORMER),
    keys=pixart_keys.PIPELINE,
    components=pixart_components,
    pipeline=pixart_pipeline,
    check=check_pixart,
    guidance=4.5,
    denoiser="transformer",
    tokenizer=tokenizers.T5,
    prompt_tokens=300,
    diffusers_call=_CALL,
)
