# SPDX-License-Identifier: Apache-2.0
"""How large an ExecuTorch program gets, from counts."""

from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 16
KEY_BYTES = 120
"""A constant's entry: its name, which is its SHA-256 in hexadecimal, and where it lies."""
OPERATOR_BYTES = 200
LAYER_BYTES = 300
ROUNDED_CONVOLUTION_BYTES = 2200
"""A delegate of its own, with a graph, a header and padding, and the delegate around it cut in two."""
STATIC_LINEAR_BYTES, STATIC_CONVOLUTION_BYTES = 950, 2400
"""Operators that round the input and widen the output, and their steps; a convolution's channels move twice as well."""
PROGRAM_BYTES = 4096
DATA_FILE_BYTES = 1024
"""Head and padding of a file of constants."""


def constants_bytes(sizes: Iterable[int]) -> int:
    """Bytes of constants of these sizes, with what it takes to find them."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT + KEY_BYTES for size in sizes)


@dataclass(frozen=True)
class LayerCounts:
    """Layers of a program: all, convolutions that find the scale of their integer input while they run, and those of
    static steps, where a convolution of one tap is a Linear."""

    all: int
    rounded_convolutions: int
    static_linear: int
    static_convolutions: int


def graph_bytes(operators: int, layers: LayerCounts) -> int:
    """Bytes of the operators of a program, at most."""
    return (
        PROGRAM_BYTES
        + OPERATOR_BYTES * operators
        + LAYER_BYTES * layers.all
        + ROUNDED_CONVOLUTION_BYTES * layers.rounded_convolutions
        + STATIC_LINEAR_BYTES * layers.static_linear
        + STATIC_CONVOLUTION_BYTES * layers.static_convolutions
    )
