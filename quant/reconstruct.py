# SPDX-License-Identifier: Apache-2.0
"""Rounding learned so that a block of the quantized model gives what the float one gave.

Li et al., BRECQ (2021, arXiv 2102.05426), section 3.2: the unit is a block, its inputs are those of calibration, and
the rounding of its weights (AdaRound) is learned for min ||f(x) - f̂(x)||². Scales stay those that are given.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ground.errors import TurbopocketError
from .adaround import AdaptiveRounding
from .formats import Affine, CompressedTensor, LayerFormat
from .layer_rounding import Rounding, rounded_layers
from .layers import weight_of
from .options import ReconstructOptions

KEPT_BYTES = 256 * 2**20
"""Of a unit's float outputs, and of what goes into it, kept in memory; with more they are made and read each time."""

Error = Callable[[Sequence[int], Mapping[str, Tensor]], Tensor]
"""Of some calls, with weights by layer."""


class Unit(ABC):
    """What is reconstructed at once: calls of a function of some layers, which give tensors [B, …]."""

    layers: Mapping[str, nn.Module]
    groups: Sequence[Sequence[int]]
    """Calls, by number, that can be made in one batch."""

    @abstractmethod
    def run(self, calls: Sequence[int]) -> tuple[Tensor, ...]:
        """Outputs of these calls, of one group, with what the layers hold now."""


@dataclass(frozen=True)
class Reconstructed:
    """Learned weights by layer. `before` and `after` are errors of the unit over all its calls, rounded to the nearest
    and as learned, as shares of the power of its float outputs; where the second is not less, the former are kept."""

    weights: dict[str, CompressedTensor]
    before: float
    after: float


def is_learned(form: LayerFormat) -> bool:
    """Whether the rounding of a weight in this format can be learned: integers only."""
    return isinstance(form, Affine)


def reconstruct(
    unit: Unit,
    learned: Mapping[str, CompressedTensor],
    fixed: Mapping[str, CompressedTensor],
    roundings: Mapping[str, Rounding],
    options: ReconstructOptions,
    seed: int = 0,
) -> Reconstructed:
    """Learns the rounding of layers of the unit, whose weights are float; same arguments, same result.

    `learned` are integers with their scales, `fixed` other layers of the unit as they are stored, `roundings` how
    activations are rounded. Float outputs are those without any of it. TurbopocketError when the error is no longer
    finite.
    """
    random = torch.Generator().manual_seed(seed)
    targets = _Targets(unit)
    weights = {name: weight_of(name, unit.layers[name]) for name in learned}
    rest = {name: each.format.decompress(each).to(next(iter(weights.values())).device) for name, each in fixed.items()}
    adaptive = {name: AdaptiveRounding(weights[name], each) for name, each in learned.items()}

    def error(calls: Sequence[int], values: Mapping[str, Tensor]) -> Tensor:
        with _holding(unit.layers, {**rest, **values}), rounded_layers(unit.layers, roundings):
            found = unit.run(calls)
        terms = [(y - wanted).square().sum() for y, wanted in zip(found, targets.of(calls), strict=True)]
        return torch.stack(terms).sum() / len(calls)

    def whole(stored: Mapping[str, CompressedTensor]) -> float:
        values = {name: each.format.decompress(each).to(weights[name].device) for name, each in stored.items()}
        batches = [part for group in unit.groups for part in _split(group, options.batch)]
        with torch.no_grad():
            total = sum(float(error(part, values)) * len(part) for part in batches)
        return total / sum(map(len, unit.groups))

    before = whole(learned)
    _require_finite(before, learned, "of weights rounded to the nearest")
    if before > 0:
        _learn(unit, adaptive, lambda calls, values: error(calls, values) / before, options, random)
    found = {name: each.hard() for name, each in adaptive.items()}
    after = whole(found) if before > 0 else before
    power = max(targets.power(options.batch), 1e-30)
    kept = found if after < before else dict(learned)
    return Reconstructed(kept, before / power, after / power)


def _learn(
    unit: Unit,
    adaptive: Mapping[str, AdaptiveRounding],
    error: Error,
    options: ReconstructOptions,
    random: torch.Generator,
) -> None:
    optimizer = torch.optim.Adam([each.v_OGg for each in adaptive.values()], lr=options.learning_rate)
    count = sum(each.v_OGg.numel() for each in adaptive.values())
    sizes = torch.tensor([float(len(group)) for group in unit.groups])
    for iteration in range(options.iterations):
        group = unit.groups[int(torch.multinomial(sizes, 1, generator=random))]
        chosen = torch.randperm(len(group), generator=random)[: options.batch]
        loss = error([group[index] for index in chosen.tolist()], {name: each() for name, each in adaptive.items()})
        _require_finite(float(loss.detach()), adaptive, f"in iteration {iteration + 1}")
        beta = options.beta(iteration)
        if beta is not None:
            undecided = torch.stack([each.undecided(beta) for each in adaptive.values()]).sum()
            loss = loss + options.regularization * undecided / count
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _require_finite(error: float, layers: Iterable[str], when: str) -> None:
    if not math.isfinite(error):
        raise TurbopocketError(f"{next(iter(layers))}: the error of its block is {error} {when}")


class _Targets:
    """Float outputs of a unit's calls, kept as far as `KEPT_BYTES` go."""

    def __init__(self, unit: Unit) -> None:
        self.unit, self.left = unit, KEPT_BYTES
        self.kept: dict[int, tuple[Tensor, ...]] = {}

    def of(self, calls: Sequence[int]) -> tuple[Tensor, ...]:
        missing = [call for call in calls if call not in self.kept]
        made: dict[int, tuple[Tensor, ...]] = {}
        if missing:
            with torch.no_grad():
                outputs = self.unit.run(missing)
            split = [output.chunk(len(missing)) for output in outputs]
            made = dict(zip(missing, zip(*split, strict=True), strict=True))
            for call, each in made.items():
                nbytes = sum(output.nbytes for output in each)
                if nbytes <= self.left:
                    self.left -= nbytes
                    self.kept[call] = tuple(output.clone() for output in each)
        rows = [self.kept[call] if call in self.kept else made[call] for call in calls]
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))

    def power(self, batch: int) -> float:
        """Mean over the calls of the sum of squares of what they give."""
        calls = [part for group in self.unit.groups for part in _split(group, batch)]
        total = sum(float(output.square().sum()) for part in calls for output in self.of(part))
        return total / sum(map(len, self.unit.groups))


def _split(group: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(group), batch):
        yield group[start : start + batch]


@contextmanager
def _holding(layers: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While the block runs, these layers have these weights, through which gradients go."""
    with ExitStack() as undo:
        for name, value in values.items():
            parameters = layers[name]._parameters
            undo.callback(parameters.__setitem__, "weight", parameters["weight"])
            parameters["weight"] = value  # type: ignore[assignment]
        yield
