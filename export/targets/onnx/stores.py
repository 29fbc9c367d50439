# SPDX-License-Identifier: Apache-2.0
"""Which format fits which kind of layer on this target: the `STORES` table."""

from collections.abc import Mapping

from ....ground.errors import TurbopocketError
from ....quant.formats import Additive, Affine, Codebook, Dense, LayerFormat
from .codebook import CodebookConv2d, CodebookLinear
from .dense import DenseConv2d, DenseLinear
from .form import Form, Kind, Layer
from .integer import DequantizedConv2d, MatMulNBits

STORES: Mapping[tuple[type[LayerFormat], Kind], type[Form]] = {
    (Dense, "linear"): DenseLinear,
    (Dense, "conv2d"): DenseConv2d,
    (Affine, "linear"): MatMulNBits,
    (Affine, "conv2d"): DequantizedConv2d,
    (Codebook, "linear"): CodebookLinear,
    (Codebook, "conv2d"): CodebookConv2d,
    (Additive, "linear"): CodebookLinear,
    (Additive, "conv2d"): CodebookConv2d,
}
"""What this target stores natively. A format that is not here has no compressed form in ONNX."""


def storable(format: LayerFormat, kind: Kind, shape: tuple[int, ...]) -> str | None:
    """None when this target keeps a layer of this kind and shape compressed in that format, else the reason."""
    form = STORES.get((type(format), kind))
    if form is None:
        return f"ONNX has no compressed {kind} for {format}"
    return format.fits(shape) or form.refusal(format, shape)


def form_of(layer: Layer, format: LayerFormat, accuracy_level: int) -> Form:
    """The layer's form in that format. Raises TurbopocketError with `storable`'s reason when there is none."""
    reason = storable(format, layer.kind, layer.shape)
    if reason is not None:
        raise TurbopocketError(f"{layer.name}: {reason}")
    return STORES[type(format), layer.kind](layer, format, accuracy_level)
