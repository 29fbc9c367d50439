# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL and its distilled kin (SDXL-Turbo, Lightning, LCM without guidance embedding)."""

from .base import ModelFamily, ModuleSpec
from .sd import CLIP_TEXT, PLAIN_UNET, VAE

SDXL = ModelFamily(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    modules={
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": ModuleSpec("transformers", "CLIPTextModelWithProjection"),
        "unet": ModuleSpec(
            "diffusers",
            "UNet2DConditionModel",
            required_config={**PLAIN_UNET, "addition_embed_type": "text_time"},
        ),
        "vae": VAE,
    },
    pipeline_defaults={"force_zeros_for_empty_prompt": True},
)
