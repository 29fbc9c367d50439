# SPDX-License-Identifier: Apache-2.0
"""What a component takes of memory at its peak, as its layers' schemes decide, and a limit of it.

A component takes what it holds all the while, and the most that comes to that at any moment of a run. Components are
open in turn, so each is held against the limit by itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..ground.errors import OverBudget


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer in one scheme: `held` while its component is open; `running` is all that is alive beside what
    is held while the layer runs, activations among it."""

    held: int
    running: int


@dataclass(frozen=True)
class ComponentMemory:
    """Bytes that a component takes: `held` while it is open, and the most beside that at any moment of a run."""

    held: int
    running: int

    @property
    def peak(self) -> int:
        """Both."""
        return self.held + self.running


@dataclass(frozen=True)
class ComponentPeak:
    """What a component takes: of itself, and of each of its layers by scheme. `own.running` is of moments at which no
    layer runs."""

    own: ComponentMemory
    layers: Mapping[str, Mapping[str, LayerMemory]]

    def of(self, schemes: Mapping[str, str]) -> ComponentMemory:
        """With its layers in these schemes."""
        found = [own[schemes[layer]] for layer, own in self.layers.items()]
        held = self.own.held + sum(each.held for each in found)
        return ComponentMemory(held, max(self.own.running, *(each.running for each in found), 0))

    def least(self, allowed: Mapping[str, Iterable[str]]) -> ComponentMemory:
        """The least peak with each layer in one of the schemes that it may have."""
        options = [[own[scheme] for scheme in allowed[layer]] for layer, own in self.layers.items()]
        floor = self.floor(allowed)
        moments = {floor, *(each.running for own in options for each in own if each.running > floor)}
        return min(
            (
                ComponentMemory(
                    self.own.held + sum(min(e.held for e in own if e.running <= moment) for own in options), moment
                )
                for moment in moments
            ),
            key=lambda each: (each.peak, each.running),
        )

    def least_schemes(self, allowed: Mapping[str, Iterable[str]]) -> dict[str, str]:
        """Schemes of that least peak."""
        moment = self.least(allowed).running
        return {
            layer: min(
                (scheme for scheme in allowed[layer] if own[scheme].running <= moment),
                key=lambda scheme: own[scheme].held,
            )
            for layer, own in self.layers.items()
        }

    def with_more(self, held: int) -> "ComponentPeak":
        """The same, which holds so many bytes more."""
        return replace(self, own=replace(self.own, held=self.own.held + max(0, held)))

    def most(self, allowed: Mapping[str, Iterable[str]]) -> int:
        """A peak that no schemes exceed of those that the layers may have."""
        options = [[own[scheme] for scheme in allowed[layer]] for layer, own in self.layers.items()]
        moments = [self.own.running, *(each.running for own in options for each in own)]
        return self.own.held + sum(max(each.held for each in own) for own in options) + max(moments)

    def floor(self, allowed: Mapping[str, Iterable[str]]) -> int:
        """Bytes beside what is held that no schemes of these avoid, at some moment."""
        options = ([own[scheme] for scheme in allowed[layer]] for layer, own in self.layers.items())
        return max([self.own.running, *(min(each.running for each in own) for own in options)])

    def with_chosen(self, schemes: Mapping[str, str]) -> "ComponentPeak":
        """The same of the other layers, with these in their schemes counted as its own."""
        chosen = replace(self, layers={layer: own for layer, own in self.layers.items() if layer in schemes})
        rest = {layer: own for layer, own in self.layers.items() if layer not in schemes}
        return ComponentPeak(chosen.of(schemes), rest)


class Allowed(Protocol):
    """A layer and the schemes that it may have."""

    @property
    def layer(self) -> str: ...

    @property
    def schemes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class PeakMemory:
    """What components take at their peaks, by name, and the most bytes that any of them may take; None: any number."""

    components: Mapping[str, ComponentPeak]
    allowed_bytes: int | None = None

    def of(self, schemes: Mapping[str, str]) -> dict[str, ComponentMemory]:
        """What each component takes with its layers in these schemes."""
        return {name: each.of(schemes) for name, each in self.components.items()}

    def least(self, layers: Sequence[Allowed]) -> dict[str, ComponentMemory]:
        """The least that each component takes with its layers in schemes that they may have."""
        allowed = {each.layer: each.schemes for each in layers}
        return {name: each.least(allowed) for name, each in self.components.items()}

    def least_schemes(self, layers: Sequence[Allowed]) -> dict[str, str]:
        """Schemes of these least peaks, by layer."""
        allowed = {each.layer: each.schemes for each in layers}
        return {name: own for each in self.components.values() for name, own in each.least_schemes(allowed).items()}

    def require_possible(self, layers: Sequence[Allowed]) -> None:
        """Raises OverBudget with the numbers of the component that takes most, where its least peak is over."""
        least = self.least(layers)
        most = max(least, key=lambda name: least[name].peak, default="")
        if self.allowed_bytes is None or not most or least[most].peak <= self.allowed_bytes:
            return
        found, allowed = least[most], self.allowed_bytes
        raise OverBudget(
            f"{most} is predicted to take at least {found.peak:,} bytes of memory at its peak ({found.held:,} held, "
            f"{found.running:,} beside that while it runs), {found.peak - allowed:,} over the {allowed:,} bytes that "
            "peak_memory allows",
            hint="allow a smaller format, loosen a pin, draw smaller pictures, or raise peak_memory",
        )

    def limited(self, layers: Sequence[Allowed]) -> dict[str, ComponentPeak]:
        """The components that some schemes of these layers would take over the limit."""
        if self.allowed_bytes is None:
            return {}
        options = {each.layer: each.schemes for each in layers}
        return {name: each for name, each in self.components.items() if each.most(options) > self.allowed_bytes}
