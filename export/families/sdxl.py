# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL and its distilled kin (SDXL-Turbo, Lightning, LCM)."""

from . import key_tables
from .base import ModelFamily, ModuleSpec
from .components import unet_components
from .pipelines import stable_diffusion_xl
from .sd import CLIP_TEXT, TINY_VAE, VAE_RENAMES
from .unet_widths import check_unet

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
    components=unet_components,
    pipeline=stable_diffusion_xl,
    check=check_unet,
    guidance=5.0,
    diffusers_parts={"add_watermarker": False},
    pipeline_defaults={"force_zeros_for_empty_prompt": True},
)
