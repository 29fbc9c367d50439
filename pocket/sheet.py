# SPDX-License-Identifier: Apache-2.0
"""A sheet of generated pictures with their captions."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from .evaluate import ImagesFor
from .scenes import captions

COLUMNS, ROWS = 8, 4
ZOOM = 2
PICTURE = 64 * ZOOM
TEXT_HEIGHT, GUTTER = 58, 12


def write_sheet(images_for: ImagesFor, path: Path, seed: int) -> None:
    """Write an 8x4 sheet of the first 32 test prompts of `seed`, none of them picked by hand."""
    prompts = captions("test", COLUMNS * ROWS, seed)
    pictures = images_for(prompts, range(seed, seed + len(prompts)))
    cell = PICTURE + GUTTER, PICTURE + TEXT_HEIGHT
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GUTTER, ROWS * cell[1] + GUTTER), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        left, top = GUTTER + index % COLUMNS * cell[0], GUTTER + index // COLUMNS * cell[1]
        zoomed = Image.fromarray(picture).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
        sheet.paste(zoomed, (left, top))
        pen.rectangle((left - 1, top - 1, left + PICTURE, top + PICTURE), outline="#cccccc")
        pen.multiline_text((left, top + PICTURE + 3), textwrap.fill(prompt, 24), fill="black", font_size=10, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
