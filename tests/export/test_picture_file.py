# SPDX-License-Identifier: Apache-2.0
"""Picture files of all kinds: pixels as diffusers would have them, or one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbopocket.export.picture_file import read_picture
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.image_size import ImageSize

SIZE = ImageSize(40, 60)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
ORIENTATION, QUARTER_LEFT = 0x0112, 6


@pytest.mark.parametrize("size", [(40, 60), (24, 32), (64, 32), (17, 90)], ids=str)
def test_sizes_are_filled_as_diffusers_fills_them(size: tuple[int, int], tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    PICTURE.save(tmp_path / "a.png")
    height, width = size
    processor = VaeImageProcessor(vae_scale_factor=1)
    expected = processor.preprocess(PICTURE, height, width, resize_mode="crop")[0].permute(1, 2, 0).numpy()
    found = read_picture(tmp_path / "a.png", ImageSize(height, width))
    np.testing.assert_allclose(found.astype(np.float32) / 255 * 2 - 1, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.gif"])
def test_files_that_lose_nothing_give_their_pixels(name: str, tmp_path: Path) -> None:
    few_colours = Image.fromarray(PIXELS // 128 * 128)
    few_colours.save(tmp_path / name, **{"lossless": True} if name.endswith("webp") else {})
    assert np.array_equal(read_picture(tmp_path / name, SIZE), np.asarray(few_colours))


def test_transparent_pictures_lie_on_white(tmp_path: Path) -> None:
    over = PICTURE.convert("RGBA")
    over.putalpha(Image.fromarray(np.repeat([[0, 255]], 30, axis=1).repeat(40, axis=0).astype(np.uint8)))
    over.save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png", SIZE)
    assert (found[:, :30] == 255).all()
    assert np.array_equal(found[:, 30:], PIXELS[:, 30:])


def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256 + 77).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png", SIZE)
    assert np.array_equal(found, np.repeat(PIXELS[..., :1], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "YCbCr"])
def test_other_colours_become_red_green_and_blue(mode: str, tmp_path: Path) -> None:
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    PICTURE.convert(mode).save(tmp_path / name)
    expected = PICTURE.convert(mode).convert("RGB")
    assert np.abs(read_picture(tmp_path / name, SIZE).astype(int) - np.asarray(expected)).max() <= 2


def test_pictures_are_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_LEFT
    PICTURE.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png", ImageSize(60, 40)), np.rot90(PIXELS, -1))


def test_the_first_of_a_cameras_pictures_is_read(tmp_path: Path) -> None:
    black, white = (Image.new("RGB", (60, 40), colour) for colour in ("black", "white"))
    black.save(tmp_path / "a.mpo", format="MPO", save_all=True, append_images=[white])
    assert read_picture(tmp_path / "a.mpo", SIZE).max() < 5


def _text(path: Path) -> None:
    path.write_text("no picture")


def _cut_off(path: Path) -> None:
    PICTURE.save(path)
    path.write_bytes(path.read_bytes()[:3000])


def _script(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def _animation(path: Path) -> None:
    PICTURE.save(path, save_all=True, append_images=[PICTURE.rotate(90)])


def _floats(path: Path) -> None:
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(path, format="TIFF")


def _bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


def _large(path: Path) -> None:
    Image.new("1", (16_384, 8_193)).save(path)


def _narrow(path: Path) -> None:
    Image.new("1", (100_000, 1)).save(path)


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (_folder, "is not a plain file"),
        (_text, "is no picture of a kind that is read: PNG, JPEG, WEBP, TIFF, BMP, GIF"),
        (_script, "is no picture of a kind that is read"),
        (_cut_off, "can not be read: image file is truncated"),
        (_animation, "holds several pictures, as animations do; one is needed"),
        (_floats, "has pixels of mode F; colours or greys of 8 or 16 bits are read"),
        (_bomb, "has more than the 134,217,728 pixels that are read"),
        (_large, "is 16384 x 8193, more than the 134,217,728 pixels that are read"),
        (_narrow, "is 100000 x 1, too narrow to fill 60x40: that would scale it to 4000000 x 40"),
    ],
)
def test_what_is_no_usable_picture_is_one_sentence(make: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(TurbopocketError) as caught:
        read_picture(path, SIZE)
    assert str(caught.value).startswith(f"image {path} {says}")
