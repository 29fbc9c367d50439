# SPDX-License-Identifier: Apache-2.0
"""The numbers of a finished artifact that its report shows and no other file holds."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ...quant.candidate_training import BlockLosses
from ...runtimes.memory import MemoryFigures
from ..families.components import parameter_count
from ..report.page import BlockError, CandidateLosses, HeldOutLoss, LoweringCost, Measurements, TemporalFigures
from ..verify.gaps import Gaps
from ..verify.timed import machine_name
from .bench import Workbench
from .manifest import folder_bytes, zipped_bytes


def measurements(
    bench: Workbench,
    artifact: Path,
    gaps: Gaps,
    tuned: Mapping[str, HeldOutLoss],
    candidates: Mapping[str, BlockLosses],
    costs: Mapping[str, LoweringCost],
    errors: Mapping[str, tuple[float, float]],
    temporal: TemporalFigures | None,
) -> Measurements:
    """Returns what was measured of the artifact, whose files are all there; measures memory and the size of a download.

    Times are those of the runtime that a phone has as well, where that is what ran here.
    """
    return Measurements(
        artifact_bytes=folder_bytes(artifact),
        parameters=sum(parameter_count(component) for component in bench.components),
        layer_snr_db=gaps.layer_snr_db,
        fine_tuning=dict(tuned),
        candidates={name: CandidateLosses(**asdict(each)) for name, each in candidates.items()},
        compression=gaps.compression,
        total=gaps.total,
        alignment=gaps.alignment,
        misread=gaps.misread,
        to_diffusers=gaps.to_diffusers.largest_error,
        memory=_memory(bench, artifact),
        call_seconds=gaps.call_seconds if bench.target.own_runtime else {},
        machine=machine_name(),
        zipped_bytes=zipped_bytes(artifact),
        stage_seconds=bench.progress.stage_seconds,
        lowering=dict(costs),
        reconstruction={name: BlockError(before=before, after=after) for name, (before, after) in errors.items()},
        temporal=temporal,
    )


def _memory(bench: Workbench, artifact: Path) -> dict[str, MemoryFigures]:
    with bench.progress.stage("memory", len(bench.traced)) as advance:
        figures = {}
        for name in bench.traced:
            figures[name] = bench.target.memory(artifact, name)
            advance()
    return {name: each for name, each in figures.items() if each is not None}
