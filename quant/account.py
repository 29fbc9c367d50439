# SPDX-License-Identifier: Apache-2.0
"""Where a plan's bytes go: per kind of stored part, and as the average bits per weight that papers quote."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.names import LayerName
from .formats import CompressedTensor, Dense
from .layers import CompressedSource, WeightSource, output_without_bias
from .plan import Choice
from .scheme import parse_scheme


@dataclass(frozen=True)
class Account:
    """Bytes of every kind of part (`codes`, `codebooks`, `scale`, `weight`, …) over `weights` weights.

    `kept` are the layers that stay floating-point numbers.
    """

    weights: int
    part_bytes: dict[str, int]
    kept: tuple[str, ...]

    def total_bytes(self, without: Iterable[str] = ()) -> int:
        """All bytes, or all but those of some parts: papers often leave scales out."""
        return sum(nbytes for part, nbytes in self.part_bytes.items() if part not in set(without))

    def average_bits(self, without: Iterable[str] = ()) -> float:
        """Stored bits per weight, kept layers included."""
        return 8 * self.total_bytes(without) / self.weights


def account(choices: Iterable[Choice]) -> Account:
    """The account of these choices: exact, from shapes and formats alone.

    Parts that the layers of a component share are counted once in each.
    """
    weights, part_bytes, kept = 0, dict[str, int](), []
    counted: set[tuple[str, str, str]] = set()
    for choice in choices:
        layer_format = parse_scheme(choice.scheme).weight
        weights += math.prod(choice.shape)
        if isinstance(layer_format, Dense):
            kept.append(choice.layer)
        for part, spec in layer_format.part_specs(choice.shape).items():
            if part in layer_format.shared_parts:
                shared = LayerName.parse(choice.layer).component, str(layer_format), part
                if shared in counted:
                    continue
                counted.add(shared)
            part_bytes[part] = part_bytes.get(part, 0) + spec.nbytes
    return Account(weights, part_bytes, tuple(kept))


def layer_snr_db(
    layers: Mapping[str, nn.Module], weights: Mapping[str, CompressedTensor], run: Callable[[], object]
) -> dict[str, float | None]:
    """Returns 10 log10(Σ ||W x||² / Σ ||(Ŵ - W) x||²) of each layer that runs, W its weight and Ŵ the stored one.

    The sums are over all inputs x that it gets while `run()` draws; biases do not count. None when the stored weight
    changes no output, or all are zero. A weight is decompressed when its layer runs and let go of again.
    """
    sums = {name: _Errors(CompressedSource(weights[name])) for name in layers if name in weights}
    with ExitStack() as hooks, torch.no_grad():
        for name, errors in sums.items():
            hooks.callback(layers[name].register_forward_hook(errors.see).remove)
        run()
    return {name: errors.snr_db for name, errors in sums.items() if errors.calls}


class _Errors:
    """Sums of squares of one layer's outputs, and of what a stored weight makes of them."""

    def __init__(self, stored: WeightSource) -> None:
        self.stored = stored
        self.signal = self.noise = 0.0
        self.calls = 0

    def see(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook."""
        error, x, bias = self.stored.dense() - layer.weight, inputs[0], layer.bias
        if bias is not None and isinstance(layer, nn.Conv2d):
            bias = bias[:, None, None]
        self.calls += 1
        self.noise += _energy(output_without_bias(layer, error, x))
        self.signal += _energy(output if bias is None else output - bias)

    @property
    def snr_db(self) -> float | None:
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None


def _energy(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
