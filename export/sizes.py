# SPDX-License-Identifier: Apache-2.0
"""Which sizes an artifact draws: those that are asked for, as far as the model can draw them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..runtimes.errors import TurbopocketError
from ..runtimes.image_size import ImageSize

if TYPE_CHECKING:  # loading a model runs its graphs, so families import this module
    from .families import LoadedModel

MAX_LATENT_POSITIONS = 2**15
"""Of one picture, such as 2048x1024 at 8 pixels a position. The VAE's attention compares every position with every
other: 4 GiB of fp32 scores at once, which is already more than a phone gives an app."""


def drawn_sizes(model: "LoadedModel", asked: Sequence[ImageSize]) -> tuple[ImageSize, ...]:
    """Returns the sizes that an artifact of the model draws, its default first: those asked for, else the model's own.

    Raises TurbopocketError for a size that is not whole latent positions, or is larger than any phone could draw.
    """
    sizes = tuple(asked) or (model.image_size,)
    for size in sizes:
        _require_drawable(size, model)
    return sizes


def latent_size(model: "LoadedModel", size: ImageSize) -> ImageSize:
    """Returns the latents' size of a picture of that size."""
    return ImageSize(size.height // model.vae_scale_factor, size.width // model.vae_scale_factor)


def size_notes(model: "LoadedModel", sizes: Sequence[ImageSize]) -> tuple[str, ...]:
    """Returns what to know of sizes that are not the model's own: a line, or none."""
    others = [str(size) for size in sizes if size != model.image_size]
    if not others:
        return ()
    return (
        f"{model.name} was trained to draw {model.image_size}: at {', '.join(others)} the files compute what PyTorch "
        "computes, and the pictures are as good as the float model's at that size, no better",
    )


def _require_drawable(size: ImageSize, model: "LoadedModel") -> None:
    factor = model.vae_scale_factor
    if size.height % factor or size.width % factor:
        near = ImageSize(*(max(1, round(side / factor)) * factor for side in size))
        raise TurbopocketError(
            f"size {size}: {model.name} draws widths and heights that are multiples of {factor}; {near} is near"
        )
    height, width = latent_size(model, size)
    if height * width > MAX_LATENT_POSITIONS:
        raise TurbopocketError(
            f"size {size} has {height * width:,} latent positions, and attention over them "
            f"{4 * (height * width) ** 2 / 2**30:,.1f} GiB of scores; at most {MAX_LATENT_POSITIONS:,} are taken, "
            f"{4 * MAX_LATENT_POSITIONS**2 / 2**30:,.1f} GiB"
        )
