# SPDX-License-Identifier: Apache-2.0
"""What every statistic of a layer promises: it sees each call with its place, and has a value in the end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from ...ground.names import CallPlace

V = TypeVar("V")


class Observation(ABC, Generic[V]):
    """A statistic of one layer over all its calls in one run; a class is a kind of statistic.

    `large` says that its values, or its sums while it watches, are too many for all layers at once.
    """

    large: ClassVar[bool] = False

    @classmethod
    def for_layers(cls) -> Callable[[], Self]:
        """What makes the observations of one run, a layer each; those that share something get it here."""
        return cls

    @abstractmethod
    def begin(self, layer: nn.Module) -> None:
        """The layer to be watched: once, before any call."""

    @abstractmethod
    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        """One call: its input x (float32, on the CPU) and output y, both finite. The model may write into either
        afterwards: what is kept of them is a copy."""

    @abstractmethod
    def value(self) -> V:
        """What there is to say after the last call; asked once, of layers that had a call."""

    @classmethod
    def packed(cls, value: V) -> dict[str, Tensor]:
        """The value as tensors, for a file. As it is here: of a value that is one number."""
        return {"value": torch.tensor(value, dtype=torch.float64)}

    @classmethod
    def unpacked(cls, parts: Mapping[str, Tensor]) -> V:
        """The inverse of `packed`."""
        value: V = parts["value"].item()  # type: ignore[assignment]
        return value


@dataclass(frozen=True)
class LayerStats:
    """What was observed of one layer: `stats[SecondMoment]` is the value of that kind of observation."""

    values: Mapping[type[Observation[Any]], Any]

    def __getitem__(self, kind: type[Observation[V]]) -> V:
        found: V = self.values[kind]
        return found
