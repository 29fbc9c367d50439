# SPDX-License-Identifier: Apache-2.0
"""The VAE stage: an autoencoder with SDXL's layout (four levels, 8x downsampling, 4 latent channels)."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import max_pool2d

from ..render import SIDE, render
from ..scenes import sample_scenes
from .loop import bfloat16_where_fast, fit, step_generator
from .muon import muon_and_adamw

LATENT_CHANNELS = 4
FIRST_LOG_VARIANCE = -6.0
KL_WEIGHT = 3e-5  # per latent element, against a mean absolute error per pixel
EDGE_WEIGHT = 0.5
OBJECT_CONTRAST = 0.15
OBJECT_WEIGHT = 2.0  # a small ring covers a hundredth of the picture and is half of what the caption says


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of the pocket size, its posteriors narrow so that colour gets through at once."""
    level = "EncoderBlock2D"
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("Down" + level,) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=1,  # at these widths, small groups erase flat colour: one learns fastest
        latent_channels=LATENT_CHANNELS,
        sample_size=SIDE,
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = FIRST_LOG_VARIANCE
    return vae


def picture_loss(output: Tensor, target: Tensor, object_weight: float) -> tuple[Tensor, dict[str, float]]:
    """Absolute and squared error of pixels and absolute error of their differences.

    Args:
        output, target: (N, 3, 64, 64) in [-1, 1]; the target's corner pixel is its background.
        object_weight: how much more a pixel on or beside an object counts than one of the background.
    """
    error = output - target
    on_object = (target - target[:, :, :1, :1]).abs().amax(1, keepdim=True) > OBJECT_CONTRAST
    weights = 1 + object_weight * max_pool2d(on_object.float(), 3, stride=1, padding=1)
    pixel = (weights * (error.abs() + error.square())).mean()
    edges = (weights[..., 1:] * error.diff(dim=-1).abs()).mean()
    edges = edges + (weights[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    parts = {"pixel": error.abs().mean().item(), "edge": edges.item()}
    return pixel + EDGE_WEIGHT * edges, parts


def vae_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction error plus a light pull of the posteriors to a unit Gaussian.

    Args:
        pictures: (N, 3, 64, 64) in [0, 1].
    """
    target = (2 * pictures - 1).to(memory_format=torch.channels_last)
    with bfloat16_where_fast():
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
    reconstruction, parts = picture_loss(decoded.float(), target, OBJECT_WEIGHT)
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return reconstruction + KL_WEIGHT * kl, {**parts, "kl": kl.item()}


def train_vae(folder: Path, *, steps: int, batch: int, seed: int) -> None:
    """A trained autoencoder in `folder/vae`, its scaling factor set from the spread of its latents."""
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = step_generator(seed, step)
        pictures = render(sample_scenes("train", batch, seed * 1_000_003 + step), generator)
        return vae_loss(vae, pictures, generator)

    def save(step: int) -> None:
        vae.register_to_config(scaling_factor=round(1 / latent_spread(vae, seed), 5))
        vae.save_pretrained(folder / "vae")

    optimisers = muon_and_adamw(vae.named_parameters(), lr=2e-3)
    fit(folder, {"vae": vae}, optimisers, loss_at, steps=steps, on_checkpoint=save)


@torch.no_grad()
def latent_spread(vae: AutoencoderKL, seed: int) -> float:
    """Standard deviation of the latents of 256 training pictures, over all elements."""
    pictures = render(sample_scenes("train", 256, seed), step_generator(seed, 0))
    return float(vae.encode(2 * pictures - 1).latent_dist.mean.std())
