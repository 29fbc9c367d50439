# SPDX-License-Identifier: Apache-2.0
"""Which families there are."""

from .base import ModelFamily
from .flux2 import FLUX2_KLEIN
from .pixart import PIXART_ALPHA, PIXART_SIGMA
from .sd import SD
from .sdxl import SDXL

FAMILIES: dict[str, ModelFamily] = {
    family.name: family for family in (SDXL, SD, PIXART_ALPHA, PIXART_SIGMA, FLUX2_KLEIN)
}
"""Every family by its name."""


def all_folders() -> frozenset[str]:
    """Returns the names of all folders that a checkpoint of any family holds."""
    return frozenset(folder for family in FAMILIES.values() for folder in family.folders)
