# SPDX-License-Identifier: Apache-2.0
"""Pictures of scenes: anti-aliased signed distance fields, drawn in batch.

Shape suffixes: N pictures, K objects, H rows, W columns, C colour channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .scenes import AXES, LABELS, SHAPES, Scene, labels_of

SIDE = 64
MARGIN = 1.5  # least distance of an object from the canvas edge, pixels
GAP = 3.0  # least distance between two objects along their axis, pixels
RADIUS_BOUNDS = ((6.2, 7.4), (11.5, 13.3))  # small, large; pixels

COLOUR_RGB = torch.tensor(
    [
        (0.88, 0.12, 0.12),
        (0.12, 0.62, 0.18),
        (0.12, 0.22, 0.86),
        (0.98, 0.83, 0.10),
        (0.50, 0.14, 0.62),
        (0.10, 0.80, 0.88),
    ]
)
BACKGROUND_RGB = torch.tensor([(0.96, 0.96, 0.96), (0.06, 0.06, 0.06), (0.52, 0.52, 0.52), (0.98, 0.70, 0.76)])
COLOUR_JITTER = 0.03


def render(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """(N, 3, 64, 64) float pictures in [0, 1], one per scene.

    Position, size and colour vary mildly with the generator; objects never touch or leave the canvas.
    """
    return render_labels(labels_of(scenes), generator)


def render_labels(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As `render`, from the (N, 8) labels of `scenes.labels_of`."""
    columns = dict(zip(LABELS, labels.unbind(1), strict=True))
    shapes_NK = torch.stack([columns["shape0"], columns["shape1"]], 1)
    colours_NK = torch.stack([columns["colour0"], columns["colour1"]], 1)
    sizes_NK = torch.stack([columns["size0"], columns["size1"]], 1)
    radii_NK, centres_NK2 = place(sizes_NK, columns["axis"], generator)
    rgb_NKC = _jittered(COLOUR_RGB[colours_NK], generator)
    background_NC = _jittered(BACKGROUND_RGB[columns["background"]], generator)
    return draw(shapes_NK, radii_NK, centres_NK2, rgb_NKC, background_NC)


def place(sizes_NK: Tensor, axis_N: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Radii (N, K) and centres (N, K, 2) as x, y in pixels for K objects in a row along the axis."""
    count, objects = sizes_NK.shape
    bounds = torch.tensor(RADIUS_BOUNDS)[sizes_NK]
    radii = bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * torch.rand(count, objects, generator=generator)
    # A row too long for the canvas (three large objects) shrinks to fit.
    room = SIDE - 2 * MARGIN - (objects - 1) * GAP
    radii = radii * (room / (2 * radii.sum(1, keepdim=True))).clamp(max=1.0)
    free = room - 2 * radii.sum(1, keepdim=True)
    spaces = 0.6 + 0.8 * torch.rand(count, objects + 1, generator=generator)
    spaces = free * spaces / spaces.sum(1, keepdim=True)
    before = torch.cat([torch.zeros(count, 1), (2 * radii + GAP).cumsum(1)[:, :-1]], 1)
    along = MARGIN + before + spaces.cumsum(1)[:, :-1] + radii
    across = SIDE / 2 + 8.0 * (torch.rand(count, objects, generator=generator) - 0.5)
    vertical = axis_N[:, None].eq(AXES.index("vertical"))
    centres = torch.stack([torch.where(vertical, across, along), torch.where(vertical, along, across)], -1)
    return radii, centres


def draw(shapes_NK: Tensor, radii_NK: Tensor, centres_NK2: Tensor, rgb_NKC: Tensor, background_NC: Tensor) -> Tensor:
    """(N, 3, 64, 64) pictures of K flat objects over a flat background; a NaN radius draws nothing."""
    pixels = torch.arange(SIDE) + 0.5
    picture = background_NC[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    for k in range(shapes_NK.shape[1]):
        x = pixels[None, None, :] - centres_NK2[:, k, 0, None, None]
        y = pixels[None, :, None] - centres_NK2[:, k, 1, None, None]
        distance = _signed_distance(shapes_NK[:, k], x, y, radii_NK[:, k, None, None])
        coverage = (0.5 - distance).clamp(0, 1).nan_to_num(0.0)[:, None]
        picture = picture + coverage * (rgb_NKC[:, k, :, None, None] - picture)
    return picture.contiguous()


def _signed_distance(shape_N: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """(N, H, W) pixels outside (positive) or inside (negative) the shape; bounding box within +-r."""
    radial = torch.sqrt(x * x + y * y)
    x, y = x.abs(), y.expand(-1, -1, SIDE)
    slanted = (2.0 * x - y - r) / 5.0**0.5  # sides of the triangle (0, -r), (+-r, r)
    by_name = {
        "circle": radial - r,
        "square": torch.maximum(x, y.abs()) - 0.88 * r,
        "triangle": torch.maximum(slanted, y - r),
        "cross": torch.maximum(torch.maximum(x, y.abs()) - r, torch.minimum(x, y.abs()) - 0.34 * r),
        "ring": (radial - 0.76 * r).abs() - 0.24 * r,
    }
    every = torch.stack([by_name[name].expand(-1, SIDE, SIDE) for name in SHAPES], 1)
    return every[torch.arange(len(shape_N)), shape_N]


def _jittered(rgb: Tensor, generator: torch.Generator) -> Tensor:
    noise = 2 * torch.rand(rgb.shape, generator=generator) - 1
    return (rgb + COLOUR_JITTER * noise).clamp(0, 1)
