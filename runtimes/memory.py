# SPDX-License-Identifier: Apache-2.0
"""Memory that one component of an artifact takes, measured in a process in which nothing else lives."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..ground.arrays import Arrays
from .manifest import ComponentSpec, ImageSpec, Manifest, TensorSpec
from .runner import component_spec


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes of one process that opens a component and runs it once, and of the component's files on disk.

    `start` is before the graph is opened, `loaded` when it is open, `ran` after its first run. Anonymous
    pages (`anon`) must stay in memory on a phone; pages of files (`file`) can be dropped and read again.
    `peak` is the largest sum of both at any moment; `mapped` are pages of the component's own files after the run.
    """

    start_anon_bytes: int
    loaded_anon_bytes: int
    ran_anon_bytes: int
    start_file_bytes: int
    loaded_file_bytes: int
    ran_file_bytes: int
    mapped_bytes: int
    peak_bytes: int
    weight_bytes: int

    @property
    def component_peak_bytes(self) -> int:
        """The most that the component took: what the process was before, and pages of the runtime's own files, are no
        part of it."""
        return self.peak_bytes - self.start_anon_bytes - (self.ran_file_bytes - self.mapped_bytes)


def component_bytes(folder: Path, manifest: Manifest, component: str) -> int:
    """Bytes of the component's graph and its weights' files, which share its folder or begin with its name."""
    main = PurePosixPath(component_spec(manifest, component).file)
    owned = f"{main.parent}/" if main.parent.name else f"{main.stem}."
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if path.relative_to(folder).as_posix().startswith(owned))


def zero_inputs(spec: ComponentSpec, image: ImageSpec) -> Arrays:
    """Zeros of the component's input shapes for one picture; free dimensions have their size there by their name."""
    return {tensor.name: np.zeros(_shape(tensor, image), dtype=tensor.dtype) for tensor in spec.inputs}


def _shape(tensor: TensorSpec, image: ImageSpec) -> list[int]:
    return [each if isinstance(each, int) else vars(image).get(each, 1) for each in tensor.shape]
