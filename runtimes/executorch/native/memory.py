# SPDX-License-Identifier: Apache-2.0
"""Memory that one program takes in a process that holds the C++ runner, it and nothing else."""

import json
from pathlib import Path

from ...command import run
from ...manifest import load_manifest
from ...memory import MemoryFigures, component_bytes
from ...runner import component_spec
from ..file import data_file
from .build import native_runner


def measure_program(folder: Path, component: str) -> MemoryFigures:
    """The memory of a component's program, opened and run once on zeros. Raises TurbopocketError when that fails."""
    manifest = load_manifest(folder)
    spec = component_spec(manifest, component)
    files = [str(path) for path in (folder / spec.file, data_file(folder, spec)) if path is not None]
    found = json.loads(run([str(native_runner()), "measure", "1", *files], f"memory of {component}"))
    return MemoryFigures(
        start_anon_bytes=found["start"]["anon_bytes"],
        loaded_anon_bytes=found["loaded"]["anon_bytes"],
        ran_anon_bytes=found["ran"]["anon_bytes"],
        start_file_bytes=found["start"]["file_bytes"],
        loaded_file_bytes=found["loaded"]["file_bytes"],
        ran_file_bytes=found["ran"]["file_bytes"],
        mapped_bytes=found["mapped_bytes"],
        peak_bytes=found["peak_bytes"],
        weight_bytes=component_bytes(folder, manifest, component),
    )
