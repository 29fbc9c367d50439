# SPDX-License-Identifier: Apache-2.0
"""Which format fits which kind of layer on this target, and what of a weight a program must then hold."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ....quant.formats import Additive, Affine, Codebook, Dense, LayerFormat
from ....quant.formats.base import CompressedTensor, matrix_view

Kind = Literal["linear", "conv2d"]

CODEBOOK_OPERATORS: Mapping[Kind, str] = {
    "linear": "embedding and bmm, or turbopocket::codebook_linear (`codebooks` of a recipe)",
    "conv2d": "embedding and bmm, or turbopocket::codebook_conv2d (`codebooks` of a recipe)",
}
CODE_BITS = 8
STORES: Mapping[tuple[type[LayerFormat], Kind], str] = {
    (Dense, "linear"): "fully connected f32",
    (Dense, "conv2d"): "convolution f32",
    (Affine, "linear"): "fully connected qd8: activations are rounded to int8 row by row while it runs",
    (Affine, "conv2d"): "convolution qd8: activations are rounded to int8 per picture, of 1x1 per pixel, while it runs",
    **{(form, kind): CODEBOOK_OPERATORS[kind] for form in (Additive, Codebook) for kind in ("linear", "conv2d")},
}
"""What runs each, where XNNPACK's steps are not static. A format that is not here has no compressed form."""

GROUP_MULTIPLE = 32
GROUP_SCALE_DIGITS = 8
"""XNNPACK keeps the scale of a group as bfloat16."""


def storable(format: LayerFormat, kind: Kind, shape: tuple[int, ...]) -> str | None:
    """None when XNNPACK keeps a layer of this kind and shape compressed in that format, else the reason."""
    if (type(format), kind) not in STORES:
        return "XNNPACK has no lookup tables for single weights"
    return format.fits(shape) or _refusal(format, kind, shape)


def is_codebook(format: LayerFormat) -> bool:
    """Whether weights are vectors of codebooks, which XNNPACK does not know."""
    return isinstance(format, Additive | Codebook)


def may_be_static(format: LayerFormat) -> bool:
    """Whether XNNPACK multiplies it with integers whose steps are constants: it has no such 4-bit operators."""
    return isinstance(format, Affine) and format.bits == 8


def _refusal(format: LayerFormat, kind: Kind, shape: tuple[int, ...]) -> str | None:
    if isinstance(format, Dense):
        return None if format.bits == 32 else f"XNNPACK would widen {format} to fp32 for fp32 activations"
    if isinstance(format, Additive | Codebook):
        return _codebook_refusal(format)
    assert isinstance(format, Affine)
    if not format.symmetric:
        return f"XNNPACK's integer weights have no zero point, {format} does"
    if format.bits == 8:
        return f"XNNPACK has groups of scales for 4 bits only, not {format}" if format.group else None
    if kind == "conv2d" and math.prod(shape[2:]) != 1:
        return "XNNPACK has 8 bits for convolutions, 4 only for those of 1x1, which are Linear"
    if shape[1] % 2:
        return f"XNNPACK's 4-bit weights have an even number of columns, not {shape[1]}"
    if format.group and format.group % GROUP_MULTIPLE:
        return f"XNNPACK's groups are multiples of {GROUP_MULTIPLE} columns, not {format.group}"
    return None


def _codebook_refusal(format: Additive | Codebook) -> str | None:
    if format.bits != CODE_BITS:
        return f"ExecuTorch reads codes of {CODE_BITS} bits, {format} has {format.bits}"
    if isinstance(format, Codebook) and (format.along_outputs or format.rows is not None):
        return f"ExecuTorch reads one codebook of vectors along the inputs, not {format}"
    return None


def constants_of(weight: CompressedTensor) -> list[Tensor]:
    """The tensors that a program holds for a weight, byte for byte: codes and scales, or the dense weight.

    Rows are outputs and columns in (kh, kw, I) order, as in the matrix view; 4-bit codes are two a byte, the
    earlier column low, counted from -8; the scale of a row is float32, that of a group bfloat16. Of codebooks: codes
    uint8 [O, J, M], the codes of a vector side by side, codebooks fp16 [M, P, D] and scale fp16 [O].
    """
    if isinstance(weight.format, Additive | Codebook):
        codes, codebooks_MPD, scale_O = weight.format.unpack(weight)
        codes_MOJ = codes.unbind() if isinstance(weight.format, Additive) else (codes,)
        return [torch.stack(codes_MOJ, -1), codebooks_MPD.contiguous(), scale_O.contiguous()]
    if isinstance(weight.format, Dense):
        return [matrix_view(weight.parts["weight"]).contiguous()]
    assert isinstance(weight.format, Affine)
    codes, scale = weight.parts["codes"], weight.parts["scale"].float()
    four_bits = weight.format.bits == 4
    return [codes ^ 0x88 if four_bits else codes, scale.bfloat16() if weight.format.group else scale]


def constant_bytes(format: LayerFormat, shape: tuple[int, ...]) -> list[int]:
    """Bytes of each of `constants_of` that is a layer's own, from the shape alone."""
    specs = format.part_specs(shape)
    if isinstance(format, Dense):
        return [specs["weight"].nbytes]
    if is_codebook(format):
        return [spec.nbytes for name, spec in specs.items() if name not in format.shared_parts]
    scales = math.prod(specs["scale"].shape)
    grouped = isinstance(format, Affine) and format.group is not None
    return [specs["codes"].nbytes, scales * (2 if grouped else 4)]


def shared_constant_bytes(format: LayerFormat, shape: tuple[int, ...]) -> list[int]:
    """Bytes of each of `constants_of` that all layers of the format have in common."""
    specs = format.part_specs(shape)
    return [specs[name].nbytes for name in format.shared_parts]
