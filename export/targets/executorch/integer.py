# SPDX-License-Identifier: Apache-2.0
"""Linear and Conv2d as XNNPACK computes them: what is exported, and what the lowered program is compared with.

A compressed layer rounds its input to int8, multiplies integers and scales the sums. Scale and zero of the input are
found while it runs, one per row of features (Linear) or per picture (Conv2d), or are constants (`Static`); then its
output is rounded to int8 too, which is the only form XNNPACK has for that. Written with PyTorch's
`quantized_decomposed` operators, which round as XNNPACK does, the same module is the pattern that XNNPACK's
partitioner takes whole and, run in PyTorch, the arithmetic of the runtime.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

from ....ground.errors import TurbopocketError
from ....quant.formats import Affine, CompressedTensor, Dense
from ....quant.formats.base import from_matrix_view
from ....quant.ranges import Ranges
from .codebook import CodebookLayer, Codebooks, Order
from .stores import is_codebook, may_be_static

OPS = torch.ops.quantized_decomposed
_LOWEST, _HIGHEST = -128, 127
_SMALLEST_SCALE = torch.finfo(torch.float32).eps
MIN_SNR_DB = 30.0
"""Chosen on an earlier student of `pocket`: 51 of 334 layers had inputs below, at 20.0 to 29.8 dB, the next 32.6. All
at int8-row, 12 pictures: 39.3 dB from float with every layer static, 43.2 with these 51 dynamic, 48.0 all dynamic."""


@dataclass(frozen=True)
class Steps:
    """255 equal steps of a tensor's int8: the real number of a code is (code - zero) * size."""

    size: float
    zero: int

    @classmethod
    def over(cls, least: float, greatest: float) -> "Steps":
        """From least to greatest, and 0 exact: a code of its own, even where the range does not hold it."""
        least, greatest = min(least, 0.0), max(greatest, 0.0)
        size = max((greatest - least) / (_HIGHEST - _LOWEST), _SMALLEST_SCALE)
        return cls(size, _LOWEST - round(least / size))

    def rounded(self, x: Tensor) -> Tensor:
        """x as int8 holds it; what lies outside the range becomes its end."""
        limits = self.size, self.zero, _LOWEST, _HIGHEST, torch.int8
        rounded: Tensor = OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *limits), *limits)
        return rounded


@dataclass(frozen=True)
class Static:
    """A layer's input and output in steps that are constants of the program."""

    input: Steps
    output: Steps

    @classmethod
    def of(cls, ranges: Ranges) -> "Static | None":
        """Of a layer that saw these ranges; None when one step for all would lose too much.

        Rounding to steps of s costs s² / 12 of a tensor's power. Below `MIN_SNR_DB` of the input a few values are so
        much larger than the others that these keep hardly any digits: in SDXL's layout the hidden states of a prompt,
        whose first token stands out (MixDQ, arXiv 2405.17873, section 3.2), and the products inside a GEGLU. Below it
        of the output in its quietest call, there are timesteps at which hardly anything is left of it.
        """
        found = cls(Steps.over(*ranges.input), Steps.over(*ranges.output))
        least = 10 ** (MIN_SNR_DB / 10) / 12
        kept = ranges.input_power, ranges.quietest_output_power
        enough = all(
            power >= least * steps.size**2 for power, steps in zip(kept, (found.input, found.output), strict=True)
        )
        return found if enough else None


class IntegerLinear(nn.Module):
    """y = round(x) Wᵀ + b with int8 activations; codes int8 [O, I], scale float32 [O] or [O, G], bias [O] or None."""

    def __init__(self, codes_OI: Tensor, scale: Tensor, bits: int, bias: Tensor | None, static: Static | None) -> None:
        super().__init__()
        self.codes, self.scale = _constant(codes_OI), _constant(scale)
        self.zero = _constant(torch.zeros_like(scale, dtype=torch.int8 if scale.ndim > 1 else torch.int64))
        self.bias = None if bias is None else _constant(bias)
        self.lowest, self.highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.static = static

    def forward(self, x: Tensor) -> Tensor:
        rounded = rounded_by_row(x) if self.static is None else self.static.input.rounded(x)
        y = F.linear(rounded, self._weight(), self.bias)
        return y if self.static is None else self.static.output.rounded(y)

    def _weight(self) -> Tensor:
        """The dense weight [O, I], by the operator from which XNNPACK takes codes and scales."""
        limits = self.lowest, self.highest, torch.int8
        if self.scale.ndim == 1:
            return OPS.dequantize_per_channel(self.codes, self.scale, self.zero, 0, *limits)
        group = self.codes.shape[1] // self.scale.shape[1]
        return OPS.dequantize_per_channel_group(self.codes, self.scale, self.zero, *limits, group, torch.float32)


class PointwiseConv2d(IntegerLinear):
    """A Conv2d of one tap as the Linear that it is: [B, I, H, W] to [B, O, H, W].

    Where scales are found while it runs, XNNPACK has one per pixel, as for the rows of a Linear. Pixels are one
    dimension here, since XNNPACK moves the channels of anything that has four.
    """

    def forward(self, x_BIHW: Tensor) -> Tensor:
        y_BPO = super().forward(x_BIHW.flatten(2).transpose(1, 2))
        return y_BPO.transpose(1, 2).unflatten(2, x_BIHW.shape[2:])


class IntegerConv2d(nn.Module):
    """A Conv2d with int8 activations; codes int8 [O, I, kh, kw], scale float32 [O], bias [O] or None."""

    def __init__(self, codes_OIhw: Tensor, scale_O: Tensor, conv: nn.Conv2d, static: Static | None) -> None:
        super().__init__()
        self.codes, self.scale = _constant(codes_OIhw), _constant(scale_O)
        self.zero = _constant(torch.zeros_like(scale_O, dtype=torch.int64))
        self.bias = conv.bias
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.static = static

    def forward(self, x: Tensor) -> Tensor:
        weight = OPS.dequantize_per_channel(self.codes, self.scale, self.zero, 0, _LOWEST, _HIGHEST, torch.int8)
        rounded = rounded_by_picture(x) if self.static is None else self.static.input.rounded(x)
        y = F.conv2d(rounded, weight, self.bias, self.stride, self.padding, self.dilation)
        return y if self.static is None else self.static.output.rounded(y)


def rounded_by_row(x: Tensor) -> Tensor:
    """x as XNNPACK's int8 holds it: 255 steps from least to greatest of each row of the last dimension, 0 exact."""
    scale, zero = OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = OPS.quantize_per_token(x, scale, zero, _LOWEST, _HIGHEST, torch.int8)
    rounded: Tensor = OPS.dequantize_per_token(codes, scale, zero, _LOWEST, _HIGHEST, torch.int8, torch.float32)
    return rounded


def rounded_by_picture(x: Tensor) -> Tensor:
    """x [1, I, H, W] as XNNPACK's int8 holds it, one scale and zero for all of it."""
    scale, zero = OPS.choose_qparams.tensor(x, _LOWEST, _HIGHEST, _SMALLEST_SCALE, torch.int8)
    codes = OPS.quantize_per_tensor.tensor(x, scale, zero, _LOWEST, _HIGHEST, torch.int8)
    rounded: Tensor = OPS.dequantize_per_tensor.tensor(codes, scale, zero, _LOWEST, _HIGHEST, torch.int8)
    return rounded


def is_pointwise(weight: CompressedTensor) -> bool:
    """Whether it is the weight of a convolution of one tap that runs as a Linear."""
    return isinstance(weight.format, Affine) and weight.shape[2:] == (1, 1)


@dataclass(frozen=True)
class AsRun:
    """What a component's layers have in common: how codebooks are read, and the order in which they are."""

    codebooks: Codebooks
    order: Order = field(default_factory=Order)


def layer_as_run(
    name: str, layer: nn.Module, weight: CompressedTensor, static: Static | None, common: AsRun
) -> nn.Module:
    """The layer with its weight as stored; 8-bit ones with `static` steps, if there are any.

    Raises TurbopocketError for formats that XNNPACK has no kernel for.
    """
    if isinstance(weight.format, Dense) and weight.format.bits == 32:
        dense = copy.deepcopy(layer, {id(tensor): tensor for tensor in layer.parameters()})
        dense.weight = _constant(weight.parts["weight"])
        return dense
    if is_codebook(weight.format):
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return CodebookLayer(layer, weight, common.codebooks, common.order)
    if not isinstance(weight.format, Affine):
        raise TurbopocketError(f"{name}: XNNPACK has no kernel for {weight.format}")
    codes_OK, scale_OG, _ = weight.format.unpack(weight)
    scale = scale_OG.float() if weight.format.group else scale_OG[:, 0].float()
    static = static if may_be_static(weight.format) else None
    if isinstance(layer, nn.Linear):
        return IntegerLinear(codes_OK, scale, weight.format.bits, layer.bias, static)
    assert isinstance(layer, nn.Conv2d)
    if is_pointwise(weight):
        return PointwiseConv2d(codes_OK, scale, weight.format.bits, layer.bias, static)
    return IntegerConv2d(from_matrix_view(codes_OK, weight.shape), scale, layer, static)


def _constant(values: Tensor) -> nn.Parameter:
    """A parameter, so that runners know the module as a layer with a weight."""
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)
