# SPDX-License-Identifier: Apache-2.0
"""What a build leaves beside its artifact, for `plan --measured` and `check` to read."""

from collections.abc import Mapping
from pathlib import Path

from ...ground.files import write_whole
from ...quant.formats import CompressedTensor
from ...quant.plan import LayerChoices
from ...quant.ranges import Ranges, save_ranges
from ...quant.sensitivity import save_choices
from ...quant.store import save_weights
from .names import CHOICES_FILE, RANGES_FILE, RECIPE_FILE, WEIGHTS_FILE


def keep(
    report: Path,
    choices: Mapping[str, LayerChoices],
    ranges: Mapping[str, Ranges],
    stored: Mapping[str, CompressedTensor],
    recipe: str,
) -> None:
    """Writes the measured losses, what every layer saw, the stored weights as PyTorch reads them, and the recipe with
    the places of the model."""
    with write_whole(report / RECIPE_FILE) as file:
        file.write_text(recipe, encoding="utf-8")
    save_choices(report / CHOICES_FILE, choices)
    save_ranges(report / RANGES_FILE, ranges)
    save_weights(report / WEIGHTS_FILE, stored)
