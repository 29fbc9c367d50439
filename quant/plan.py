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
from .knapsack import SOLVER_OPTIONS, Kind, NoneFits, Option, least_loss
from .peak import ComponentMemory, LayerMemory, PeakMemory
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

    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of its candidates' schemes."""
        return tuple(candidate.scheme for candidate in self.candidates)


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
    """One choice per layer, in the order the layers were given; `fixed_bytes` is all else in the model.

    `memory` is what each component is predicted to take at its peak, where that was asked for; `peak_memory_bytes` the
    most that one may take.
    """

    choices: tuple[Choice, ...]
    fixed_bytes: int
    budget_bytes: int | None
    memory: Mapping[str, ComponentMemory] = field(default_factory=dict)
    peak_memory_bytes: int | None = None

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
            "peak_memory_bytes": self.peak_memory_bytes,
            "memory": {name: asdict(each) for name, each in self.memory.items()},
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
        memory = {name: ComponentMemory(**each) for name, each in values.get("memory", {}).items()}
        allowed = values["budget_bytes"], memory, values.get("peak_memory_bytes")
        return cls(choices, values["fixed_bytes"], *allowed)

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
    memory: PeakMemory | None = None,
) -> Plan:
    """The plan of least predicted loss whose total is within `budget_bytes` (None: no limit), and whose components are
    within what `memory` allows.

    Least to one part in 10,000, which is where the solver stops; both limits are kept to the byte.

    `pins` maps a glob over layer names to a scheme; where two globs match, the later one holds. A weight format that
    says nothing of activations is pinned with those that the candidates have, the first one's where they differ.
    Deterministic: among equal layers the earlier get the larger formats, a tie in loss goes to fewer bytes.
    Raises OverBudget with the smallest possible total, or the least possible peak, TurbopocketError for a pin that
    matches no layer or names a scheme the layer cannot have.
    """
    allowed = apply_pins(layers, pins or {})
    if memory is not None:
        memory.require_possible(allowed)
    if budget_bytes is None:
        capacity = sum(max(candidate.nbytes for candidate in layer.candidates) for layer in allowed)
    else:
        capacity = budget_bytes - fixed_bytes
        refuse_over_budget(fixed_bytes + _smallest_bytes(allowed), fixed_bytes, budget_bytes)
    try:
        chosen = _solve(allowed, capacity, memory)
    except NoneFits:
        assert memory is not None
        chosen = _smallest(allowed, memory)
        if budget_bytes is not None:
            smallest = fixed_bytes + sum(candidate.nbytes for candidate in chosen)
            refuse_over_budget(smallest, fixed_bytes, budget_bytes, memory.allowed_bytes)
    choices = tuple(
        Choice(layer.layer, layer.shape, candidate.scheme, candidate.nbytes, candidate.loss)
        for layer, candidate in zip(allowed, chosen, strict=True)
    )
    found = Plan(choices, fixed_bytes, budget_bytes)
    return found if memory is None else with_memory(found, memory)


BUDGET = "budget"
"""What `bound_by` calls the limit of bytes."""


def bound_by(
    layers: Sequence[LayerChoices],
    decided: Plan,
    pins: Mapping[str, str] | None = None,
    memory: PeakMemory | None = None,
) -> tuple[str, ...]:
    """Which limits a plan would lose less without: the budget, and components by what they may take at their peak."""
    asked = decided.fixed_bytes, pins

    def helps(budget_bytes: int | None, left: PeakMemory | None) -> bool:
        without = plan(layers, budget_bytes, *asked, left)
        return without.predicted_loss < decided.predicted_loss * (1 - SOLVER_OPTIONS["mip_rel_gap"])

    found = [BUDGET] if decided.budget_bytes is not None and helps(None, memory) else []
    for name in () if memory is None else memory.limited(apply_pins(layers, pins or {})):
        assert memory is not None
        others = {each: peak for each, peak in memory.components.items() if each != name}
        if helps(decided.budget_bytes, replace(memory, components=others)):
            found.append(name)
    return tuple(found)


def with_memory(plan: Plan, memory: PeakMemory) -> Plan:
    """The plan with what its components are predicted to take."""
    schemes = {choice.layer: choice.scheme for choice in plan.choices}
    return replace(plan, memory=memory.of(schemes), peak_memory_bytes=memory.allowed_bytes)


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
    layers: Sequence[LayerChoices],
    fixed_bytes: int,
    pins: Mapping[str, str] | None = None,
    memory: PeakMemory | None = None,
) -> int:
    """Bytes of the smallest plan there is: the least budget that `plan` accepts.

    Raises OverBudget where no plan takes as little memory as is allowed.
    """
    allowed = apply_pins(layers, pins or {})
    if memory is None or memory.allowed_bytes is None:
        return fixed_bytes + _smallest_bytes(allowed)
    memory.require_possible(allowed)
    return fixed_bytes + sum(candidate.nbytes for candidate in _smallest(allowed, memory))


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


def refuse_over_budget(
    smallest_bytes: int, fixed_bytes: int, budget_bytes: int, peak_memory_bytes: int | None = None
) -> None:
    """Raises OverBudget when the smallest plan, `fixed_bytes` included, is larger than the budget; a limit of memory
    that makes it so large is named."""
    if smallest_bytes > budget_bytes:
        within = "" if peak_memory_bytes is None else f" within {peak_memory_bytes:,} bytes of peak memory"
        raise OverBudget(
            f"smallest plan{within} is {smallest_bytes:,} bytes ({fixed_bytes:,} of them not in compressible layers), "
            f"{smallest_bytes - budget_bytes:,} over the budget of {budget_bytes:,} bytes",
            hint="allow a smaller format, loosen a pin, or raise the budget",
        )


def _smallest(layers: Sequence[LayerChoices], memory: PeakMemory) -> list[Candidate]:
    """Of fewest bytes within what is allowed of memory, which some plan is."""
    sized = [
        replace(layer, candidates=tuple(replace(each, loss=float(each.nbytes)) for each in layer.candidates))
        for layer in layers
    ]
    most = sum(max(candidate.nbytes for candidate in layer.candidates) for layer in layers)
    chosen = _solve(sized, most, memory)
    return [
        next(each for each in layer.candidates if each.scheme == found.scheme)
        for layer, found in zip(layers, chosen, strict=True)
    ]


def _solve(layers: Sequence[LayerChoices], capacity_bytes: int, memory: PeakMemory | None) -> list[Candidate]:
    """One candidate per layer. Layers with the same options are one kind, solved by count, not by name.

    That takes the symmetry out (794 layers of the SDXL UNet are a few dozen kinds), which is what makes
    branch and bound quick, and it makes the answer independent of how the solver walks through equal layers.
    Memory counts where it can be over: in components that some of the candidates would take over the limit.
    """
    rooms, taken = _rooms(layers, memory)
    options = [efficient(layer.candidates, taken[layer.layer][1] if layer.layer in taken else None) for layer in layers]
    members: dict[tuple[str, tuple[Option, ...]], list[int]] = {}
    for index, layer in enumerate(layers):
        pool, own = taken.get(layer.layer, ("", {}))
        key = tuple(
            Option(each.nbytes, each.loss, *((own[each.scheme].held, own[each.scheme].running) if own else ()))
            for each in options[index]
        )
        members.setdefault((pool, key), []).append(index)
    kinds = [Kind(key, len(indices), pool) for (pool, key), indices in members.items()]
    counts = least_loss(kinds, capacity_bytes, rooms)
    chosen: dict[int, Candidate] = {}
    for indices, kind_counts in zip(members.values(), counts, strict=True):
        largest_first = _spread(reversed(range(len(kind_counts))), kind_counts)
        for index, option in zip(indices, largest_first, strict=True):
            chosen[index] = options[index][option]
    return [chosen[index] for index in range(len(layers))]


_Taken = Mapping[str, tuple[str, Mapping[str, LayerMemory]]]


def _rooms(layers: Sequence[LayerChoices], memory: PeakMemory | None) -> tuple[dict[str, int], _Taken]:
    """By component what its layers may take over what it takes anyhow, and by layer its component and what each scheme
    takes: of a moment what is over the floor, below which no plan comes."""
    if memory is None or memory.allowed_bytes is None:
        return {}, {}
    schemes = {layer.layer: layer.schemes for layer in layers}
    rooms: dict[str, int] = {}
    taken: dict[str, tuple[str, Mapping[str, LayerMemory]]] = {}
    for name, peak in memory.limited(layers).items():
        floor = peak.floor(schemes)
        rooms[name] = memory.allowed_bytes - peak.own.held - floor
        for layer, own in peak.layers.items():
            taken[layer] = (
                name,
                {
                    scheme: LayerMemory(own[scheme].held, max(0, own[scheme].running - floor))
                    for scheme in schemes[layer]
                },
            )
    return rooms, taken


def _spread(order: Iterator[int], counts: Sequence[int]) -> Iterator[int]:
    for option in order:
        yield from [option] * counts[option]


def efficient(
    candidates: Sequence[Candidate], memory: Mapping[str, LayerMemory] | None = None
) -> tuple[Candidate, ...]:
    """The candidates that no other one beats in bytes, loss, and memory where that counts; smallest first."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.nbytes, candidate.loss)):
        if not any(_as_good(other, candidate, memory) for other in kept):
            kept.append(candidate)
    return tuple(kept)


def _as_good(one: Candidate, other: Candidate, memory: Mapping[str, LayerMemory] | None) -> bool:
    """Whether one of no more bytes than the other has no more loss, and takes no more memory."""
    if one.loss > other.loss:
        return False
    if memory is None:
        return True
    mine, theirs = memory[one.scheme], memory[other.scheme]
    return mine.held <= theirs.held and mine.running <= theirs.running
