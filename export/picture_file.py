# SPDX-License-Identifier: Apache-2.0
"""A user's picture file as pixels: any size, any of the usual kinds, one clear sentence for all others; and files of
pictures that were drawn."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..ground.errors import TurbopocketError
from ..runtimes.image_size import ImageSize

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
"""Pillow reads more, some of them by starting other programs."""
MAX_PIXELS = 2**27
"""Of a file, such as 16,384 x 8,192: 400 MB while it is read."""
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
NO_PIXELS = ("I", "F", "LAB")
"""Pillow's modes whose numbers have no agreed range, or no way to red, green and blue."""
SEVERAL_VIEWS = "MPO"
"""What cameras write: a JPEG of the picture, and more behind it."""
WRITTEN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
"""Suffix of a file to its kind and how Pillow is to write it: JPEG loses something, the others nothing."""


def kind_of(path: Path) -> str:
    """Returns the suffix that says what kind of file is to be written. Raises TurbopocketError for any other."""
    suffix = path.suffix.lower()
    if suffix not in WRITTEN:
        raise TurbopocketError(f"output {path} is of no kind that is written: known are {', '.join(WRITTEN)}")
    return suffix


def file_bytes(image: Image.Image, kind: str) -> bytes:
    """Returns the file of a picture; `kind` is what `kind_of` gives."""
    name, options = WRITTEN[kind]
    data = io.BytesIO()
    image.save(data, format=name, **options)
    return data.getvalue()


def read_picture(path: Path, size: ImageSize) -> NDArray[np.uint8]:
    """Returns the picture in a file as red, green and blue, uint8 [H, W, 3], of the given size.

    It is turned as its EXIF says and laid on white where it is transparent; then its middle is scaled to fill the size
    (Lanczos), as diffusers' VaeImageProcessor does with `resize_mode="crop"`. Of 16 bits the upper eight are kept.
    Raises TurbopocketError for a file that is absent, no picture, damaged, an animation, too large, or of a kind
    without such colours.
    """
    if path.exists() and not path.is_file():
        raise TurbopocketError(f"image {path} is not a plain file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about sizes and metadata
            with Image.open(path, formats=FORMATS) as image:
                _require_usable(image, path)
                pixels = _red_green_blue(ImageOps.exif_transpose(image))
    except TurbopocketError:
        raise
    except UnidentifiedImageError:
        raise TurbopocketError(f"image {path} is no picture of a kind that is read: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise TurbopocketError(f"image {path} has more than the {MAX_PIXELS:,} pixels that are read") from None
    except FileNotFoundError:
        raise TurbopocketError(f"image {path} does not exist") from None
    except Exception as error:  # Pillow's readers raise of all kinds for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TurbopocketError(f"image {path} can not be read: {reason.rstrip('.') or type(error).__name__}") from error
    return np.asarray(_filling(pixels, size, path))


def _require_usable(image: Image.Image, path: Path) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise TurbopocketError(
            f"image {path} is {image.width} x {image.height}, more than the {MAX_PIXELS:,} pixels that are read"
        )
    if getattr(image, "is_animated", False) and image.format != SEVERAL_VIEWS:
        raise TurbopocketError(f"image {path} holds several pictures, as animations do; one is needed")
    if image.mode in NO_PIXELS:
        raise TurbopocketError(
            f"image {path} has pixels of mode {image.mode}; colours or greys of 8 or 16 bits are read"
        )


def _red_green_blue(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BITS:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _filling(image: Image.Image, size: ImageSize, path: Path) -> Image.Image:
    """The middle of the picture, scaled to the size with its proportions kept."""
    height, width = size
    wide: Any = image.width * height > image.height * width
    scaled_width = image.width * height // image.height if wide else width
    scaled_height = height if wide else image.height * width // image.width
    if scaled_width * scaled_height > MAX_PIXELS:
        raise TurbopocketError(
            f"image {path} is {image.width} x {image.height}, too narrow to fill {size}: that would scale it to "
            f"{scaled_width} x {scaled_height}"
        )
    scaled = image.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    left, top = scaled_width // 2 - width // 2, scaled_height // 2 - height // 2
    return scaled.crop((left, top, left + width, top + height))
