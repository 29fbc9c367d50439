# SPDX-License-Identifier: Apache-2.0
"""One component written as its target runs it, kept in the journal until the artifact is made of it."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from shutil import rmtree
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...ground.files import write_whole
from ...quant.formats import CompressedTensor
from ...quant.scheme import Scheme
from ...runtimes.manifest import ComponentSpec
from ..report.page import LoweringCost
from ..targets.base import Target, Traced
from .journal import Journal

RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of `ru_maxrss`."""
_FILES, _TOLD = "files", "lowered.json"


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: ComponentSpec
    cost: LoweringCost


@dataclass(frozen=True)
class Lowered:
    """A component's files in a folder, as they go into an artifact, what a manifest says of it, and what it took."""

    files: Path
    spec: ComponentSpec
    cost: LoweringCost


def lower_component(
    target: Target,
    graph: Traced,
    stored: Mapping[str, CompressedTensor],
    schemes: Mapping[str, Scheme],
    inputs: Mapping[str, Any],
    journal: Journal,
) -> Lowered:
    """Writes the component of a graph. `inputs` are what graphs and weights depend on, the target, and which it is."""

    def make(folder: Path) -> None:
        start = time.monotonic()
        files = folder / _FILES
        if files.exists():  # half of them, of a build that was killed
            rmtree(files)
        files.mkdir()
        spec = target.lower(graph, {layer: stored[layer] for layer in graph.layers}, files, schemes)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT
        told = _Told(spec=spec, cost=LoweringCost(seconds=time.monotonic() - start, peak_bytes=peak_bytes))
        with write_whole(folder / _TOLD) as file:
            file.write_text(told.model_dump_json(), encoding="utf-8")

    tools = {tool: metadata.version(tool) for tool in target.tools}
    folder = journal.product("lower", {**inputs, "tools": tools}, make)
    told = _Told.model_validate_json((folder / _TOLD).read_text(encoding="utf-8"))
    return Lowered(folder / _FILES, told.spec, told.cost)
