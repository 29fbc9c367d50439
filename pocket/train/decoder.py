# SPDX-License-Identifier: Apache-2.0
"""The decoder stage: the VAE's decoder alone, refined while its latents, and so the UNet, stay as they are."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..render import render
from ..scenes import sample_scenes
from .loop import fit, step_generator
from .muon import muon_and_adamw
from .vae import picture_loss

OBJECT_WEIGHT = 3.0  # a small ring covers a hundredth of the picture and is half of what the caption says
LATENT_NOISE = 0.15  # greatest, as a share of the latents' spread: a sampler's latents are not exactly an encoder's


def train_decoder(folder: Path, trained: Path, *, steps: int, batch: int, seed: int) -> None:
    """The autoencoder at `trained` with a better decoder, in `folder/vae`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(trained).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    optimisers = muon_and_adamw(vae.named_parameters(), lr=1e-3)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = step_generator(seed, step)
        target = 2 * render(sample_scenes("train", batch, seed * 1_000_003 + step), generator) - 1
        with torch.no_grad():
            latents = vae.encode(target).latent_dist.mean
        level = LATENT_NOISE / vae.config.scaling_factor * torch.rand(batch, 1, 1, 1, generator=generator)
        latents = latents + level * torch.randn(latents.shape, generator=generator)
        return picture_loss(vae.decode(latents).sample, target, OBJECT_WEIGHT)

    def save(step: int) -> None:
        vae.save_pretrained(folder / "vae")

    states = {"vae": vae}
    fit(folder, states, optimisers, loss_at, steps=steps, warmup_steps=20, on_checkpoint=save, checkpoint_every_s=100.0)
