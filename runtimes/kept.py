# SPDX-License-Identifier: Apache-2.0
"""Which of an artifact's components a runner holds open: those it ran last, as far as memory is to be spent on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from ..ground.heap import give_back_freed
from .manifest import Manifest
from .memory import component_bytes

MOST_BYTES = 1_000_000_000
"""Of files of all components that are held open together. Pictures of the bundled models open everything once; a model
of SDXL's size holds its denoiser while that runs and nothing beside it. An artifact that was planned for a limit of
memory is held to that instead, by what its components were predicted to take at their peaks."""

T = TypeVar("T")


class Kept(Generic[T]):
    """Open components by name, the one used last at the end.

    Those used longest ago are given to `shut` and forgotten before another is opened that would make them more than
    is allowed together; one component is always allowed.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shut: Callable[[str, T], object] = lambda component, value: None,
    ) -> None:
        self._most, peaks = _planned(manifest)
        self._bytes = peaks.__getitem__ if peaks else lambda component: component_bytes(folder, manifest, component)
        self._shut = shut
        self._open: dict[str, T] = {}

    def get(self, component: str, make: Callable[[], T]) -> T:
        """The open component, opened by `make` where it is not."""
        if component not in self._open:
            self.make_room(component)
        value = self._open.pop(component) if component in self._open else make()
        self._open[component] = value
        return value

    def make_room(self, component: str) -> None:
        """Closes what has to be closed for so much to be opened as a component holds, and gives its memory back."""
        most = MOST_BYTES if self._most is None else self._most
        room, before = most - self._bytes(component), len(self._open)
        while self._open and sum(map(self._bytes, self._open)) > room:
            oldest = next(iter(self._open))
            self._shut(oldest, self._open.pop(oldest))
        if len(self._open) < before:
            give_back_freed()


def _planned(manifest: Manifest) -> tuple[int | None, dict[str, int]]:
    """The limit of memory that it was planned for, and what each component takes; none where it does not say both."""
    match manifest.plan:
        case {"peak_memory_bytes": int(most), "component_peak_bytes": dict(peaks)}:
            if peaks.keys() == manifest.components.keys() and all(isinstance(each, int) for each in peaks.values()):
                return most, peaks
    return None, {}
