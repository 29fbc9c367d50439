# SPDX-License-Identifier: Apache-2.0
"""Activations as XNNPACK's int8 holds them: scale and zero point found while it runs, or constants of the program.

Written with PyTorch's `quantized_decomposed` operators, which round as XNNPACK does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

from ....quant.ranges import Ranges

OPS = torch.ops.quantized_decomposed
LOWEST, HIGHEST = -128, 127
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
        size = max((greatest - least) / (HIGHEST - LOWEST), _SMALLEST_SCALE)
        return cls(size, LOWEST - round(least / size))

    def rounded(self, x: Tensor) -> Tensor:
        """x as int8 holds it; what lies outside the range becomes its end."""
        limits = self.size, self.zero, LOWEST, HIGHEST, torch.int8
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


def rounded_by_row(x: Tensor) -> Tensor:
    """x as XNNPACK's int8 holds it: 255 steps from least to greatest of each row of the last dimension, 0 exact."""
    scale, zero = OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = OPS.quantize_per_token(x, scale, zero, LOWEST, HIGHEST, torch.int8)
    rounded: Tensor = OPS.dequantize_per_token(codes, scale, zero, LOWEST, HIGHEST, torch.int8, torch.float32)
    return rounded


def rounded_by_picture(x: Tensor) -> Tensor:
    """x [1, I, H, W] as XNNPACK's int8 holds it, one scale and zero for all of it."""
    scale, zero = OPS.choose_qparams.tensor(x, LOWEST, HIGHEST, _SMALLEST_SCALE, torch.int8)
    codes = OPS.quantize_per_tensor.tensor(x, scale, zero, LOWEST, HIGHEST, torch.int8)
    rounded: Tensor = OPS.dequantize_per_tensor.tensor(codes, scale, zero, LOWEST, HIGHEST, torch.int8)
    return rounded
