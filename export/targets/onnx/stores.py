# SPDX-License-Identifier: Apache-2.0
"""Which format fits which kind of layer on this target."""

from ....quant.formats import Additive, Affine, Codebook, Dense
from ..layer import Stores
from .codebook import CodebookConv2d, CodebookLinear
from .dense import DenseConv2d, DenseLinear
from .form import Form
from .integer import DequantizedConv2d, MatMulNBits
from .rounding import IntegerConv2d, IntegerLinear

STORES: Stores[Form] = Stores(
    "ONNX",
    {
        (Dense, "linear"): DenseLinear,
        (Dense, "conv2d"): DenseConv2d,
        (Affine, "linear"): MatMulNBits,
        (Affine, "conv2d"): DequantizedConv2d,
        (Codebook, "linear"): CodebookLinear,
        (Codebook, "conv2d"): CodebookConv2d,
        (Additive, "linear"): CodebookLinear,
        (Additive, "conv2d"): CodebookConv2d,
    },
    {(Affine, "linear"): IntegerLinear, (Affine, "conv2d"): IntegerConv2d},
)
