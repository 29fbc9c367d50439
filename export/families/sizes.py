# SPDX-License-Identifier: Apache-2.0
"""Which sizes an artifact draws: those that are asked for, as far as the model can draw them."""

import math
from collections.abc import Sequence
from typing import Any

from ...ground.errors import TurbopocketError
from ...runtimes.image_size import ImageSize
from .base import LoadedModel

PIPELINE_MULTIPLE = 8
"""diffusers' pipelines take no other sides, and are what an artifact is compared with."""

MAX_LATENT_POSITIONS = 2**15
"""Of one picture, such as 2048x1024 at 8 pixels a position. The VAE's attention compares every position with every
other: 4 GiB of fp32 scores at once, which is already more than a phone gives an app."""


def drawn_sizes(model: LoadedModel, asked: Sequence[ImageSize]) -> tuple[ImageSize, ...]:
    """Returns the sizes that an artifact of the model draws, its default first: those asked for, else the model's own.

    Raises TurbopocketError for a size that the model's pipeline does not take, or that is larger than any phone could
    draw.
    """
    sizes = tuple(asked) or (model.image_size,)
    for size in sizes:
        _require_drawable(size, model)
    return sizes


def require_even_levels(model: LoadedModel, sizes: Sequence[ImageSize], what: str) -> None:
    """Raises TurbopocketError for a size that the UNet does not halve evenly at every level, as `what` needs it."""
    for size in sizes:
        _require_multiple(size, model.vae_scale_factor * 2**model.denoiser.num_upsamplers, f"{what} of {model.name}")


def pixels_aside(vae: Any) -> int:
    """Returns how many pixels a side of one latent stands for, by a VAE's config."""
    return int(2 ** (len(vae["block_out_channels"]) - 1)) * _patch(vae)


def latent_channels(vae: Any) -> int:
    """Returns how many numbers a latent has, by a VAE's config."""
    return int(vae["latent_channels"]) * _patch(vae) ** 2


def _patch(vae: Any) -> int:
    """Latents of the VAE along a side of one that is drawn: more than one where these are patches of it."""
    return int((vae.get("patch_size") or (1,))[0])


def latent_size(model: LoadedModel, size: ImageSize) -> ImageSize:
    """Returns the latents' size of a picture of that size."""
    return ImageSize(size.height // model.vae_scale_factor, size.width // model.vae_scale_factor)


def size_notes(model: LoadedModel, sizes: Sequence[ImageSize]) -> tuple[str, ...]:
    """Returns what to know of sizes that are not the model's own: a line, or none."""
    others = [str(size) for size in sizes if size != model.image_size]
    if not others:
        return ()
    return (
        f"{model.name} was trained to draw {model.image_size}: what it draws at {', '.join(others)} is what the float "
        "model draws there, be it good or bad",
    )


def _require_drawable(size: ImageSize, model: LoadedModel) -> None:
    patch = model.denoiser.config.get("patch_size") or 1
    _require_multiple(size, math.lcm(PIPELINE_MULTIPLE, model.vae_scale_factor * patch), model.name)
    height, width = latent_size(model, size)
    positions = height * width * _patch(model.modules["vae"].config) ** 2
    if positions > MAX_LATENT_POSITIONS:
        raise TurbopocketError(
            f"size {size} has {positions:,} latent positions, and attention over them "
            f"{4 * positions**2 / 2**30:,.1f} GiB of scores; at most {MAX_LATENT_POSITIONS:,} are taken, "
            f"{4 * MAX_LATENT_POSITIONS**2 / 2**30:,.1f} GiB"
        )


def _require_multiple(size: ImageSize, step: int, who: str) -> None:
    if size.height % step or size.width % step:
        near = ImageSize(*(max(1, round(side / step)) * step for side in size))
        raise TurbopocketError(f"size {size}: width and height for {who} are multiples of {step}; {near} is near")
