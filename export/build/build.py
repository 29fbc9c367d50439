# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a checked artifact and its report: each verb once, top to bottom."""

import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from ...ground.arrays import Arrays
from ...ground.errors import ParityFailed, TurbopocketError
from ...quant.account import layer_snr_db
from ...quant.calibrate import ranges_of
from ...quant.compress import compress, decompressed
from ...quant.finetune import Calls, fine_tune
from ...quant.fit import measuring_fit, parse_fit
from ...quant.formats import CompressedTensor
from ...quant.observe import LayerStats
from ...quant.plan import LayerChoices, Plan
from ...quant.ranges import Ranges
from ...quant.sensitivity import measure
from ...quant.sequential import compress_in_blocks
from ...quant.workers import IN_TURN, Workers
from ...runtimes.compare.replay import Recorder
from ...runtimes.manifest import write_manifest
from ...runtimes.memory import MemoryFigures
from ..families.components import component_name, group_name, parameter_count
from ..families.sizes import size_notes
from ..output.kept import keep
from ..output.owned import checkpoints, refuse_build, write_record
from ..output.staging import claimed, output_path, report_folder
from ..progress import StageProgress
from ..recipe import Recipe
from ..report.collect import drawn_pictures, tradeoff_points
from ..report.page import HeldOutLoss, LoweringCost, Measurements, ReportData, write_report
from ..verify.diffusers_reference import compare_with_diffusers
from ..verify.gaps import Gaps, Session, ToDiffusers, gap_steps, measure_gaps, torch_runner
from .bench import Workbench, calibrated, calibration_drawing, make_workbench, parity_session, traced, with_ranges
from .candidates import curve, with_schemes
from .manifest import final_manifest, folder_bytes, require_budget
from .outcome import Built
from .planning import planned
from .probe import make_probe

PROBE_PROMPTS = 3
PROBE_STEPS = 4
RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of `ru_maxrss`."""


def build(
    recipe: Recipe,
    out: Path | str,
    overwrite: bool = False,
    progress: StageProgress | None = None,
    workers: Workers = IN_TURN,
) -> Built:
    """Compresses a model to a byte budget, lowers it for the recipe's one target, and holds it against PyTorch.

    Makes the artifact `out` and `<out>.report/` beside it, both or neither; with `overwrite` in the place of others.
    `workers` fit its layers; `progress` is told of each stage, by default on stderr.

    Raises TurbopocketError for bad input, OverBudget when nothing allowed fits, and ParityFailed
    when the runtime does not compute what PyTorch computes; then nothing is written.
    """
    if recipe.target.also:
        raise TurbopocketError(
            f"an artifact is for one target, {', '.join(recipe.per_target())} are asked for",
            hint="build_targets makes one artifact for each",
        )
    return _build(recipe, output_path(Path(out)), overwrite, progress or StageProgress(), workers)


def _build(recipe: Recipe, out: Path, overwrite: bool, progress: StageProgress, workers: Workers) -> Built:
    with (
        claimed(out, lambda: refuse_build(out, overwrite)) as claim,
        checkpoints(out) as run,
        claim.staged(out, report_folder(out)) as (artifact, report),
        workers.open() as spread,
    ):
        bench = make_workbench(recipe, progress, spread)
        bench.target.write_side_files(bench.model, bench.traced, bench.draft.image.size, artifact)
        session = parity_session(bench, artifact)
        to_diffusers = _compare_with_diffusers(bench, session)
        stats = calibrated(bench, session)
        bench = with_ranges(bench, stats)
        choices = with_schemes(_measure(bench, session, stats), bench.candidates)
        decided = planned(bench, stats, choices, artifact)
        weights = _compress(bench, session, stats, decided, run)
        stored, tuned = _fine_tune(bench, session, weights)
        weights = {name: stored[name] for name in weights}
        bench, costs = _lowered(bench, stats, decided, stored, artifact)
        gaps = _compare(bench, session, decided, stored, ranges_of(stats), to_diffusers, artifact)
        manifest = final_manifest(bench.draft, artifact, decided, gaps)
        write_manifest(artifact, manifest)
        unverified = bench.target.inspect(artifact, manifest)
        notes = (*manifest.notes, *bench.target.notes(artifact, manifest), *size_notes(bench.model, manifest.sizes))
        built_bytes = folder_bytes(artifact)
        require_budget(built_bytes, decided, bench.target.not_in_plan)
        keep(report, choices, ranges_of(stats), stored)
        data = ReportData(
            manifest=manifest,
            plan=decided,
            tradeoff=tradeoff_points(curve(list(choices.values()), decided.fixed_bytes, recipe.compress.pin)),
            parity=gaps.lowering,
            measurements=Measurements(
                artifact_bytes=built_bytes,
                parameters=sum(parameter_count(component) for component in bench.components),
                layer_snr_db=layer_snr_db(weights, bench.layers, stats),
                fine_tuning=tuned,
                compression=gaps.compression,
                total=gaps.total,
                alignment=gaps.alignment,
                to_diffusers=to_diffusers.largest_error,
                memory=_memory(bench, artifact),
                stage_seconds=progress.stage_seconds,
                lowering=costs,
            ),
            pictures=drawn_pictures(session.prompts, gaps.pictures),
        )
        data.save(report)
        page = write_report(report, data)
        write_record(report)
    return Built(
        out, report_folder(out) / page.name, built_bytes, decided, gaps, unverified, notes, progress.stage_seconds
    )


def _compare_with_diffusers(bench: Workbench, session: Session) -> ToDiffusers:
    """How far our loop is from diffusers' pipeline; raises ParityFailed before hours are spent on a wrong loop."""
    with bench.progress.stage("reference"):
        found = compare_with_diffusers(bench.model, torch_runner(bench.components), session)
        found.require()
    return found


def _compress(
    bench: Workbench, session: Session, stats: Mapping[str, LayerStats], decided: Plan, run: Path
) -> dict[str, CompressedTensor]:
    """The plan carried out; block by block if asked for, with finished blocks kept in `run` until the build is done."""
    fit = bench.fit(parse_fit(bench.recipe.compress.fit))
    with bench.progress.stage("compress"):
        if not bench.recipe.compress.sequential:
            return compress(bench.layers, decided, fit, stats, bench.spread)
        runner, pictures = torch_runner(bench.components), bench.recipe.calibrate.pictures
        draw = calibration_drawing(bench, session, runner, pictures)
        # The plan's losses are measured on the model's weights, so another model's blocks have another name.
        asked = bench.recipe.to_toml() + json.dumps(decided.to_json())
        folder = run / sha256(asked.encode()).hexdigest()[:16]
        asked_of = bench.modules, bench.layers, decided, fit, stats, group_name, draw, folder
        return compress_in_blocks(*asked_of, bench.spread)


def _measure(bench: Workbench, session: Session, stats: Mapping[str, LayerStats]) -> dict[str, LayerChoices]:
    """Predicted loss of each layer in each format the target can store."""
    prompts = bench.evidence.prompts("measure", PROBE_PROMPTS, bench.recipe.seed)
    choices: dict[str, LayerChoices] = {}
    fit = bench.fit(measuring_fit(parse_fit(bench.recipe.compress.fit)))
    with bench.progress.stage("measure", len(bench.layers)) as advance:
        probing = replace(session, prompts=prompts).of_one_size()  # whose calls go in one batch
        probe = make_probe(probing, torch_runner(bench.components), PROBE_STEPS)
        for component in bench.components:
            own = {name: formats for name, formats in bench.formats.items() if component_name(name) == component.name}
            outputs = probe.outputs_after(component.name)
            choices |= measure(bench.layers, stats, own, outputs, fit, bench.spread, advance)
    return choices


def _fine_tune(
    bench: Workbench, session: Session, weights: Mapping[str, CompressedTensor]
) -> tuple[Mapping[str, CompressedTensor], dict[str, HeldOutLoss]]:
    """The weights after fine-tuning, with the norms and biases that it changed, if the recipe asks for it."""
    asked = bench.recipe.finetune
    if not asked.iterations:
        return weights, {}
    stored, losses = dict(weights), {}
    how = asked, bench.recipe.seed, bench.target.group_scale_digits
    with bench.progress.stage("fine-tune", asked.pictures + asked.iterations * len(bench.components)) as advance:
        recorder = Recorder(torch_runner(bench.components))
        one_size = session.of_one_size()  # calls are trained on in batches
        calibration_drawing(bench, one_size, recorder, asked.pictures, advance)()
        for component in bench.components:
            calls = [call for call in recorder.calls if call.component == component.name]
            seen = Calls.of(
                [
                    (_tensors(call.inputs, component.example_inputs), _tensors(call.outputs, component.output_names))
                    for call in calls
                ]
            )
            tuned = fine_tune(component.module, weights, seen, *how, advance)
            stored |= tuned.weights
            losses[component.name] = HeldOutLoss(before=tuned.before, after=tuned.after)
    return stored, losses


def _tensors(arrays: Arrays, names: Iterable[str]) -> list[Tensor]:
    return [torch.from_numpy(arrays[name]) for name in names]


def _lowered(
    bench: Workbench,
    stats: Mapping[str, LayerStats],
    decided: Plan,
    stored: Mapping[str, CompressedTensor],
    artifact: Path,
) -> tuple[Workbench, dict[str, LoweringCost]]:
    """Writes the components; the draft then says what their files are. Also says what each one took."""
    rest = {name: value for name, value in stored.items() if name not in bench.layers}
    with decompressed(bench.modules, rest):
        if bench.recipe.finetune.iterations:
            graphs = traced(bench.target, bench.components, bench.progress, "trace again")
            bench = with_ranges(replace(bench, traced=graphs), stats)
        return _written(bench, decided, stored, artifact)


def _written(
    bench: Workbench, decided: Plan, stored: Mapping[str, CompressedTensor], artifact: Path
) -> tuple[Workbench, dict[str, LoweringCost]]:
    specs, costs = {}, {}
    with bench.progress.stage("lower", len(bench.traced)) as advance:
        for name, graph in bench.traced.items():
            start = time.monotonic()
            weights = {layer: stored[layer] for layer in graph.layers}
            specs[name] = bench.target.lower(graph, weights, artifact, decided.schemes)
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT
            costs[name] = LoweringCost(seconds=time.monotonic() - start, peak_bytes=peak_bytes)
            advance()
    return replace(bench, draft=bench.draft.model_copy(update={"components": specs})), costs


def _compare(
    bench: Workbench,
    session: Session,
    decided: Plan,
    stored: Mapping[str, CompressedTensor],
    ranges: Mapping[str, Ranges],
    to_diffusers: ToDiffusers,
    artifact: Path,
) -> Gaps:
    """Both gaps, measured. Raises ParityFailed when the artifact does not compute what PyTorch computes."""
    weights, schemes = {name: stored[name] for name in bench.layers}, decided.schemes
    limit = bench.recipe.parity.max_lowering_error or bench.target.lowering_limit(schemes)
    runtimes = bench.target.runtimes(artifact, bench.draft, weights, limit)
    with bench.progress.stage("compare", gap_steps(runtimes)) as advance:
        as_run = [bench.target.as_run(component, weights, ranges, schemes) for component in bench.components]
        gaps = measure_gaps(bench.components, as_run, stored, runtimes, session, bench.evidence, to_diffusers, advance)
    if gaps.failure is not None:
        raise ParityFailed(f"against PyTorch with the same stored weights: {gaps.failure}")
    return gaps


def _memory(bench: Workbench, artifact: Path) -> dict[str, MemoryFigures]:
    with bench.progress.stage("memory", len(bench.traced)) as advance:
        figures = {}
        for name in bench.traced:
            figures[name] = bench.target.memory(artifact, name)
            advance()
    return {name: each for name, each in figures.items() if each is not None}
