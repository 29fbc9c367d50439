# SPDX-License-Identifier: Apache-2.0
"""How large an ExecuTorch program gets, from counts."""

from collections.abc import Iterable

ALIGNMENT = 16
KEY_BYTES = 120
"""A constant's entry: its name, which is its SHA-256 in hexadecimal, and where it lies."""
OPERATOR_BYTES = 200
LAYER_BYTES = 300
ROUNDED_CONVOLUTION_BYTES = 2200
"""A delegate of its own, with a graph, a header and padding, and the delegate around it cut in two."""
PROGRAM_BYTES = 4096


def constants_bytes(sizes: Iterable[int]) -> int:
    """Bytes of constants of these sizes, with what it takes to find them."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT + KEY_BYTES for size in sizes)


def graph_bytes(operators: int, layers: int, rounded_convolutions: int) -> int:
    """Bytes of the operators of a program, at most; `rounded_convolutions` are those whose inputs are integers."""
    delegates = ROUNDED_CONVOLUTION_BYTES * rounded_convolutions
    return PROGRAM_BYTES + OPERATOR_BYTES * operators + LAYER_BYTES * layers + delegates
