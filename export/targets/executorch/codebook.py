# SPDX-License-Identifier: Apache-2.0
"""Layers of codebooks in ExecuTorch: as operators of our own, or written with PyTorch's for any runtime.

`turbopocket::codebook_linear` and `codebook_conv2d` read the codes as they are stored; an app links their kernels, see
docs/kernels.md. In PyTorch's own operators a layer looks its vectors up, which makes its weight dense for the time of
one product. Nothing of that depends on activations, so XNNPACK's lowering may do it for all layers before the first
product, and does; therefore a zero that is made of the output of the layer before it is added to a layer's codes.

O outputs, I inputs, K = kh kw I columns, M codebooks, P entries of one, D length of a vector, J = K / D vectors in a
row, N columns of activations.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library, impl, register_fake

from ....quant.formats import CompressedTensor, PartSpec
from ....quant.layers import convolved_size
from ...target_options import Codebooks
from ..codebook import CodebookForm
from ..layer import LayerBytes, LayerUse
from .form import Order, ProgramForm, constant
from .size import BOOK_BYTES, KERNEL_BYTES, TAP_BYTES, VECTORS_BYTES

_LIBRARY = Library("turbopocket", "DEF")
_WEIGHT = "Tensor x, Tensor codes, Tensor codebooks, Tensor scale, Tensor? bias"
_GEOMETRY = "int[] kernel, int[] stride, int[] padding, int[] dilation"


class CodebookLayer(nn.Module):
    """y = scale * (x Σ codebooks[m][codes[..., m]]) + bias of a Linear, or of a Conv2d of one group that pads zeros."""

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, constants: Sequence[Tensor], form: Codebooks, order: Order
    ) -> None:
        super().__init__()
        self.codes, self.codebooks, self.scale = map(constant, constants)
        self.bias = layer.bias
        self.form, self.order = form, order
        self.geometry = _geometry(layer) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes, self.codebooks, self.scale, self.bias
        if self.form == "kernel":
            ops, geometry = torch.ops.turbopocket, self.geometry
            y: Tensor = (
                ops.codebook_linear(x, *weight) if geometry is None else ops.codebook_conv2d(x, *weight, *geometry)
            )
            return y
        y = self._linear(x) if self.geometry is None else self._conv2d(x, *self.geometry)
        self.order.last = y
        return y

    def _linear(self, x: Tensor) -> Tensor:
        y_ON = self._product(x, x.reshape(1, -1, x.shape[-1]).transpose(1, 2))
        return y_ON.transpose(1, 2).reshape(*x.shape[:-1], y_ON.shape[1])

    def _conv2d(
        self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Tensor:
        """By one product with the pixels under each tap: XNNPACK has no convolution by weights made at run time."""
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
        sizes = _output_sizes(x, kernel, stride, padding, dilation)
        rows, columns = (
            [
                slice(tap * dilation[axis], tap * dilation[axis] + (sizes[axis] - 1) * stride[axis] + 1, stride[axis])
                for tap in range(kernel[axis])
            ]
            for axis in range(2)
        )
        taps = [padded[:, :, row, column] for row in rows for column in columns]
        y_1ON = self._product(x, (torch.cat(taps, 1) if len(taps) > 1 else taps[0]).flatten(2))
        return y_1ON.unflatten(2, sizes)

    def _product(self, x: Tensor, columns_1KN: Tensor) -> Tensor:
        """[1, O, N]. A batch of one, which programs are made for."""
        weight_1OK = self._vectors(x).reshape(1, len(self.scale), -1)
        y_1ON = torch.bmm(weight_1OK, columns_1KN) * self.scale.float().unsqueeze(1)
        return y_1ON if self.bias is None else y_1ON + self.bias.unsqueeze(1)

    def _vectors(self, x: Tensor) -> Tensor:
        """[O, J, D], the sums of the vectors in the order of the codebooks, not scaled."""
        codes_OJM: Tensor = self.codes
        if torch.compiler.is_exporting():
            before = x if self.order.last is None else self.order.last
            first = before.reshape(-1)[:1]
            codes_OJM = codes_OJM + (first != first).to(torch.uint8)
        count, entries, length = self.codebooks.shape
        vectors = self.codebooks.float().reshape(count * entries, length)
        total = F.embedding(codes_OJM[:, :, 0].to(torch.int32), vectors)
        for book in range(1, count):
            total = total + F.embedding(codes_OJM[:, :, book].to(torch.int32) + book * entries, vectors)
        return total


class _CodebookForm(CodebookForm, ProgramForm):
    """Constants that are no XNNPACK's, so that they have no names in the file."""

    reader = "ExecuTorch"
    named_by_hash = False

    def tensors(self) -> list[PartSpec]:
        types = torch.uint8, torch.float16, torch.float16
        return [PartSpec(*spec) for spec in zip(types, self.shapes(), strict=True)]

    def arrays(self, weight: CompressedTensor) -> list[Tensor]:
        return self.parts(weight)

    def memory(self, use: LayerUse) -> LayerBytes:
        """Codes stay in the file. Portable, two summands and their sum are dense at once, or of one codebook what its
        indices in int32 look up; a convolution then has the pixels under all taps."""
        held = super().memory(use).held
        if self.options.asked.codebooks == "kernel":
            return LayerBytes(held)
        indices = 4 * math.prod(self.shapes()[0])
        decoding = 3 * self.dense_bytes if self.count > 1 else self.dense_bytes + indices
        taps = math.prod(self.layer.shape[2:])
        pixels = 4 * math.prod(self.layer.shape[1:]) * use.vectors if taps > 1 else 0
        return LayerBytes(held, max(decoding, self.dense_bytes + pixels))

    def operators_bytes(self) -> int:
        if self.options.asked.codebooks == "kernel":
            return KERNEL_BYTES
        taps = math.prod(self.layer.shape[2:])
        return VECTORS_BYTES + BOOK_BYTES * self.count + (TAP_BYTES * taps if taps > 1 else 0)

    def reference(self, module: Any, weight: CompressedTensor) -> nn.Module:
        return CodebookLayer(module, self.arrays(weight), self.options.asked.codebooks, self.options.order)


class CodebookLinearForm(_CodebookForm):
    """Linear whose weight is a sum of codebook vectors."""

    summary = "embedding and bmm, or turbopocket::codebook_linear (`codebooks` of a recipe)"


class CodebookConv2dForm(_CodebookForm):
    """Conv2d whose weight is a sum of codebook vectors."""

    summary = "embedding and bmm, or turbopocket::codebook_conv2d (`codebooks` of a recipe)"


def _geometry(conv: nn.Conv2d) -> tuple[list[int], ...]:
    """Kernel, stride, padding and dilation, rows first."""
    assert not isinstance(conv.padding, str)
    return tuple(list(pair) for pair in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))


def _output_sizes(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Rows and columns of a convolution's output."""
    return [convolved_size(*each) for each in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)]


def _dense(codes: Tensor, codebooks: Tensor, scale: Tensor) -> Tensor:
    """The weight [O, K], as the kernels decode it."""
    parts = [codebook[codes[:, :, book].long()] for book, codebook in enumerate(codebooks.float())]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.flatten(1) * scale.float().unsqueeze(1)


for _name, _arguments in (("codebook_linear", _WEIGHT), ("codebook_conv2d", f"{_WEIGHT}, {_GEOMETRY}")):
    _LIBRARY.define(f"{_name}({_arguments}) -> Tensor")
    _LIBRARY.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")


@impl(_LIBRARY, "codebook_linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _dense(codes, codebooks, scale), bias)


@impl(_LIBRARY, "codebook_conv2d", "CompositeExplicitAutograd")
def _conv2d(
    x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor, bias: Tensor | None, *geometry: Sequence[int]
) -> Tensor:
    kernel, stride, padding, dilation = (list(pair) for pair in geometry)
    weight_OhwI = _dense(codes, codebooks, scale).unflatten(1, [*kernel, x.shape[1]])
    return F.conv2d(x, weight_OhwI.permute(0, 3, 1, 2), bias, stride, padding, dilation)


@register_fake("turbopocket::codebook_linear", lib=_LIBRARY)
def _linear_shape(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@register_fake("turbopocket::codebook_conv2d", lib=_LIBRARY)
def _conv2d_shape(
    x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor, bias: Tensor | None, *geometry: Sequence[int]
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], *_output_sizes(x, *geometry))
