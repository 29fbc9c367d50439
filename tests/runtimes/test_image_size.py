# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them, and what an artifact says of those that it draws."""

import json
from pathlib import Path
from typing import Any

import pytest

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.image_size import ImageSize, parse_size
from turbopocket.runtimes.manifest import Manifest, load_manifest, write_manifest

from .test_manifest import rewrite


def test_width_comes_first_in_text_and_height_in_data() -> None:
    assert parse_size("768x512") == (512, 768)
    assert str(ImageSize(height=512, width=768)) == "768x512"


@pytest.mark.parametrize(
    "text",
    ["", "768", "x", "768x", "x512", "768×512", "768X512", "768 x 512", "768x512x3", "-768x512", "768.0x512", "1e3x8",
     "٧٦٨x٥١٢", "9" * 5000 + "x8", "768x512\n", "[768, 512]", "big"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(TurbopocketError) as caught:
        parse_size(text)
    assert str(caught.value) == f"size {text!r} is not WIDTHxHEIGHT in pixels, such as 768x512"


@pytest.mark.parametrize("text", ["0x512", "768x0", "00x8"])
def test_a_size_without_pixels_is_refused(text: str) -> None:
    with pytest.raises(TurbopocketError, match=f"size '{text}': width and height are 1 pixel or more"):
        parse_size(text)


@pytest.fixture
def of_two_sizes(toy_artifact: Path) -> Manifest:
    rewrite(toy_artifact, lambda found: found.update(sizes=[[12, 12], [12, 20]]))
    return load_manifest(toy_artifact)


def test_an_artifact_draws_the_sizes_it_lists_and_no_other(of_two_sizes: Manifest) -> None:
    image = of_two_sizes.at_size(ImageSize(12, 20)).image
    assert (image.height, image.width, image.latent_height, image.latent_width) == (12, 20, 6, 10)
    assert of_two_sizes.at_size(ImageSize(12, 12)) == of_two_sizes
    with pytest.raises(
        TurbopocketError, match="toy was asked for 12x20, this artifact was built for 12x12, 20x12"
    ) as no:
        of_two_sizes.at_size(ImageSize(20, 12))
    assert no.value.hint == "build another with --size 12x20"


def test_pictures_of_several_sizes_take_turns(of_two_sizes: Manifest) -> None:
    sizes = [of_two_sizes.of_picture(index).image.size for index in range(3)]
    assert sizes == [(12, 12), (12, 20), (12, 12)]


def test_an_artifact_from_before_there_were_sizes_draws_its_one(tmp_path: Path) -> None:
    values = json.loads((Path(__file__).parents[1] / "golden" / "manifest-1-sdxl.json").read_text())
    del values["sizes"]
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    assert load_manifest(tmp_path).sizes == [(values["image"]["height"], values["image"]["width"])]


def test_sizes_are_written_as_height_and_width(of_two_sizes: Manifest, tmp_path: Path) -> None:
    assert '"sizes":[[12,12],[12,20]]' in "".join(write_manifest(tmp_path, of_two_sizes).read_text().split())
    assert load_manifest(tmp_path) == of_two_sizes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "sizes: List should have at least 1 item"),
        ([[12, 20]], "sizes begins with 20x12, image is 12x12"),
        ([[12, 12], [12, 20], [12, 20]], "sizes lists 12x12, 20x12, 20x12: one of them twice"),
        ([[12, 12], [13, 12]], "sizes lists 12x13: a latent position has 2x2 pixels"),
        ([[12, 12], [-12, 12]], "sizes lists 12x-12"),
        ([[12, 12], [12]], r"sizes\.1\.1: Field required"),
        (12, "sizes: Input should be a valid array"),
    ],
)
def test_sizes_that_contradict_the_image_are_refused(toy_artifact: Path, sizes: Any, message: str) -> None:
    rewrite(toy_artifact, lambda found: found.update(sizes=sizes))
    with pytest.raises(TurbopocketError, match=message):
        load_manifest(toy_artifact)


def test_latents_that_do_not_cover_the_picture_are_refused(toy_artifact: Path) -> None:
    rewrite(toy_artifact, lambda found: found["image"].update(latent_width=5))
    with pytest.raises(
        TurbopocketError, match="a picture of 12x12 has no whole pixels for each of 5x6 latent positions"
    ):
        load_manifest(toy_artifact)
