# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a checked artifact and its report: each verb once, top to bottom."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

from ...ground.errors import ParityFailed, TurbopocketError
from ...ground.files import write_whole
from ...quant.calibrate import ranges_of
from ...quant.compress import compress_to_files, decompressed
from ...quant.finetune import Calls, fine_tune
from ...quant.fit import parse_fit
from ...quant.formats import CompressedTensor
from ...quant.observe import LayerStats
from ...quant.plan import Plan
from ...quant.ranges import Ranges
from ...quant.sequential import compress_in_blocks
from ...quant.store import load_weights, save_weights
from ...quant.workers import IN_TURN, Workers
from ...runtimes.compare.replay import Recorder
from ...runtimes.manifest import Manifest, write_manifest
from ..checkpoint.card import model_card
from ..families.sizes import size_notes
from ..output.kept import keep as keep_measured
from ..output.names import WEIGHTS_FILE
from ..output.owned import refuse_build, refuse_journal, write_record
from ..output.staging import Claim, claimed, output_path, report_folder, run_folder
from ..progress import StageProgress
from ..recipe import Recipe
from ..report.collect import drawn_pictures, tradeoff_points
from ..report.page import HeldOutLoss, LoweringCost, ReportData, write_report
from ..verify.diffusers_reference import compare_with_diffusers
from ..verify.gaps import Difference, Gaps, Session, ToDiffusers, gap_steps, measure_gaps, torch_runner
from .assigning import as_tensors, calls_of, with_candidates
from .bench import Workbench, few_calls_notes, make_workbench, parity_session, traced, with_ranges
from .calibration import calibrated, calibration_drawing, drawing_inputs, fitting_inputs
from .candidates import curve
from .forecast import foreseen
from .journal import Journal, RunFolder, Stage, opened
from .lowered import lower_component
from .manifest import final_manifest, folder_bytes, require_budget
from .measured import measurements
from .measuring import measured_choices
from .outcome import Built
from .planning import proposals, refuse_impossible, tell_limits
from .reconstructing import reconstructed, reconstruction_inputs
from .selecting import selected
from .self_check import record_self_check, with_self_check
from .temporal import temporal_figures


def build(
    recipe: Recipe,
    out: Path | str,
    overwrite: bool = False,
    progress: StageProgress | None = None,
    workers: Workers = IN_TURN,
    keep: bool | None = None,
    run: Path | None = None,
) -> Built:
    """Compresses a model to a byte budget, lowers it for the recipe's one target, and holds it against PyTorch.

    Makes the artifact `out` and `<out>.report/` beside it, both or neither; with `overwrite` in the place of others.
    `workers` fit its layers and measure them; `progress` is told of each stage, by default on stderr.

    What stages make lies in the folder `run`, by default `<out>.run`. A build that was killed goes on there; one with
    another budget, format, target or output makes what that changes. A finished build leaves it there when `keep` is
    True, or is None and it is not over 1 GiB.

    Raises TurbopocketError for bad input, OverBudget when nothing allowed fits, and ParityFailed
    when the runtime does not compute what PyTorch computes; then nothing is written but that folder.
    """
    _require_one_target(recipe)
    out = output_path(Path(out))
    where = run or run_folder(out)
    claiming, opening = claimed(out, lambda: refuse_build(out, where, overwrite)), opened(where, keep, progress)
    with claiming as claim, opening as folder:
        return _build(recipe, out, claim, folder, workers, None)


def make_stage(
    recipe: Recipe,
    out: Path | str,
    last: Stage,
    progress: StageProgress | None = None,
    workers: Workers = IN_TURN,
    run: Path | None = None,
) -> Path:
    """Makes what a build of `out` needs up to one of its stages, for a later one to go on from; returns where it is.

    Raises what `build` raises.
    """
    _require_one_target(recipe)
    out = output_path(Path(out))
    where = run or run_folder(out)
    with claimed(out, lambda: refuse_journal(where)) as claim, opened(where, True, progress) as folder:
        try:
            _build(recipe, out, claim, folder, workers, last)
        except _Reached:
            return folder.path
    raise AssertionError(f"a build ended before its stage {last}")


def _require_one_target(recipe: Recipe) -> None:
    if recipe.target.also:
        raise TurbopocketError(
            f"an artifact is for one target, {', '.join(recipe.per_target())} are asked for",
            hint="build_targets makes one artifact for each",
        )


class _Reached(Exception):
    """The last stage that is wanted is done."""


def _build(recipe: Recipe, out: Path, claim: Claim, run: RunFolder, workers: Workers, last: Stage | None) -> Built:
    def reached(stage: Stage) -> None:
        if stage == last:
            raise _Reached

    recipe, assumed, workers, works = foreseen(recipe, workers, run.path, run.progress)
    with claim.staged(out, report_folder(out)) as (artifact, report), workers.open() as spread:
        bench = make_workbench(recipe, assumed, run.progress, spread)
        journal = run.journal(bench.model)
        bench = bench.made_from(journal.model)
        bench.target.write_side_files(bench.model, bench.traced, bench.draft.image.size, artifact)
        session = parity_session(bench, artifact)
        bench = with_self_check(bench, session, artifact)
        refuse_impossible(bench, works, artifact)
        to_diffusers = _compare_with_diffusers(bench, session, journal)
        stats = calibrated(bench, session, journal)
        reached("calibrate")
        bench = with_ranges(bench, stats)
        for note in few_calls_notes(bench.candidates, ranges_of(stats)):
            run.progress.remark(f"note: {note}")
        choices, content = measured_choices(bench, session, stats, journal)
        reached("measure")
        proposed = proposals(bench, works, stats, choices, content, artifact)
        decided = selected(bench, session, stats, proposed, journal)
        tell_limits(bench, works, choices, decided)
        weights = _compress(bench, session, stats, decided, journal)
        weights, errors = reconstructed(bench, session, stats, decided, weights, journal)
        fitted = _fitted_inputs(bench, session, decided, journal)
        weights, candidates = with_candidates(bench, session, weights, stats, fitted, journal)
        stored, tuned = _fine_tune(bench, session, weights, decided, journal)
        reached("compress")
        made_from = _tuning_inputs(bench, session, decided, journal)
        bench, costs = _lowered(bench, stats, decided, stored, artifact, made_from, journal)
        reached("lower")
        gaps, draft = _compare(bench, session, decided, stored, ranges_of(stats), to_diffusers, artifact)
        temporal = temporal_figures(bench, session, decided, stored, ranges_of(stats))
        manifest = final_manifest(draft, artifact, decided, gaps)
        write_manifest(artifact, manifest)
        unverified = bench.target.inspect(artifact, manifest)
        notes = (*manifest.notes, *bench.target.notes(artifact, manifest), *size_notes(bench.model, manifest.sizes))
        built_bytes = require_budget(folder_bytes(artifact), decided, bench.target.not_in_plan)
        keep_measured(report, choices, ranges_of(stats), stored, recipe.with_whole_paths().to_toml())
        data = ReportData(
            manifest=manifest,
            plan=decided,
            tradeoff=tradeoff_points(curve(list(choices.values()), decided.fixed_bytes, recipe.compress.pin)),
            parity=gaps.lowering,
            measurements=measurements(bench, artifact, gaps, tuned, candidates, costs, errors, temporal),
            pictures=drawn_pictures(session.prompts, gaps.pictures),
        )
        data.save(report)
        page = write_report(report, data)
        write_record(report)
    return Built(
        out, report_folder(out) / page.name, built_bytes, decided, gaps, unverified, notes, run.progress.stage_seconds
    )


def _compare_with_diffusers(bench: Workbench, session: Session, journal: Journal) -> ToDiffusers:
    """How far our loop is from diffusers' pipeline; raises ParityFailed before hours are spent on a wrong loop."""

    def make(folder: Path) -> None:
        found = compare_with_diffusers(bench.model, torch_runner(bench.components), session)
        found.require()
        with write_whole(folder / "differences.json") as file:
            file.write_text(json.dumps([asdict(each) for each in found.differences]), encoding="utf-8")

    with bench.progress.stage("reference"):
        folder = journal.product("reference", drawing_inputs(session, session.prompts, list(bench.modules)), make)
    differences = json.loads((folder / "differences.json").read_text(encoding="utf-8"))
    return ToDiffusers(tuple(Difference(**each) for each in differences))


def _compress(
    bench: Workbench, session: Session, stats: Mapping[str, LayerStats], decided: Plan, journal: Journal
) -> Mapping[str, CompressedTensor]:
    """The plan carried out, each layer a file; block by block if asked for, each block a file."""
    fit = bench.fit(parse_fit(bench.recipe.compress.fit))
    inputs = fitting_inputs(bench, session, journal, fit)
    with bench.progress.stage("compress", len(bench.layers)) as advance:
        if not bench.recipe.compress.sequential:
            folder = journal.store("compress", inputs)
            return compress_to_files(bench.layers, decided, fit, stats, folder, bench.spread, advance)
        folder = journal.store("sequential", {**inputs, "formats": _formats(decided)})
        asked = bench.modules, bench.blocks, bench.layers, decided, fit, stats
        return compress_in_blocks(
            *asked, partial(calls_of, bench, session, bench.recipe.calibrate.pictures), folder, bench.spread, advance
        )


def _formats(decided: Plan) -> dict[str, str]:
    return {name: str(scheme.weight) for name, scheme in decided.schemes.items()}


def _fine_tune(
    bench: Workbench, session: Session, weights: Mapping[str, CompressedTensor], decided: Plan, journal: Journal
) -> tuple[Mapping[str, CompressedTensor], dict[str, HeldOutLoss]]:
    """The weights after fine-tuning, with the norms and biases that it changed, if the recipe asks for it."""
    asked = bench.recipe.finetune
    if not asked.iterations:
        return weights, {}

    def make(folder: Path) -> None:
        stored, losses = _fine_tuned(bench, session, weights, advance)
        save_weights(folder / WEIGHTS_FILE, stored)
        with write_whole(folder / "losses.json") as file:
            file.write_text(json.dumps({name: each.model_dump() for name, each in losses.items()}), encoding="utf-8")

    with bench.progress.stage("fine-tune", asked.pictures + asked.iterations * len(bench.components)) as advance:
        folder = journal.product("finetune", _tuning_inputs(bench, session, decided, journal), make)
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    return load_weights(folder / WEIGHTS_FILE), {name: HeldOutLoss(**each) for name, each in losses.items()}


def _tuning_inputs(bench: Workbench, session: Session, decided: Plan, journal: Journal) -> dict[str, Any]:
    """What the weights that are lowered depend on."""
    return {
        **_fitted_inputs(bench, session, decided, journal),
        "candidates": asdict(bench.recipe.candidates),
        "finetune": asdict(bench.recipe.finetune),
    }


def _fitted_inputs(bench: Workbench, session: Session, decided: Plan, journal: Journal) -> dict[str, Any]:
    """What they depend on before anything is trained."""
    return {
        **fitting_inputs(bench, session, journal, bench.fit(parse_fit(bench.recipe.compress.fit))),
        "sequential": bench.recipe.compress.sequential,
        "formats": _formats(decided),
        **reconstruction_inputs(bench, decided),
    }


def _fine_tuned(
    bench: Workbench, session: Session, weights: Mapping[str, CompressedTensor], advance: Callable[[], None]
) -> tuple[dict[str, CompressedTensor], dict[str, HeldOutLoss]]:
    asked = bench.recipe.finetune
    stored, losses = dict(weights), {}
    how = asked, bench.recipe.seed, bench.target.group_scale_digits
    recorder = Recorder(torch_runner(bench.components))
    one_size = session.of_one_size()  # calls are trained on in batches
    calibration_drawing(bench, one_size, recorder, asked.pictures, advance)()
    for component in bench.components:
        calls = [call for call in recorder.calls if call.component == component.name]
        seen = Calls.of(
            [
                (as_tensors(call.inputs, component.example_inputs), as_tensors(call.outputs, component.output_names))
                for call in calls
            ]
        )
        tuned = fine_tune(component.module, weights, seen, *how, advance)
        stored |= tuned.weights
        losses[component.name] = HeldOutLoss(before=tuned.before, after=tuned.after)
    return stored, losses


def _lowered(
    bench: Workbench,
    stats: Mapping[str, LayerStats],
    decided: Plan,
    stored: Mapping[str, CompressedTensor],
    artifact: Path,
    inputs: Mapping[str, Any],
    journal: Journal,
) -> tuple[Workbench, dict[str, LoweringCost]]:
    """Writes the components; the draft then says what their files are. Also says what each one took."""
    rest = {name: value for name, value in stored.items() if name not in bench.layers}
    with decompressed(bench.modules, rest):
        if bench.recipe.moves_vectors:
            graphs = traced(bench.target, bench.components, bench.progress, "trace again")
            bench = with_ranges(replace(bench, traced=graphs), stats)
        return _written(bench, decided, stored, artifact, inputs, journal)


def _written(
    bench: Workbench,
    decided: Plan,
    stored: Mapping[str, CompressedTensor],
    artifact: Path,
    inputs: Mapping[str, Any],
    journal: Journal,
) -> tuple[Workbench, dict[str, LoweringCost]]:
    specs, costs = {}, {}
    schemes = {choice.layer: choice.scheme for choice in decided.choices}
    card = asdict(model_card(bench.model.folder))
    asked = {**inputs, "target": bench.recipe.target.model_dump(mode="json"), "schemes": schemes, "card": card}
    with bench.progress.stage("lower", len(bench.traced)) as advance:
        for name, graph in bench.traced.items():
            lowered = lower_component(
                bench.target, graph, stored, decided.schemes, {**asked, "component": name}, journal
            )
            specs[name], costs[name] = lowered.spec, lowered.cost
            copytree(lowered.files, artifact, dirs_exist_ok=True)
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
) -> tuple[Gaps, Manifest]:
    """Both gaps, measured, and the draft with its self-check.

    Raises ParityFailed when the artifact does not compute what PyTorch computes.
    """
    weights, schemes = {name: stored[name] for name in bench.layers}, decided.schemes
    limit = bench.recipe.parity.max_lowering_error or bench.target.lowering_limit(schemes)
    runtimes = bench.target.runtimes(artifact, bench.draft, weights, limit, schemes)
    with bench.progress.stage("compare", gap_steps(runtimes)) as advance:
        as_run = [bench.target.as_run(component, weights, ranges, schemes) for component in bench.components]
        gaps = measure_gaps(bench.components, as_run, stored, runtimes, session, bench.evidence, to_diffusers, advance)
    if gaps.failure is not None:
        raise ParityFailed(f"against PyTorch with the same stored weights: {gaps.failure}")
    with bench.progress.stage("self-check"), decompressed(bench.modules, stored):
        return gaps, record_self_check(bench.draft, session, torch_runner(as_run), runtimes, artifact)
