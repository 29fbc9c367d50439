# SPDX-License-Identifier: Apache-2.0
"""How large an ExecuTorch program gets, from counts."""

from collections.abc import Iterable

ALIGNMENT = 16
KEY_BYTES = 120
"""A constant's entry: its name, which is its SHA-256 in hexadecimal, and where it lies."""
OPERATOR_BYTES = 180
LAYER_BYTES = 300
PROGRAM_BYTES = 4096


def constants_bytes(sizes: Iterable[int]) -> int:
    """Bytes of constants of these sizes, with what it takes to find them."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT + KEY_BYTES for size in sizes)


def graph_bytes(operators: int, layers: int) -> int:
    """Bytes of the operators of a program, at most."""
    return PROGRAM_BYTES + OPERATOR_BYTES * operators + LAYER_BYTES * layers
