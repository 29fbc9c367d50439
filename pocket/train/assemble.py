# SPDX-License-Identifier: Apache-2.0
"""Puts the trained parts together as the folder that `StableDiffusionXLPipeline.from_pretrained` opens."""

import shutil
from copy import deepcopy
from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from .text import TextEncoders

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def scheduler() -> EulerDiscreteScheduler:
    """The scheduler the model is trained for and shipped with, configured as SDXL's."""
    return EulerDiscreteScheduler(**SCHEDULER)


def save_pipeline(folder: Path, encoders: TextEncoders, vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """A complete half-precision pipeline folder at `folder`, replacing what was there; the arguments stay float32."""
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline = StableDiffusionXLPipeline(
        vae=deepcopy(vae).half(),
        text_encoder=deepcopy(encoders.first).half(),
        text_encoder_2=deepcopy(encoders.second).half(),
        tokenizer=encoders.tokenizers[0],
        tokenizer_2=encoders.tokenizers[1],
        unet=deepcopy(unet).half(),
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(scratch)
    encoders.save_tokenizers(scratch)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
