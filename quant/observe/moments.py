# SPDX-License-Identifier: Apache-2.0
"""The second moment of what a layer is fed, summed once for all layers that are fed the same.

Queries, keys and values of a block read one tensor; so do the keys and values of all cross-attentions, and the
projections of all residual blocks' time embeddings. K columns of the matrix view, N input vectors, S of one strip.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ...ground.names import CallPlace
from ..fit.hessian import HalfMatrix
from .base import Observation
from .vectors import InputView, digest_of

STRIP_COLUMNS = 1024
"""The sum is symmetric, so of each strip of so many columns only the rows down to its diagonal are kept."""
WAITING_FLOATS = 2**25
"""Input vectors of one product: many rows make it quick, all pixels of a wide convolution would be gigabytes."""


@dataclass(frozen=True)
class Moment(HalfMatrix):
    """E[x xᵀ] (float32) over the `count` input vectors one layer saw.

    For n = count vectors: Σ ||W x||² = n * tr(W H Wᵀ), with W the matrix view of the weight and H `hessian_KK`. Layers
    that saw the same share the strips.
    """

    count: int

    @property
    def hessian_KK(self) -> Tensor:  # noqa: N802  K is a shape
        """The whole matrix; put together anew each time where there are several strips."""
        if len(self.strips) == 1:
            return self.strips[0]
        whole_KK = torch.empty(self.columns, self.columns)
        self.write_to(whole_KK)
        return whole_KK


class SecondMoment(Observation[Moment]):
    """E[x xᵀ] of a layer's inputs, in matrix-view column order.

    The sum is kept in float64, K² * 4 bytes, and is the same to the bit whether it is shared or not.
    """

    large: ClassVar[bool] = True

    def __init__(self, shared: "_SharedSums") -> None:
        self.shared = shared
        self.sum: _Sum | None = None

    @classmethod
    def for_layers(cls) -> Callable[[], Self]:
        shared = _SharedSums()
        return lambda: cls(shared)

    def begin(self, layer: nn.Module) -> None:
        self.view = InputView.of(layer)
        self.shared.layers[self.view] += 1

    def see(self, place: CallPlace, x: Tensor, y: Tensor) -> None:
        seen = self.shared.digest(self.view, x)
        if self.sum is None:
            self.sum = self.shared.joined(self, seen, x)
        else:
            self.sum.see(self, seen, x)

    def value(self) -> Moment:
        assert self.sum is not None
        return self.sum.moment(self)

    @classmethod
    def packed(cls, value: Moment) -> dict[str, Tensor]:
        strips = {f"strip.{index}": strip_ES for index, strip_ES in enumerate(value.strips)}
        return {"count": torch.tensor(value.count), **strips}

    @classmethod
    def unpacked(cls, parts: Mapping[str, Tensor]) -> Moment:
        strips = [parts[f"strip.{index}"] for index in range(len(parts) - 1)]
        return Moment(tuple(strips), int(parts["count"]))


class _SharedSums:
    """The sums of one run, as far as a layer that runs for the first time may still join them."""

    def __init__(self) -> None:
        self.layers: Counter[InputView] = Counter()
        self.young: dict[tuple[InputView, bytes], _Sum] = {}

    def digest(self, view: InputView, x: Tensor) -> bytes:
        """What tells equal inputs from others: no tensor needs to be kept for that, and one that was written into, or
        whose memory is used again, is another. Nothing where no other layer has such a view."""
        return b"" if self.layers[view] == 1 else digest_of(x)

    def joined(self, layer: SecondMoment, seen: bytes, x: Tensor) -> "_Sum":
        """The sum of layers whose only call was fed the same; else a new one."""
        key = layer.view, seen
        found = self.young.get(key)
        if found is None or found.calls > 1:
            found = self.young[key] = _Sum(layer.view, {layer})
            found.see(layer, seen, x)
        found.members.add(layer)
        return found


@dataclass
class _Pending:
    """The input of a call that some members had and others did not yet."""

    seen: bytes
    x: Tensor
    members: set[SecondMoment]


class _Sum:
    """The running sum of x xᵀ of layers that were fed the same in all their calls.

    An input is added when all members had it: one that is fed something else goes on with a copy of the sum as it was
    before. So does one that has missed a call when another has its next, or the inputs in between would have to be
    kept. Input vectors wait until there are as many as columns, or `WAITING_FLOATS` of them: one large product then
    costs less than many sums of K².
    """

    def __init__(self, view: InputView, members: set[SecondMoment]) -> None:
        self.view, self.members = view, members
        self.pending: _Pending | None = None
        self.calls = 0
        self.sums: list[Tensor] = []
        self.enough = min(view.columns, max(1, WAITING_FLOATS // view.columns))
        self.waiting: list[Tensor] = []
        self.waiting_rows = 0
        self.count = 0
        self.mean: Moment | None = None

    def see(self, layer: SecondMoment, seen: bytes, x: Tensor) -> None:
        """A member's next call."""
        if self.pending is not None and layer in self.pending.members:
            self._part(self.members - self.pending.members)
            self._add_pending()
        if self.pending is None:
            alone = len(self.members) == 1
            self.pending = _Pending(seen, x if alone else x.clone(), set())
        elif self.pending.seen != seen:
            self._part({layer}).see(layer, seen, x)
            self._add_if_all_had_it()
            return
        self.pending.members.add(layer)
        self._add_if_all_had_it()

    def moment(self, layer: SecondMoment) -> Moment:
        """The mean for a member, one tensor for all of them; the float64 sum is let go of."""
        if self.pending is not None:
            self._part(self.members - self.pending.members)
            self._add_pending()
        own = layer.sum
        if own is not self:
            assert own is not None
            return own.moment(layer)
        if self.mean is None:
            if self.waiting:
                self._sum_waiting()
            self.mean = Moment(_means(self.sums, self.count), self.count)
        return self.mean

    def _part(self, leaving: set[SecondMoment]) -> "_Sum":
        """A sum of their own for some members, with all that was added so far."""
        other = _Sum(self.view, leaving)
        other.calls, other.count = self.calls, self.count
        with torch.inference_mode(False):
            other.sums = [sum_ES.clone() for sum_ES in self.sums]
        other.waiting, other.waiting_rows = list(self.waiting), self.waiting_rows
        self.members = self.members - leaving
        for layer in leaving:
            layer.sum = other
        return other

    def _add_if_all_had_it(self) -> None:
        if self.pending is not None and self.pending.members == self.members:
            self._add_pending()

    def _add_pending(self) -> None:
        assert self.pending is not None
        x, self.pending = self.pending.x, None
        self.calls += 1
        for x_NK in self.view.vectors(x):
            self.waiting.append(x_NK.clone())  # the model may write into its tensors before they are summed
            self.waiting_rows += len(x_NK)
            if self.waiting_rows >= self.enough:
                self._sum_waiting()

    def _sum_waiting(self) -> None:
        # The model may run in inference mode, but the sum outlives it and must stay an ordinary tensor.
        with torch.inference_mode(False), torch.no_grad():
            x_NK = torch.cat(self.waiting)
            self.sums = self.sums or _zeros(self.view.columns)
            for sum_ES in self.sums:
                end, start = len(sum_ES), len(sum_ES) - sum_ES.shape[1]
                sum_ES += x_NK[:, :end].T @ x_NK[:, start:end]
        self.count += self.waiting_rows
        self.waiting, self.waiting_rows = [], 0


def _zeros(columns: int) -> list[Tensor]:
    ends = [*range(STRIP_COLUMNS, columns, STRIP_COLUMNS), columns]
    return [
        torch.zeros(end, end - start, dtype=torch.float64) for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _means(sums: list[Tensor], count: int) -> tuple[Tensor, ...]:
    """The strips over the count; each sum is let go of before the next is divided."""
    means: list[Tensor] = []
    while sums:
        means.append(sums.pop(0).div_(count).to(torch.float32))
    return tuple(means)
