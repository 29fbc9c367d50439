# SPDX-License-Identifier: Apache-2.0
"""Which layer gets which scheme under a byte budget. Pure: reads choices, looks at no weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from ..ground.errors import OverBudget, TurbopocketError
from ..ground.records import load_record, save_record
from .knapsack import Kind, least_loss
from .scheme import Scheme, parse_scheme

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Candidate:
    """One way to store and run one layer: the scheme's name, its exact bytes, its predicted loss (0 = no loss)."""

    scheme: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class LayerChoices:
    """Everything the planner knows of a layer: its name, weight shape and candidates.

    `roundings` are the losses of each way to round its activations, alone; those of `candidates` include them once
    these are whole schemes.
    """

    layer: str
    shape: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    roundings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What was decided for one layer."""

    layer: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Plan:
    """One choice per layer, in the order the layers were given; `fixed_bytes` is all else in the model."""

    choices: tuple[Choice, ...]
    fixed_bytes: int
    budget_bytes: int | None

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + sum(choice.nbytes for choice in self.choices)

    @property
    def predicted_loss(self) -> float:
        return sum(choice.loss for choice in self.choices)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each layer, by its name."""
        return {choice.layer: parse_scheme(choice.scheme) for choice in self.choices}

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `total_bytes` and `predicted_loss` are there for readers, not read back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "budget_bytes": self.budget_bytes,
            "fixed_bytes": self.fixed_bytes,
            "total_bytes": self.total_bytes,
            "predicted_loss": self.predicted_loss,
            "choices": [asdict(choice) | {"shape": list(choice.shape)} for choice in self.choices],
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """The plan saved at `path`; TurbopocketError naming the file when it is not a plan."""
        return load_record(path, "a plan", SCHEMA_VERSION, cls._parsed)

    @classmethod
    def _parsed(cls, values: Mapping[str, Any], schema_version: int) -> Self:
        entries = [with_scheme(entry, schema_version) for entry in values["choices"]]
        choices = tuple(Choice(**entry | {"shape": tuple(entry["shape"])}) for entry in entries)
        return cls(choices, values["fixed_bytes"], values["budget_bytes"])

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, whole or not at all."""
        save_record(path, self.to_json())


def with_scheme(entry: Mapping[str, Any], schema_version: int) -> dict[str, Any]:
    """A candidate or choice as this version writes it; version 1 has its weight's `format` for a `scheme`."""
    if schema_version > 1:
        return dict(entry)
    return {("scheme" if name == "format" else name): value for name, value in entry.items()}


def plan(
    layers: Sequence[LayerChoices],
    budget_bytes: int | None,
    fixed_bytes: int,
    pins: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of least predicted loss whose total is within `budget_bytes` (None: no limit).

    Least to one part in 10,000, which is where the solver stops; the budget is kept to the byte.

    `pins` maps a glob over layer names to a scheme; where two globs match, the later one holds. A weight format that
    says nothing of activations is pinned with those that the candidates have, the first one's where they differ.
    Deterministic: among equal layers the earlier get the larger formats, a tie in loss goes to fewer bytes.
    Raises OverBudget with the smallest possible total, TurbopocketError for a pin that matches no layer or names a
    scheme the layer cannot have.
    """
    allowed = apply_pins(layers, pins or {})
    if budget_bytes is None:
        capacity = sum(max(candidate.nbytes for candidate in layer.candidates) for layer in allowed)
    else:
        capacity = budget_bytes - fixed_bytes
        refuse_over_budget(fixed_bytes + _smallest_bytes(allowed), fixed_bytes, budget_bytes)
    chosen = _solve(allowed, capacity)
    choices = tuple(
        Choice(layer.layer, layer.shape, candidate.scheme, candidate.nbytes, candidate.loss)
        for layer, candidate in zip(allowed, chosen, strict=True)
    )
    return Plan(choices, fixed_bytes, budget_bytes)


def bytes_at(layers: Sequence[LayerChoices], average_bits: float) -> int:
    """Bytes of the layers' weights at so many bits for each weight."""
    return int(average_bits * sum(math.prod(layer.shape) for layer in layers) / 8)


def tradeoff(
    layers: Sequence[LayerChoices],
    budgets: Sequence[int],
    fixed_bytes: int,
    pins: Mapping[str, str] | None = None,
) -> list[Plan]:
    """One plan per budget, in the order given: predicted loss against bytes, the curve of the report.

    The curve never rises: a plan for fewer bytes stands in where the solver found none better for more.
    """
    best: Plan | None = None
    plans: dict[int, Plan] = {}
    for budget_bytes in sorted(set(budgets)):
        found = plan(layers, budget_bytes, fixed_bytes, pins)
        if best is None or found.predicted_loss < best.predicted_loss:
            best = found
        plans[budget_bytes] = replace(best, budget_bytes=budget_bytes)
    return [plans[budget_bytes] for budget_bytes in budgets]


def smallest_total_bytes(
    layers: Sequence[LayerChoices], fixed_bytes: int, pins: Mapping[str, str] | None = None
) -> int:
    """Bytes of the smallest plan there is: the least budget that `plan` accepts."""
    return fixed_bytes + _smallest_bytes(apply_pins(layers, pins or {}))


def apply_pins(layers: Sequence[LayerChoices], pins: Mapping[str, str]) -> list[LayerChoices]:
    """The layers with only the pinned candidate left where a glob matches; TurbopocketError for a pin in vain."""
    names = [layer.layer for layer in layers]
    _require_sound(layers)
    for glob in pins:
        if not any(fnmatchcase(name, glob) for name in names):
            raise TurbopocketError(f"pin `{glob}` = {pins[glob]} matches none of the {len(names)} layers")
    return [_pinned(layer, pins) for layer in layers]


def _pinned(layer: LayerChoices, pins: Mapping[str, str]) -> LayerChoices:
    pinned = [name for glob, name in pins.items() if fnmatchcase(layer.layer, glob)]
    if not pinned:
        return layer
    kept = tuple(candidate for candidate in layer.candidates if stands_for(pinned[-1], candidate.scheme))
    if not kept:
        known = ", ".join(candidate.scheme for candidate in layer.candidates)
        raise TurbopocketError(f"{layer.layer}: pinned to {pinned[-1]}, its candidates are {known}")
    return replace(layer, candidates=kept[:1])


def stands_for(asked: str, scheme: str) -> bool:
    """Whether a scheme is what was asked for: itself, or a weight format with whichever activations."""
    return asked in (scheme, scheme.split("+", 1)[0])


def _require_sound(layers: Sequence[LayerChoices]) -> None:
    seen: set[str] = set()
    for layer in layers:
        if layer.layer in seen:
            raise TurbopocketError(f"{layer.layer}: listed twice")
        seen.add(layer.layer)
        if not layer.candidates:
            raise TurbopocketError(f"{layer.layer}: no candidate for shape {list(layer.shape)}")
        for candidate in layer.candidates:
            if not 0 <= candidate.loss < float("inf"):
                raise TurbopocketError(
                    f"{layer.layer}: {candidate.scheme} has loss {candidate.loss}, not a number >= 0"
                )


def _smallest_bytes(layers: Sequence[LayerChoices]) -> int:
    return sum(min(candidate.nbytes for candidate in layer.candidates) for layer in layers)


def refuse_over_budget(smallest_bytes: int, fixed_bytes: int, budget_bytes: int) -> None:
    """Raises OverBudget when the smallest plan, `fixed_bytes` included, is larger than the budget."""
    if smallest_bytes > budget_bytes:
        raise OverBudget(
            f"smallest plan is {smallest_bytes:,} bytes ({fixed_bytes:,} of them not in compressible layers), "
            f"{smallest_bytes - budget_bytes:,} over the budget of {budget_bytes:,} bytes",
            hint="allow a smaller format, loosen a pin, or raise the budget",
        )


def _solve(layers: Sequence[LayerChoices], capacity_bytes: int) -> list[Candidate]:
    """One candidate per layer. Layers with the same options are one kind, solved by count, not by name.

    That takes the symmetry out (794 layers of the SDXL UNet are a few dozen kinds), which is what makes
    branch and bound quick, and it makes the answer independent of how the solver walks through equal layers.
    """
    options = [efficient(layer.candidates) for layer in layers]
    members: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for index, candidates in enumerate(options):
        key = tuple((candidate.nbytes, candidate.loss) for candidate in candidates)
        members.setdefault(key, []).append(index)
    counts = least_loss([Kind(key, len(indices)) for key, indices in members.items()], capacity_bytes)
    chosen: dict[int, Candidate] = {}
    for indices, kind_counts in zip(members.values(), counts, strict=True):
        largest_first = _spread(reversed(range(len(kind_counts))), kind_counts)
        for index, option in zip(indices, largest_first, strict=True):
            chosen[index] = options[index][option]
    return [chosen[index] for index in range(len(layers))]


def _spread(order: Iterator[int], counts: Sequence[int]) -> Iterator[int]:
    for option in order:
        yield from [option] * counts[option]


def efficient(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates no other one beats in both bytes and loss, smallest first, loss falling."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.nbytes, candidate.loss)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return tuple(kept)
