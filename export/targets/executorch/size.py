# SPDX-License-Identifier: Apache-2.0
"""How large an ExecuTorch program gets, from counts."""

from collections.abc import Iterable

ALIGNMENT = 16
KEY_BYTES = 120
"""A constant's entry: its name, which is its SHA-256 in hexadecimal, and where it lies."""
PLACE_BYTES = 16
"""The entry of a constant that is not XNNPACK's: where it lies."""
OPERATOR_BYTES = 200
LAYER_BYTES = 300
ROUNDED_CONVOLUTION_BYTES = 2200
"""A delegate of its own, with a graph, a header and padding, and the delegate around it cut in two."""
DENSE_CONVOLUTION_BYTES = 800
"""Between two GroupNorms, which XNNPACK leaves out, it is a delegate of its own as well, with a smaller graph."""
STATIC_LINEAR_BYTES, STATIC_CONVOLUTION_BYTES = 950, 2400
"""Operators that round the input and widen the output, and their steps; a convolution's channels move twice as well."""
PROGRAM_BYTES = 4096
KERNEL_BYTES = 350
"""A call of our kernel, and the delegate around it cut in two."""
VECTORS_BYTES, BOOK_BYTES, TAP_BYTES = 2550, 1100, 320
"""Operators that look a layer's vectors up and the delegate that multiplies; more for each codebook, and for each tap
of a convolution of several."""
DATA_FILE_BYTES = 1024
"""Head and padding of a file of constants."""


def constants_bytes(sizes: Iterable[int], find_bytes: int = KEY_BYTES) -> int:
    """Bytes of constants of these sizes, with what it takes to find each; XNNPACK's by default."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT + find_bytes for size in sizes)
