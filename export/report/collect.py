# SPDX-License-Identifier: Apache-2.0
"""What a report shows, taken from a finished build."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...quant.plan import Plan
from ..verify.gaps import Pictures
from .page import DrawnPicture, TradeoffPoint


def tradeoff_points(plans: Sequence[Plan]) -> tuple[TradeoffPoint, ...]:
    """Returns the report's curve."""
    return tuple(TradeoffPoint(plan.budget_bytes or 0, plan.total_bytes, plan.predicted_loss) for plan in plans)


def drawn_pictures(prompts: Sequence[str], pictures: Pictures) -> tuple[DrawnPicture, ...]:
    """Returns the pictures as PNG files in memory, three a prompt."""
    drawn = zip(prompts, pictures.float_model, pictures.stored, pictures.artifact, strict=True)
    return tuple(DrawnPicture(prompt, *(png_bytes(picture) for picture in three)) for prompt, *three in drawn)


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """Returns a uint8 [H, W, 3] picture as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG")
    return data.getvalue()
