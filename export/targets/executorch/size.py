# SPDX-License-Identifier: Apache-2.0
"""How large an ExecuTorch program gets, from counts that hold for whole programs.

Found by `benchmarks/executorch_sizes.py` (ExecuTorch 1.5.1; layers of width 64 between norms): what one layer more adds
beside its constants. What is counted for it is its own figure below and OPERATOR_BYTES. That is too little for integer
layers whose scales are found while they run (752, and 1261 for a convolution of 1x1) and for a convolution by our
kernel; PROGRAM_BYTES and the operators around them, for which too much is counted, have made up for it so far.
"""

from collections.abc import Iterable

ALIGNMENT = 16
KEY_BYTES = 120
"""A constant's entry: its name, which is its SHA-256 in hexadecimal, and where it lies."""
PLACE_BYTES = 16
"""The entry of a constant that is not XNNPACK's: where it lies."""
OPERATOR_BYTES = 200
"""An operator of PyTorch's graph."""
LAYER_BYTES = 300
"""Found: 488 for a Linear in fp32."""
ROUNDED_CONVOLUTION_BYTES = 2200
"""A delegate of its own, with a graph, a header and padding, and the delegate around it cut in two. Found: 1731."""
DENSE_CONVOLUTION_BYTES = 800
"""Between two GroupNorms, which XNNPACK leaves out, it is a delegate of its own as well, with a smaller graph. Found:
891."""
STATIC_LINEAR_BYTES, STATIC_CONVOLUTION_BYTES = 950, 2400
"""Operators that round the input and widen the output, and their steps; a convolution's channels move twice as well.
Found: 1392 and 1773."""
STATIC_POINTWISE_BYTES = 1500
"""A convolution of 1x1, which runs as a Linear between transpositions. Counted as a Linear, a program of one Linear,
one convolution of 3x3 and one of 1x1 came out 120 bytes larger than planned."""
PROGRAM_BYTES = 4096
"""Head, tables and padding of the file."""
KERNEL_BYTES = 350
"""A call of our kernel, and the delegate around it cut in two. Found: 237 for a Linear, 643 for a convolution."""
VECTORS_BYTES, BOOK_BYTES, TAP_BYTES = 2550, 1100, 320
"""Operators that look a layer's vectors up and the delegate that multiplies; more for each codebook, and for each tap
of a convolution of several. Found: 3611 and 5872 for a Linear of one and three codebooks, 6336 and 7488 for a 3x3
convolution of one and two."""
DATA_FILE_BYTES = 1024
"""Head and padding of a file of constants."""


def constants_bytes(sizes: Iterable[int], find_bytes: int = KEY_BYTES) -> int:
    """Bytes of constants of these sizes, with what it takes to find each; XNNPACK's by default."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT + find_bytes for size in sizes)
