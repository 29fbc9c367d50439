# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, one UNet, one VAE."""

from . import key_tables
from .base import ModelFamily, ModuleSpec
from .components import unet_components
from .pipelines import stable_diffusion
from .unet_widths import check_unet

# transformers 5 dropped the module `text_model`, which every published file still names.
CLIP_TEXT = ModuleSpec("transformers", "CLIPTextModel", key_tables.CLIP_TEXT, renames=((r"^text_model\.", ""),))

TINY_VAE = ModuleSpec("diffusers", "AutoencoderTiny", key_tables.TINY_VAE)

VAE_RENAMES = (
    # The first published VAEs name the projections of their attention as diffusers once did.
    (r"\.attentions\.(\d+)\.query\.", r".attentions.\1.to_q."),
    (r"\.attentions\.(\d+)\.key\.", r".attentions.\1.to_k."),
    (r"\.attentions\.(\d+)\.value\.", r".attentions.\1.to_v."),
    (r"\.attentions\.(\d+)\.proj_attn\.", r".attentions.\1.to_out.0."),
)

SD = ModelFamily(
    name="sd",
    pipeline_class="StableDiffusionPipeline",
    other_pipeline_classes=("LatentConsistencyModelPipeline",),
    modules={
        "text_encoder": CLIP_TEXT,
        "unet": ModuleSpec("diffusers", "UNet2DConditionModel", key_tables.UNET),
        "vae": ModuleSpec("diffusers", "AutoencoderKL", key_tables.VAE, VAE_RENAMES, (TINY_VAE,)),
    },
    keys=key_tables.PIPELINE,
    components=unet_components,
    pipeline=stable_diffusion,
    check=check_unet,
    old_least_sample_size=64,
    guidance=7.5,
    # StableDiffusionPipeline takes two settings for outdated and never draws with them: a `steps_offset` other than 1
    # and `clip_sample`. Other pipelines of diffusers take the config as it is.
    scheduler_settings={"steps_offset": 1, "clip_sample": False},
    diffusers_parts={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)
