# SPDX-License-Identifier: Apache-2.0
"""Where a plan's bytes go: per kind of stored part, and as the average bits per weight that papers quote."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..ground.names import LayerName
from .formats import CompressedTensor, Dense
from .layers import weight_of
from .observe import LayerStats, SecondMoment
from .plan import Choice
from .scheme import parse_scheme
from .sensitivity import hessian_loss


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
    weights: Mapping[str, CompressedTensor], layers: Mapping[str, nn.Module], stats: Mapping[str, LayerStats]
) -> dict[str, float | None]:
    """Returns 10 log10(tr[W H Wᵀ] / tr[E H Eᵀ]) of each layer's stored weight, None when it is stored without error."""
    found: dict[str, float | None] = {}
    for name, layer in layers.items():
        stored, weight = weights[name], weight_of(name, layer).detach().float()
        noise = hessian_loss(stored.format.decompress(stored) - weight, stats[name][SecondMoment].hessian_KK)
        signal = hessian_loss(weight, stats[name][SecondMoment].hessian_KK)
        found[name] = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
    return found
