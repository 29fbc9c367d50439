# SPDX-License-Identifier: Apache-2.0
"""Which tensors are alive at which moment of a call, and which buffers a runtime holds for them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass
class Buffers:
    """Tensors as they come and go. A moment is a number: of how many have come or gone before."""

    spans: list[tuple[Hashable, int, int, int | None]] = field(default_factory=list)
    """Of each tensor its shape and type, its bytes, and the moments at which it came and went."""
    now: int = 0

    def come(self, kind: Hashable, nbytes: int) -> int:
        """A tensor is made; returns what `go` is to be told."""
        self.spans.append((kind, nbytes, self.now, None))
        self.now += 1
        return len(self.spans) - 1

    def go(self, which: int) -> None:
        """It is let go."""
        kind, nbytes, came, _ = self.spans[which]
        self.spans[which] = kind, nbytes, came, self.now
        self.now += 1

    def alive(self) -> list[int]:
        """Bytes of the tensors that are alive, by moment."""
        ends = ((nbytes, came, self.now if went is None else went) for _, nbytes, came, went in self.spans)
        return self._over_time(list(ends))

    def kept(self) -> list[int]:
        """The same where a buffer whose tensor is gone is not freed while one of the same shape and type is to come.

        ONNX Runtime's plan of buffers is that, also without its arena and its memory pattern (`FindReusableTensor` in
        allocation_planner.cc); the one that became free last is taken.
        """
        chains: dict[Hashable, list[list[int]]] = {}
        for kind, nbytes, came, went in self.spans:
            own = chains.setdefault(kind, [])
            free = [chain for chain in own if chain[2] <= came]
            until = self.now if went is None else went
            if free:
                max(free, key=lambda chain: chain[2])[2] = until
            else:
                own.append([nbytes, came, until])
        return self._over_time([(nbytes, came, went) for own in chains.values() for nbytes, came, went in own])

    def _over_time(self, spans: Sequence[tuple[int, int, int]]) -> list[int]:
        changes = [0] * (self.now + 1)
        for nbytes, came, went in spans:
            changes[came] += nbytes
            changes[went] -= nbytes
        return list(accumulate(changes))
