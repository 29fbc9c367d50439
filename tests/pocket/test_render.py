# SPDX-License-Identifier: Apache-2.0
"""Pictures of scenes."""

import pytest
import torch

from turbopocket.pocket.render import BACKGROUND_RGB, COLOUR_RGB, GAP, MARGIN, SIDE, draw, place, render
from turbopocket.pocket.scenes import SHAPES, parse_caption, sample_scenes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("objects", [2, 3])
def test_objects_never_leave_the_canvas_and_never_touch(objects: int) -> None:
    sizes = torch.randint(2, (2000, objects), generator=generator())
    axis = torch.randint(2, (2000,), generator=generator(1))
    radii, centres = place(sizes, axis, generator(2))
    reach = radii[..., None]
    assert (centres - reach).min() >= MARGIN - 1e-3
    assert (centres + reach).max() <= SIDE - MARGIN + 1e-3
    rows = torch.arange(2000)
    along = torch.stack([centres[rows, k, axis] for k in range(objects)], 1)
    gaps = along.diff(dim=1) - radii[:, 1:] - radii[:, :-1]
    assert gaps.min() >= GAP - 1e-3


def test_the_canvas_border_is_background_in_every_picture() -> None:
    pictures = render(sample_scenes("train", 200, seed=0), generator())
    corner = pictures[:, :, :1, :1]
    assert torch.equal(pictures[:, :, 0, :], corner[..., 0].expand(-1, -1, SIDE))
    assert torch.equal(pictures[:, :, :, -1], corner[..., 0].expand(-1, -1, SIDE))


def test_the_same_seed_draws_the_same_pictures_and_another_seed_others() -> None:
    scenes = sample_scenes("train", 8, seed=0)
    assert torch.equal(render(scenes, generator(5)), render(scenes, generator(5)))
    assert not torch.equal(render(scenes, generator(5)), render(scenes, generator(6)))


def test_the_named_colours_stand_where_the_caption_says() -> None:
    scene = parse_caption("a large red square left of a large blue square on a black background")
    picture = render([scene], generator())[0]
    left, right = picture[:, 32, 16], picture[:, 32, 48]
    assert (left - COLOUR_RGB[0]).abs().max() < 0.05
    assert (right - COLOUR_RGB[2]).abs().max() < 0.05
    assert (picture[:, 0, 0] - BACKGROUND_RGB[1]).abs().max() < 0.05


def test_shapes_cover_the_area_geometry_gives_them() -> None:
    r = 12.0
    area = {
        "circle": torch.pi * r**2,
        "square": (2 * 0.88 * r) ** 2,
        "triangle": 2 * r * r,
        "cross": 4 * 0.34 * r * (2 * r) - (2 * 0.34 * r) ** 2,
        "ring": torch.pi * r**2 * (1 - 0.52**2),
    }
    count = len(SHAPES)
    shapes = torch.arange(count)[:, None]
    white, black = torch.ones(count, 1, 3), torch.zeros(count, 3)
    pictures = draw(shapes, torch.full((count, 1), r), torch.full((count, 1, 2), SIDE / 2), white, black)
    for index, name in enumerate(SHAPES):
        assert float(pictures[index, 0].sum()) == pytest.approx(float(area[name]), rel=0.02), name


def test_an_object_without_radius_is_not_drawn() -> None:
    nothing = torch.full((1, 1), float("nan"))
    picture = draw(
        torch.zeros(1, 1, dtype=torch.int64),
        nothing,
        torch.full((1, 1, 2), 32.0),
        torch.ones(1, 1, 3),
        torch.zeros(1, 3),
    )
    assert picture.abs().max() == 0
