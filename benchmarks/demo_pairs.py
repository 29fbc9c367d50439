# SPDX-License-Identifier: Apache-2.0
"""Puts a build's picture pairs, float model left and artifact right, into one PNG for the README.

python benchmarks/demo_pairs.py build/demo.report docs/demo_pairs.png
"""

import sys
from pathlib import Path

from PIL import Image

SCALE, INSIDE_PX, BETWEEN_PX = 3, 4, 24


def pairs_sheet(pictures: Path) -> Image.Image:
    """All pairs of a report's `pictures` folder in one row, pixels enlarged."""
    pairs = [
        [Image.open(path), Image.open(path.with_name(path.name.replace(".float.", ".artifact.")))]
        for path in sorted(pictures.glob("*.float.png"))
    ]
    width, height = (SCALE * side for side in pairs[0][0].size)
    step = 2 * width + INSIDE_PX + BETWEEN_PX
    sheet = Image.new("RGB", (step * len(pairs) - BETWEEN_PX, height), "white")
    for index, pair in enumerate(pairs):
        for side, picture in enumerate(pair):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (index * step + side * (width + INSIDE_PX), 0))
    return sheet


if __name__ == "__main__":
    pairs_sheet(Path(sys.argv[1]) / "pictures").save(sys.argv[2], optimize=True)
