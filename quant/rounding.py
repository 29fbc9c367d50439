# SPDX-License-Identifier: Apache-2.0
"""Rounded activations in PyTorch: scale and zero point found while it runs, or by calibration.

Written with PyTorch's `quantized_decomposed` operators, which round as XNNPACK does, and which its partitioner knows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

from .activations import QParams
from .ranges import Ranges, nearest

OPS = torch.ops.quantized_decomposed
LOWEST, HIGHEST = -128, 127
_SMALLEST_SCALE = torch.finfo(torch.float32).eps
MIN_SNR_DB = 30.0
"""Chosen on an earlier student of `pocket`: 51 of 334 layers had inputs below, at 20.0 to 29.8 dB, the next 32.6. All
at int8-row, 12 pictures: 39.3 dB from float with every layer static, 43.2 with these 51 dynamic, 48.0 all dynamic."""


@dataclass(frozen=True)
class StaticQParams:
    """Of a layer's input and output, the same for all calls."""

    input: QParams
    output: QParams

    @classmethod
    def of(cls, ranges: Ranges) -> "StaticQParams":
        """Of a layer that saw these ranges."""
        return cls(QParams.over(*ranges.input), QParams.over(*ranges.output))


@dataclass(frozen=True)
class StepQParams:
    """Of a layer's input and output at each of some timesteps, noisiest first."""

    timesteps: tuple[float, ...]
    steps: tuple[StaticQParams, ...]

    @classmethod
    def of(cls, ranges: Ranges) -> "StepQParams":
        """Of a layer that saw these ranges."""
        steps = [StaticQParams(QParams.over(*step.input), QParams.over(*step.output)) for step in ranges.steps]
        return cls(tuple(step.timestep for step in ranges.steps), tuple(steps))

    def at(self, timestep: float) -> StaticQParams:
        """Those of the nearest timestep."""
        return self.steps[nearest(self.timesteps, timestep)]


def keeps_digits(ranges: Ranges, of_output: bool = True) -> bool:
    """Whether one scale for all inputs of a layer, and one for all its outputs, loses little enough.

    `of_output` says whether outputs are rounded at all.

    Rounding with a scale of s costs s² / 12 of a tensor's power. Below `MIN_SNR_DB` of the input a few values are so
    much larger than the others that these keep hardly any digits: in SDXL's layout the hidden states of a prompt,
    whose first token stands out (MixDQ, arXiv 2405.17873, section 3.2), and the products inside a GEGLU. Below it
    of the output in its quietest call, there are timesteps at which hardly anything is left of it.
    """
    found = StaticQParams.of(ranges)
    least = 10 ** (MIN_SNR_DB / 10) / 12
    kept = [(ranges.input_power, found.input)]
    if of_output:
        kept.append((ranges.quietest_output_power, found.output))
    return all(power >= least * qparams.scale**2 for power, qparams in kept)


def rounded(x: Tensor, qparams: QParams) -> Tensor:
    """x as integers of the qparams' bits hold it; what lies outside the range becomes its end."""
    limits = qparams.scale, qparams.zero_point, qparams.lowest, qparams.highest, torch.int8
    found: Tensor = OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *limits), *limits)
    return found


def rounded_by_row(x: Tensor) -> Tensor:
    """x as int8 holds it: a scale and zero point for each row of the last dimension, 0 exact."""
    scale, zero_point = OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = OPS.quantize_per_token(x, scale, zero_point, LOWEST, HIGHEST, torch.int8)
    found: Tensor = OPS.dequantize_per_token(codes, scale, zero_point, LOWEST, HIGHEST, torch.int8, torch.float32)
    return found


def rounded_by_picture(x: Tensor) -> Tensor:
    """x [1, I, H, W] as int8 holds it, one scale and zero point for all of it."""
    scale, zero_point = OPS.choose_qparams.tensor(x, LOWEST, HIGHEST, _SMALLEST_SCALE, torch.int8)
    codes = OPS.quantize_per_tensor.tensor(x, scale, zero_point, LOWEST, HIGHEST, torch.int8)
    found: Tensor = OPS.dequantize_per_tensor.tensor(codes, scale, zero_point, LOWEST, HIGHEST, torch.int8)
    return found
