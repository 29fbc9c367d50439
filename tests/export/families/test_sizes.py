# SPDX-License-Identifier: Apache-2.0
"""Which sizes can be asked for, and what is said of those that can not, before anything is loaded or traced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.export.families.sizes import MAX_LATENT_POSITIONS, drawn_sizes, size_notes
from turbopocket.export.recipe import make_recipe, parse_recipe
from turbopocket.export.targets.side_files import write_side_files
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.image_size import ImageSize, parse_size

Run = Callable[..., Any]


@pytest.fixture
def wide(tiny_sd: Path, tmp_path: Path) -> Path:
    """A checkpoint that was trained to draw 48x32."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "wide"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": [16, 24]}))
    return folder


def test_a_model_draws_its_own_size_when_none_is_asked_for(wide: Path) -> None:
    for model in (load(str(wide)), load_shapes(str(wide))):
        assert model.image_size == drawn_sizes(model, ())[0] == (32, 48)
        assert size_notes(model, [model.image_size]) == ()


def test_asked_sizes_are_drawn_in_their_order_and_those_of_others_get_a_note(tiny_sd: Path) -> None:
    model = load_shapes(str(tiny_sd))
    sizes = [parse_size(text) for text in ("48x32", "32x32", "32x40")]
    assert list(drawn_sizes(model, sizes)) == sizes
    (note,) = size_notes(model, sizes)
    assert note.startswith("tiny_sd was trained to draw 32x32: what it draws at 48x32, 32x40 is what the float model")


@pytest.mark.parametrize(
    ("size", "near"), [("30x32", "32x32"), ("32x31", "32x32"), ("1x1", "8x8"), ("33x64", "32x64"), ("100x60", "96x64")]
)
def test_a_size_that_the_pipeline_does_not_take_is_refused_with_one_that_it_does(
    tiny_sd: Path, size: str, near: str
) -> None:
    model = load_shapes(str(tiny_sd))
    message = f"size {size}: width and height for tiny_sd are multiples of 8; {near} is near"
    with pytest.raises(TurbopocketError, match=f"^{message}$"):
        drawn_sizes(model, [parse_size(size)])
    assert drawn_sizes(model, [parse_size(near)])


def test_a_size_that_no_phone_could_draw_is_refused_with_its_memory(tiny_sd: Path) -> None:
    model = load_shapes(str(tiny_sd))
    largest = ImageSize(2 * MAX_LATENT_POSITIONS // 128, 256)
    assert drawn_sizes(model, [largest]) == (largest,)
    message = "size 264x512 has 33,792 latent positions, and attention over them 4.3 GiB of scores; at most 32,768 are"
    with pytest.raises(TurbopocketError, match=message):
        drawn_sizes(model, [largest, parse_size("264x512")])
    with pytest.raises(TurbopocketError, match="size '9999992x8': width and height are 16,384 pixels at most"):
        parse_size("9999992x8")


@pytest.mark.parametrize("size", [10**9, [10**9, 4]])
def test_a_model_whose_own_size_is_absurd_is_refused_when_it_is_planned(
    turbopocket: Run, wide: Path, size: object
) -> None:
    config = wide / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
    ran = turbopocket("plan", wide)
    assert (ran.code, ran.out) == (1, "")
    assert "whole numbers from 1 to 512 are allowed" in ran.err


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (["768"], "size '768' is not WIDTHxHEIGHT in pixels, such as 768x512"),
        (["768x512", "wide"], "size 'wide' is not WIDTHxHEIGHT"),
        (["768x0"], "size '768x0': width and height are 1 pixel or more"),
        (["768x512", "512x768", "768x512"], "size 768x512 is asked for 2 times, once is enough"),
        (["0768x512", "768x512"], "size 768x512 is asked for 2 times"),
        ([512], "image.sizes.0 = 512: input should be a valid string"),
        ("768x512", "image.sizes = '768x512': input should be a valid array"),
    ],
)
def test_a_recipe_with_wrong_sizes_is_refused(sizes: object, message: str) -> None:
    with pytest.raises(TurbopocketError, match=message):
        make_recipe({"image": {"sizes": sizes}}, "recipe.toml")


def test_sizes_are_printed_and_read_back(tmp_path: Path) -> None:
    recipe = make_recipe({"image": {"sizes": ["768x512", "512x768"]}}, "test")
    assert recipe.image.image_sizes == ((512, 768), (768, 512))
    assert parse_recipe(recipe.to_toml(), "printed") == recipe


@pytest.mark.parametrize("target", ["coreml", "executorch"])
@pytest.mark.parametrize("first", [True, False])
def test_only_onnx_takes_several_sizes_and_that_is_said_before_any_work(
    turbopocket: Run, tmp_path: Path, target: str, first: bool
) -> None:
    targets = ["--target", target, *(() if first else ("--target", "onnx"))]
    targets = targets if first else targets[2:] + targets[:2]
    sizes = ["--size", "768x512", "--size", "512x768"]
    ran = turbopocket("build", tmp_path / "not-even-there", *targets, *sizes, "--out", tmp_path / "out")
    assert ran.code == 1
    assert ran.err == (
        f"error: command line: {target} takes one size in an artifact, 2 are asked for (768x512, 512x768): build one "
        "artifact for each, or one for onnx, which takes several\n"
    )
    assert make_recipe({"target": {"name": target}, "image": {"sizes": ["768x512"]}}, "test")


def test_optimum_is_told_the_size_that_the_graphs_take(tiny_sd: Path, wide: Path, tmp_path: Path) -> None:
    def sample_size(folder: Path, size: str) -> object:
        write_side_files(load_shapes(str(folder)), ["unet"], parse_size(size), tmp_path / "out")
        return json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["sample_size"]

    assert sample_size(tiny_sd, "32x32") == 16
    assert sample_size(tiny_sd, "64x64") == 32
    assert sample_size(tiny_sd, "48x32") == [16, 24]
    assert sample_size(wide, "48x32") == [16, 24]
    assert sample_size(wide, "32x32") == 16
