# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL and its distilled kin (SDXL-Turbo, Lightning, LCM)."""

from . import key_tables
from .base import ModelFamily, ModuleSpec
from .sd import CLIP_TEXT, TINY_VAE, VAE_RENAMES

SDXL = ModelFamily(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    modules={
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": ModuleSpec("transformers", "CLIPTextModelWithProjection", key_tables.CLIP_TEXT),
        "unet": ModuleSpec("diffusers", "UNet2DConditionModel", key_tables.SDXL_UNET),
        "vae": ModuleSpec("diffusers", "AutoencoderKL", key_tables.SDXL_VAE, VAE_RENAMES, (TINY_VAE,)),
    },
    keys=key_tables.SDXL_PIPELINE,
    pipeline_defaults={"force_zeros_for_empty_prompt": True},
)
