# SPDX-License-Identifier: Apache-2.0
"""Which tensors are alive at which moment of a call."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass
class Buffers:
    """Tensors as they come and go. A moment is a number: of how many have come or gone before."""

    spans: list[tuple[Hashable, int, int, int | None]] = field(default_factory=list)
    """Of each tensor its shape and type, its bytes, and the moments at which it came and went."""
    now: int = 0

    places: dict[int, int] = field(default_factory=dict)
    """Of which other one each of some tensors could take the place, value by value."""

    def come(self, kind: Hashable, nbytes: int, over: int | None = None) -> int:
        """A tensor is made, value by value from another one if `over` is that; returns what `go` is to be told."""
        if over is not None and self.spans[over][:2] == (kind, nbytes):
            self.places[len(self.spans)] = over
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
        return self._over_time([(nbytes, came, went) for _, nbytes, came, went in self._in_place()])

    def _in_place(self) -> list[tuple[Hashable, int, int, int]]:
        """The spans where a tensor takes the place of one that goes as soon as it is made."""
        found = [(kind, nbytes, came, self.now if went is None else went) for kind, nbytes, came, went in self.spans]
        for which, over in self.places.items():
            kind, nbytes, came, went = found[over]
            if went == found[which][2] + 1:
                found[over] = kind, nbytes, came, went - 1
        return found

    def _over_time(self, spans: Sequence[tuple[int, int, int]]) -> list[int]:
        changes = [0] * (self.now + 1)
        for nbytes, came, went in spans:
            changes[came] += nbytes
            changes[went] -= nbytes
        return list(accumulate(changes))
