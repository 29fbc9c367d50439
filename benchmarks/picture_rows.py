# SPDX-License-Identifier: Apache-2.0
"""A sheet with one row of pictures per model, so that models can be compared prompt by prompt."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

ZOOM, GUTTER, LABEL_PX, HEADER_PX = 2, 6, 150, 58


def write_rows(rows: Mapping[str, Tensor], prompts: Sequence[str], path: Path) -> None:
    """Writes a PNG: `rows` are (N, 3, H, W) uint8 pictures of the N prompts, by the name that stands before the row."""
    side = ZOOM * next(iter(rows.values())).shape[-1]
    step = side + GUTTER
    size = LABEL_PX + step * len(prompts), HEADER_PX + step * len(rows)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        pen.multiline_text((LABEL_PX + column * step, 4), textwrap.fill(prompt, 24), fill="black", font_size=10)
    for row, (name, pictures) in enumerate(rows.items()):
        top = HEADER_PX + row * step
        pen.multiline_text((6, top + side // 2 - 14), textwrap.fill(name, 22), fill="black", font_size=12)
        for column, picture in enumerate(pictures):
            drawn = Image.fromarray(picture.permute(1, 2, 0).numpy())
            sheet.paste(drawn.resize((side, side), Image.Resampling.NEAREST), (LABEL_PX + column * step, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
