# SPDX-License-Identifier: Apache-2.0
"""The judge, on the weights the package ships."""

import numpy as np
import pytest
import torch

from turbopocket.pocket.judge import JUDGE_FILE, Judge, alignment, as_pictures, features, load_judge
from turbopocket.pocket.render import draw, place, render
from turbopocket.pocket.scenes import Scene, labels_of, sample_scenes
from turbopocket.pocket.train.judge import blur

N = 400


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judge() -> Judge:
    if not JUDGE_FILE.exists():
        pytest.skip(f"{JUDGE_FILE.name} is not there; `make train-pocket` trains it")
    return load_judge()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes("test", N, seed=0)


@pytest.fixture(scope="module")
def pictures(scenes: list[Scene]) -> torch.Tensor:
    return render(scenes, generator())


def test_held_out_scenes_are_read_right(judge: Judge, scenes: list[Scene], pictures: torch.Tensor) -> None:
    result = alignment(judge, pictures, scenes)
    assert result.all_right >= 0.99
    assert min(result.by_label.values()) >= 0.99


def test_mild_blur_and_noise_do_not_mislead_it(judge: Judge, scenes: list[Scene], pictures: torch.Tensor) -> None:
    noised = (pictures + 0.04 * torch.randn(pictures.shape, generator=generator(1))).clamp(0, 1)
    assert alignment(judge, blur(pictures, 0.6), scenes).all_right >= 0.985
    assert alignment(judge, noised, scenes).all_right >= 0.985


def test_a_swapped_relation_is_caught(judge: Judge, scenes: list[Scene], pictures: torch.Tensor) -> None:
    swapped = [Scene(scene.second, scene.relation, scene.first, scene.background) for scene in scenes]
    kept = [i for i, scene in enumerate(scenes) if scene.first != scene.second]
    result = alignment(judge, pictures[kept], [swapped[i] for i in kept])
    assert result.all_right <= 0.01
    assert result.by_label["background"] >= 0.99


def test_a_wrong_background_is_caught(judge: Judge, scenes: list[Scene], pictures: torch.Tensor) -> None:
    wrong = [
        Scene(scene.first, scene.relation, scene.second, "pink" if scene.background != "pink" else "black")
        for scene in scenes
    ]
    result = alignment(judge, pictures, wrong)
    assert result.all_right <= 0.01
    assert result.by_label["background"] <= 0.01
    assert result.by_label["colour0"] >= 0.99


def test_a_missing_object_is_caught(judge: Judge, scenes: list[Scene]) -> None:
    labels = labels_of(scenes)
    shapes, colours, sizes = (labels[:, [column, column + 3]] for column in (2, 3, 4))
    radii, centres = place(sizes, labels[:, 0], generator())
    radii[:, 1] = float("nan")
    rgb = torch.rand(6, 3, generator=generator(2))[colours]
    background = torch.full((N, 3), 0.96)
    result = alignment(judge, draw(shapes, radii, centres, rgb, background), scenes)
    assert result.all_right <= 0.02
    assert result.by_label["count"] <= 0.05


def test_bytes_and_floats_of_one_picture_are_read_alike(
    judge: Judge, scenes: list[Scene], pictures: torch.Tensor
) -> None:
    array = np.round(pictures.movedim(1, -1).numpy() * 255).astype(np.uint8)
    as_floats, as_bytes = features(judge, pictures), features(judge, array)
    assert (as_floats - as_bytes).abs().max() < 0.05 * as_floats.abs().max()
    assert (alignment(judge, array, scenes).correct == alignment(judge, pictures, scenes).correct).mean() > 0.99


def test_pictures_of_another_size_or_range_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        as_pictures(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="span"):
        as_pictures(torch.full((1, 3, 64, 64), 255.0))
    with pytest.raises(ValueError, match="span"):
        as_pictures(torch.full((1, 3, 64, 64), float("nan")))


def test_alignment_needs_one_scene_per_picture(scenes: list[Scene], pictures: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="400 pictures for 399 scenes"):
        alignment(Judge(), pictures, scenes[1:])
