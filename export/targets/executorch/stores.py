# SPDX-License-Identifier: Apache-2.0
"""Which format fits which kind of layer on this target."""

from ....quant.formats import Additive, Affine, Codebook, CompressedTensor, Dense
from ....quant.scheme import Scheme
from ..layer import Layer, Stores, kind_of
from .codebook import CodebookConv2dForm, CodebookLinearForm
from .dense import DenseConv2d, DenseLinear
from .form import FormOptions, ProgramForm
from .integer import IntegerConv2dForm, IntegerLinearForm

STORES: Stores[ProgramForm] = Stores(
    "ExecuTorch",
    {
        (Dense, "linear"): DenseLinear,
        (Dense, "conv2d"): DenseConv2d,
        (Affine, "linear"): IntegerLinearForm,
        (Affine, "conv2d"): IntegerConv2dForm,
        (Codebook, "linear"): CodebookLinearForm,
        (Codebook, "conv2d"): CodebookConv2dForm,
        (Additive, "linear"): CodebookLinearForm,
        (Additive, "conv2d"): CodebookConv2dForm,
    },
)
"""What runs each: XNNPACK, or for codebooks operators of PyTorch's or ours."""


def form_of_weight(name: str, weight: CompressedTensor) -> ProgramForm:
    """The form of a layer that is known by its stored weight alone, and how that is held; TurbopocketError if none.

    Constants do not depend on how activations are rounded.
    """
    layer = Layer(name, kind_of(weight.shape), weight.shape)
    return STORES.form_of(layer, Scheme(weight.format), FormOptions())
