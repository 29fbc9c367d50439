# SPDX-License-Identifier: Apache-2.0
"""The size of a picture: [height, width] in data, as tensors have it, and WIDTHxHEIGHT in text, as people write it."""

import re
from typing import NamedTuple

from ..ground.errors import TurbopocketError

MOST_PIXELS_ASIDE = 16_384
"""Of a picture: four times what published models draw at most."""
_TEXT = re.compile(r"([0-9]{1,7})x([0-9]{1,7})")


class ImageSize(NamedTuple):
    """Pixels of a picture, or positions of its latents; `str` gives WIDTHxHEIGHT."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_size(text: str) -> ImageSize:
    """The size that a text such as `768x512` says: 768 pixels wide, 512 high. Raises TurbopocketError for any other."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise TurbopocketError(f"size {text!r} is not WIDTHxHEIGHT in pixels, such as 768x512")
    width, height = int(match[1]), int(match[2])
    if width == 0 or height == 0:
        raise TurbopocketError(f"size {text!r}: width and height are 1 pixel or more")
    if max(width, height) > MOST_PIXELS_ASIDE:
        raise TurbopocketError(f"size {text!r}: width and height are {MOST_PIXELS_ASIDE:,} pixels at most")
    return ImageSize(height, width)
