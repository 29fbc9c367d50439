# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, one UNet, one VAE."""

from .base import ModelFamily, ModuleSpec

# transformers 5 dropped the module `text_model`, which every published file still names.
CLIP_TEXT = ModuleSpec("transformers", "CLIPTextModel", renames=((r"^text_model\.", ""),))

# Conditioning that the UNet could take and our graphs have no input for: guidance-scale embeddings (LCM),
# class labels, image prompts.
PLAIN_UNET: dict[str, object] = {
    "time_cond_proj_dim": None,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
}

# The first published VAEs name the projections of their attention as diffusers once did.
VAE = ModuleSpec(
    "diffusers",
    "AutoencoderKL",
    renames=(
        (r"\.attentions\.(\d+)\.query\.", r".attentions.\1.to_q."),
        (r"\.attentions\.(\d+)\.key\.", r".attentions.\1.to_k."),
        (r"\.attentions\.(\d+)\.value\.", r".attentions.\1.to_v."),
        (r"\.attentions\.(\d+)\.proj_attn\.", r".attentions.\1.to_out.0."),
    ),
)

SD = ModelFamily(
    name="sd",
    pipeline_class="StableDiffusionPipeline",
    modules={
        "text_encoder": CLIP_TEXT,
        "unet": ModuleSpec(
            "diffusers",
            "UNet2DConditionModel",
            required_config={**PLAIN_UNET, "addition_embed_type": None},
        ),
        "vae": VAE,
    },
)
