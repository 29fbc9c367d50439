# SPDX-License-Identifier: Apache-2.0
"""Whether the modules of a Stable Diffusion were made for each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError


def check_unet(modules: Mapping[str, Any], folder: Path) -> None:
    """Raises TurbopocketError when modules that were made for different pipelines lie in one folder."""
    unet, vae = modules["unet"].config, modules["vae"].config
    latent_channels = vae["latent_channels"]
    encoders = [name for name in modules if name.startswith("text_encoder")]
    text_width = sum(modules[name].config.hidden_size for name in encoders)
    if unet["cross_attention_dim"] != text_width:
        raise TurbopocketError(
            f"{folder}: the UNet takes text {unet['cross_attention_dim']} wide, "
            f"{' and '.join(encoders)} give {text_width}"
        )
    if unet["in_channels"] != latent_channels:
        raise TurbopocketError(
            f"{folder}: the UNet takes {unet['in_channels']} channels, the VAE's latents have "
            f"{latent_channels}; inpainting and editing models are not supported"
        )
    if unet["out_channels"] != latent_channels:
        raise TurbopocketError(
            f"{folder}: the UNet gives {unet['out_channels']} channels, {latent_channels} are needed, as it takes"
        )
    if unet["addition_embed_type"] == "text_time":
        pooled = (unet["projection_class_embeddings_input_dim"] or 0) - 6 * (unet["addition_time_embed_dim"] or 0)
        given = modules["text_encoder_2"].config.projection_dim
        if pooled != given:
            raise TurbopocketError(
                f"{folder}: the UNet takes pooled text {pooled} wide beside six sizes, text_encoder_2 gives {given}"
            )
    for key in ("latents_mean", "latents_std"):
        found = vae.get(key)
        if found is not None and len(found) != latent_channels:
            raise TurbopocketError(
                f"{folder / 'vae' / 'config.json'}: {key} has {len(found)} numbers, one for each of {latent_channels} "
                "latent channels is needed"
            )
