# SPDX-License-Identifier: Apache-2.0
"""What rounding a layer's input and output changes in what it gives, in PyTorch.

N rows or pictures, C channels, h w sides of a picture.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError
from ..ground.names import current_place
from .activations import ActivationFormat, QParams
from .layers import output_without_bias
from .ranges import Ranges, StepRange
from .rounding import rounded
from .scheme import Scheme

_SMALLEST_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Rounding:
    """How one layer rounds: formats of its input and output, None leaves either as it is, and what it saw, where scales
    are calibrated."""

    input: ActivationFormat | None
    output: ActivationFormat | None
    ranges: Ranges | None = None

    @classmethod
    def of(cls, layer: str, scheme: Scheme, ranges: Mapping[str, Ranges]) -> "Rounding":
        """That of a scheme. Raises TurbopocketError for calibrated scales of a layer that was not."""
        if scheme.is_static and layer not in ranges:
            raise TurbopocketError(f"{layer}: {scheme} needs the ranges that calibration saw")
        return cls(scheme.input, scheme.output, ranges.get(layer))

    @property
    def is_none(self) -> bool:
        """Whether nothing is rounded."""
        return self.input is None and self.output is None

    def of_input(self, layer: nn.Module, x: Tensor, timestep: float | None = None) -> Tensor:
        """The layer's input as it is rounded in a call at that timestep, by default that of the current place; where
        neither is known, in one range for all."""
        seen = self._seen(self.input, timestep)
        return x if self.input is None else _rounded(layer, self.input, x, seen.input if seen else None)

    def of_output(self, layer: nn.Module, y: Tensor, timestep: float | None = None) -> Tensor:
        """The layer's output, bias and all, as it is rounded in a call at that timestep."""
        seen = self._seen(self.output, timestep)
        return y if self.output is None else _rounded(layer, self.output, y, seen.output if seen else None)

    def _seen(self, format: ActivationFormat | None, timestep: float | None) -> Ranges | StepRange | None:
        timestep = current_place().timestep if timestep is None else timestep
        if self.ranges is None or timestep is None or format is None or format.scales != "step":
            return self.ranges
        return self.ranges.at(timestep)

    def changed(self, layer: nn.Module, weight: Tensor, x: Tensor, timesteps: Sequence[float] | None = None) -> Tensor:
        """What it alone changes in the output for input x: the weight is not rounded.

        `timesteps` are those of as many parts of the batch, of one size.
        """
        by_step = any(each is not None and each.scales == "step" for each in (self.input, self.output))
        if not by_step or not timesteps or len(x) % len(timesteps):
            return self._changed(layer, weight, x, None)
        parts = zip(x.chunk(len(timesteps)), timesteps, strict=True)
        return torch.cat([self._changed(layer, weight, part, timestep) for part, timestep in parts])

    def _changed(self, layer: nn.Module, weight: Tensor, x: Tensor, timestep: float | None) -> Tensor:
        change = output_without_bias(layer, weight, self.of_input(layer, x, timestep) - x)
        if self.output is None:
            return change
        y = output_without_bias(layer, weight, x)
        bias = layer.bias
        if isinstance(bias, Tensor):
            y = y + (bias[:, None, None] if isinstance(layer, nn.Conv2d) else bias)
        return self.of_output(layer, y + change, timestep) - y


def roundings_of(
    candidates: Mapping[str, Sequence[Scheme]], ranges: Mapping[str, Ranges]
) -> dict[str, dict[str, Rounding]]:
    """Every way in which a layer's candidates round, by `activations_name`; layers with none are left out."""
    found = {
        name: {activations_name(each): Rounding.of(name, each, ranges) for each in own if not each.is_weight_only}
        for name, own in candidates.items()
    }
    return {name: own for name, own in found.items() if own}


def activations_name(scheme: Scheme) -> str:
    """What a scheme's name has behind the weight format: `a8-static`; nothing where activations stay as they are."""
    return str(scheme).partition("+")[2]


def _rounded(layer: nn.Module, format: ActivationFormat, x: Tensor, seen: tuple[float, float] | None) -> Tensor:
    if format.scales == "dynamic":
        return _rounded_dynamically(layer, format.bits, x)
    assert seen is not None
    return rounded(x, QParams.over(*seen, format.bits))


def _rounded_dynamically(layer: nn.Module, bits: int, x: Tensor) -> Tensor:
    """Scale and zero point of each row (Linear), pixel (Conv2d of one tap) or picture (any other), 0 exact."""
    dimensions: tuple[int, ...] = (-1,)
    if isinstance(layer, nn.Conv2d):
        dimensions = (1,) if math.prod(layer.kernel_size) == 1 else (1, 2, 3)
    least, greatest = x.amin(dimensions, keepdim=True).clamp(max=0), x.amax(dimensions, keepdim=True).clamp(min=0)
    scale = ((greatest - least) / (2**bits - 1)).clamp(min=_SMALLEST_SCALE)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero_point = lowest - torch.round(least / scale)
    codes = (torch.round(x / scale) + zero_point).clamp(lowest, highest)
    return (codes - zero_point) * scale


@contextmanager
def rounded_layers(layers: Mapping[str, nn.Module], roundings: Mapping[str, Rounding]) -> Iterator[None]:
    """While the block runs, these layers round what goes in and what they give; gradients pass straight through.

    Bengio et al. (2013, arXiv 1308.3432): the derivative of rounding is taken for 1.
    """

    def straight(x: Tensor, rounded_x: Tensor) -> Tensor:
        return x + (rounded_x - x).detach() if x.requires_grad else rounded_x

    with ExitStack() as hooks:
        for name, layer in layers.items():
            how = roundings.get(name)
            if how is None or how.is_none:
                continue

            def before(module: nn.Module, args: tuple[Any, ...], how: Rounding = how) -> tuple[Any, ...]:
                return straight(args[0], how.of_input(module, args[0].detach())), *args[1:]

            def after(module: nn.Module, _args: Any, y: Tensor, how: Rounding = how) -> Tensor:
                return straight(y, how.of_output(module, y.detach()))

            hooks.callback(layer.register_forward_pre_hook(before).remove)
            hooks.callback(layer.register_forward_hook(after).remove)
        yield
