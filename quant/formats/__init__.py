# SPDX-License-Identifier: Apache-2.0
"""Weight formats as values: `parse_format("int4-g32").nbytes((320, 320))`."""

from ..names import format_of
from .additive import Additive
from .affine import Affine
from .base import CompressedTensor, LayerFormat, PartSpec, from_matrix_view, matrix_shape, matrix_view
from .codebook import Codebook
from .dense import Dense
from .palette import Palette

FORMATS: tuple[type[LayerFormat], ...] = (Dense, Affine, Palette, Codebook, Additive)
"""Every kind of format: the planner, the contract tests and `parse_format` know formats only through this."""

__all__ = [
    "FORMATS",
    "Additive",
    "Affine",
    "Codebook",
    "CompressedTensor",
    "Dense",
    "LayerFormat",
    "Palette",
    "PartSpec",
    "from_matrix_view",
    "matrix_shape",
    "matrix_view",
    "parse_format",
]


def parse_format(text: str) -> LayerFormat:
    """The format of that name, the inverse of `str(format)`; TurbopocketError listing the legal names."""
    return format_of(text, FORMATS)
