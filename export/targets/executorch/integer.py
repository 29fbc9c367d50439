# SPDX-License-Identifier: Apache-2.0
"""Integer weights in ExecuTorch: what is exported, and what the lowered program is compared with.

A compressed layer rounds its input to int8, multiplies integers and scales the sums. Scale and zero point of the input
are found while it runs, one per row of features (Linear) or per picture (Conv2d): `a8-dynamic`. Or they are constants:
`a8-static`; then its output is rounded to int8 too, which is the only form XNNPACK has for that. The same module is the
pattern that XNNPACK's partitioner takes whole and, run in PyTorch, the arithmetic of the runtime.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....ground.errors import TurbopocketError
from ....quant.activations import A8_DYNAMIC, A8_STATIC
from ....quant.formats import Affine, CompressedTensor, PartSpec, from_matrix_view
from ....quant.rounding import (
    HIGHEST,
    LOWEST,
    OPS,
    StaticQParams,
    keeps_digits,
    rounded,
    rounded_by_picture,
    rounded_by_row,
)
from ....quant.scheme import Scheme, with_activations
from .form import FormOptions, ProgramForm, constant
from .size import (
    LAYER_BYTES,
    ROUNDED_CONVOLUTION_BYTES,
    STATIC_CONVOLUTION_BYTES,
    STATIC_LINEAR_BYTES,
    STATIC_POINTWISE_BYTES,
)

GROUP_MULTIPLE = 32
GROUP_SCALE_DIGITS = 8
"""XNNPACK keeps the scale of a group as bfloat16."""


class IntegerLinear(nn.Module):
    """y = round(x) Wᵀ + b with int8 activations; codes int8 [O, I], scale float32 [O] or [O, G], bias [O] or None."""

    def __init__(
        self, codes_OI: Tensor, scale: Tensor, bits: int, bias: Tensor | None, static: StaticQParams | None
    ) -> None:
        super().__init__()
        self.codes, self.scale = constant(codes_OI), constant(scale)
        self.zero = constant(torch.zeros_like(scale, dtype=torch.int8 if scale.ndim > 1 else torch.int64))
        self.bias = None if bias is None else constant(bias)
        self.lowest, self.highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.static = static

    def forward(self, x: Tensor) -> Tensor:
        found = rounded_by_row(x) if self.static is None else rounded(x, self.static.input)
        y = F.linear(found, self._weight(), self.bias)
        return y if self.static is None else rounded(y, self.static.output)

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

    def __init__(self, codes_OIhw: Tensor, scale_O: Tensor, conv: nn.Conv2d, static: StaticQParams | None) -> None:
        super().__init__()
        self.codes, self.scale = constant(codes_OIhw), constant(scale_O)
        self.zero = constant(torch.zeros_like(scale_O, dtype=torch.int64))
        self.bias = conv.bias
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.static = static

    def forward(self, x: Tensor) -> Tensor:
        weight = OPS.dequantize_per_channel(self.codes, self.scale, self.zero, 0, LOWEST, HIGHEST, torch.int8)
        found = rounded_by_picture(x) if self.static is None else rounded(x, self.static.input)
        y = F.conv2d(found, weight, self.bias, self.stride, self.padding, self.dilation)
        return y if self.static is None else rounded(y, self.static.output)


class _IntegerForm(ProgramForm):
    """Codes and scales; 4-bit codes are two a byte, the earlier column low, counted from -8.

    The scale of a row is float32, that of a group bfloat16.
    """

    static_summary: ClassVar[str]
    """`summary` of static scales."""

    @classmethod
    def refusal(cls, format: Affine, shape: tuple[int, ...], options: FormOptions) -> str | None:
        if not format.symmetric:
            return f"XNNPACK's integer weights have no zero point, {format} does"
        if format.bits == 8:
            return f"XNNPACK has groups of scales for 4 bits only, not {format}" if format.group else None
        if math.prod(shape[2:]) != 1:
            return "XNNPACK has 8 bits for convolutions, 4 only for those of 1x1, which are Linear"
        if shape[1] % 2:
            return f"XNNPACK's 4-bit weights have an even number of columns, not {shape[1]}"
        if format.group and format.group % GROUP_MULTIPLE:
            return f"XNNPACK's groups are multiples of {GROUP_MULTIPLE} columns, not {format.group}"
        return None

    @classmethod
    def resolved(cls, format: Affine, layer: str | None, options: FormOptions) -> Scheme:
        """Dynamic; static if the options say so and the weight has 8 bits, but where too few digits would be left.

        Of a layer whose ranges are not known yet it is static, which takes more bytes.
        """
        ranges = options.ranges.get(layer or "")
        static = options.asked.static and format.bits == 8 and (ranges is None or keeps_digits(ranges))
        return with_activations(format, A8_STATIC if static else A8_DYNAMIC)

    @classmethod
    def rounding_refusal(cls, scheme: Scheme) -> str | None:
        if scheme == with_activations(scheme.weight, A8_DYNAMIC):
            return None
        if scheme.is_by_step:
            return "XNNPACK's static scales are constants of a delegate: none can be looked up by the timestep"
        if scheme != with_activations(scheme.weight, A8_STATIC):
            return "XNNPACK rounds inputs to 8 bits with dynamic scales, or inputs and outputs with static ones"
        if isinstance(scheme.weight, Affine) and scheme.weight.bits == 8:
            return None
        return f"XNNPACK has static scales of activations beside 8-bit weights only, not {scheme.weight}"

    @classmethod
    def stored_as(cls, scheme: Scheme) -> str:
        return cls.static_summary if scheme.is_static else cls.summary

    def tensors(self) -> list[PartSpec]:
        specs = self.format.part_specs(self.layer.shape)
        scale_type = torch.bfloat16 if self.format.group else torch.float32
        return [specs["codes"], PartSpec(scale_type, specs["scale"].shape)]

    def arrays(self, weight: CompressedTensor) -> list[Tensor]:
        codes, scale = weight.parts["codes"], weight.parts["scale"].float()
        four_bits = self.format.bits == 4
        return [codes ^ 0x88 if four_bits else codes, scale.bfloat16() if self.format.group else scale]

    def _codes_and_scale(self, weight: CompressedTensor) -> tuple[Tensor, Tensor]:
        """int8 [O, K] and float32 [O], or [O, G] of groups."""
        codes_OK, scale_OG, _ = self.format.unpack(weight)
        return codes_OK, scale_OG.float() if self.format.group else scale_OG[:, 0].float()

    def _static(self) -> StaticQParams | None:
        """None where scales are dynamic."""
        if not self.scheme.is_static:
            return None
        if self.layer.name not in self.options.ranges:
            raise TurbopocketError(f"{self.layer.name}: {self.scheme} needs the ranges that calibration saw")
        return StaticQParams.of(self.options.ranges[self.layer.name])


class IntegerLinearForm(_IntegerForm):
    """Linear with 4 or 8 bit codes."""

    summary = "fully connected qd8: activations are rounded to int8 row by row while it runs"
    static_summary = "fully connected qs8: inputs and outputs are rounded to int8 in calibrated scales"

    def operators_bytes(self) -> int:
        return LAYER_BYTES + (STATIC_LINEAR_BYTES if self.scheme.is_static else 0)

    def reference(self, module: Any, weight: CompressedTensor) -> nn.Module:
        codes_OI, scale = self._codes_and_scale(weight)
        return IntegerLinear(codes_OI, scale, self.format.bits, module.bias, self._static())


class IntegerConv2dForm(_IntegerForm):
    """Conv2d with 8 bit codes; of one tap with 4 as well."""

    summary = "convolution qd8: activations are rounded to int8 per picture, of 1x1 per pixel, while it runs"
    static_summary = "convolution qs8: inputs and outputs are rounded to int8 in calibrated scales"

    @property
    def runs_as_linear(self) -> bool:
        return self.layer.shape[2:] == (1, 1)

    def operators_bytes(self) -> int:
        if self.scheme.is_static:
            return LAYER_BYTES + (STATIC_POINTWISE_BYTES if self.runs_as_linear else STATIC_CONVOLUTION_BYTES)
        return LAYER_BYTES + (0 if self.runs_as_linear else ROUNDED_CONVOLUTION_BYTES)

    def reference(self, module: Any, weight: CompressedTensor) -> nn.Module:
        codes_OK, scale = self._codes_and_scale(weight)
        if self.runs_as_linear:
            return PointwiseConv2d(codes_OK, scale, self.format.bits, module.bias, self._static())
        return IntegerConv2d(from_matrix_view(codes_OK, weight.shape), scale, module, self._static())
