# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a checked artifact and its report: each verb once, top to bottom."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from ...ground.arrays import Arrays
from ...ground.errors import ParityFailed
from ...quant.account import layer_snr_db
from ...quant.calibrate import LayerStats, calibrate, ranges_of
from ...quant.compress import compress, decompressed
from ...quant.finetune import Calls, FineTuneOptions, fine_tune, stand_ins
from ...quant.fit import Fit, measuring_fit, parse_fit
from ...quant.formats import CompressedTensor, LayerFormat, parse_format
from ...quant.plan import LayerChoices, Plan, plan
from ...quant.ranges import Ranges
from ...quant.sensitivity import measure
from ...quant.sequential import compress_in_blocks
from ...quant.workers import IN_TURN, Spread, Workers
from ...runtimes.compare.replay import Recorder
from ...runtimes.drawing.tokenizer import open_tokenizers
from ...runtimes.manifest import Manifest, write_manifest
from ...runtimes.memory import MemoryFigures
from ...runtimes.runner import Runner
from ..checkpoint.load import LoadedModel, load, load_shapes
from ..evidence import Evidence, evidence_for, read_prompts
from ..families.components import component_name, group_name, layers_of, parameter_count, shapes_of
from ..families.graphs import Component
from ..families.sizes import drawn_sizes, size_notes
from ..output.kept import keep
from ..output.owned import checkpoints, refuse_build, write_record
from ..output.staging import claimed, output_path, report_folder
from ..progress import StageProgress
from ..recipe import Recipe
from ..report.collect import drawn_pictures, tradeoff_points
from ..report.page import HeldOutLoss, LoweringCost, Measurements, ReportData, write_report
from ..targets.base import Target, Traced
from ..targets.registry import open_target
from ..verify.diffusers_reference import compare_with_diffusers
from ..verify.gaps import Gaps, Session, ToDiffusers, gap_steps, measure_gaps, torch_runner
from .candidates import candidate_formats, curve
from .draft import asks_twice, pipeline_manifest, sampler_spec, with_sampling
from .manifest import expected_manifest_bytes, final_manifest, folder_bytes, require_budget
from .outcome import Built
from .probe import make_probe

PROBE_PROMPTS = 3
PROBE_STEPS = 4
PLANNING_PASSES = 3
RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of `ru_maxrss`."""


@dataclass(frozen=True)
class Workbench:
    """What all stages of one build share: the float model as graphs, and what it draws with."""

    recipe: Recipe
    target: Target
    model: LoadedModel
    evidence: Evidence
    components: Sequence[Component]
    traced: Mapping[str, Traced]
    layers: Mapping[str, nn.Module]
    formats: Mapping[str, Sequence[LayerFormat]]
    draft: Manifest
    progress: StageProgress
    spread: Spread

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Each component's model, which holds the float weights between stages."""
        return {component.name: component.module.model for component in self.components}

    def fit(self, fit: Fit) -> Fit:
        """The fit, with scales as exact as the target keeps them."""
        return replace(fit, group_scale_digits=self.target.group_scale_digits)


def build(recipe: Recipe, out: Path, overwrite: bool, progress: StageProgress, workers: Workers = IN_TURN) -> Built:
    """Makes the artifact `out` and `<out>.report/` beside it, both or neither; `workers` fit its layers.

    Raises TurbopocketError for bad input, OverBudget when nothing allowed fits, and ParityFailed
    when the runtime does not compute what PyTorch computes; then nothing is written.
    """
    out = output_path(out)
    with (
        claimed(out, lambda: refuse_build(out, overwrite)) as claim,
        checkpoints(out) as run,
        claim.staged(out, report_folder(out)) as (artifact, report),
        workers.open() as spread,
    ):
        bench = _workbench(recipe, progress, spread)
        bench.target.write_side_files(bench.model, bench.traced, bench.draft.image.size, artifact)
        session = _session(bench, artifact)
        to_diffusers = _compare_with_diffusers(bench, session)
        stats = _calibrate(bench, session)
        bench = _fitted(bench, stats)
        choices = _measure(bench, session, stats)
        decided = _plan(bench, stats, choices, artifact)
        weights = _compress(bench, session, stats, decided, run)
        stored, tuned = _fine_tune(bench, session, weights)
        weights = {name: stored[name] for name in weights}
        bench, costs = _lowered(bench, stats, stored, artifact)
        gaps = _compare(bench, session, stored, ranges_of(stats), to_diffusers, artifact)
        manifest = final_manifest(bench.draft, artifact, decided, gaps)
        write_manifest(artifact, manifest)
        unverified = bench.target.inspect(artifact, manifest)
        notes = (*manifest.notes, *bench.target.notes(artifact, manifest), *size_notes(bench.model, manifest.sizes))
        built_bytes = folder_bytes(artifact)
        require_budget(built_bytes, decided, recipe.target.name == "onnx" and recipe.target.onnx.prepacked)
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


def _workbench(recipe: Recipe, progress: StageProgress, spread: Spread) -> Workbench:
    with progress.stage("load"):
        # From the configs, so that what nobody can tell is asked for before gigabytes are fetched and read.
        recipe, assumed = with_sampling(recipe, load_shapes(recipe.model.source, recipe.model.config))
        model = load(recipe.model.source, recipe.model.lora, recipe.sampler.steps, recipe.model.config)
        target = open_target(recipe.target, asks_twice(model, sampler_spec(model, recipe.sampler)))
        components = target.components(
            model, drawn_sizes(model, recipe.image.image_sizes), recipe.sampler.image_to_image
        )
    for note in (*model.notes, *assumed):
        progress.remark(f"note: {note}")
    traced = _traced(target, components, progress, "trace")
    # A layer that the graph does not run (a projection nobody reads) is neither planned nor shipped.
    used = {name for graph in traced.values() for name in graph.layers}
    layers = {name: layer for name, layer in layers_of(components).items() if name in used}
    formats = candidate_formats(target, shapes_of(layers), recipe.compress.formats, recipe.compress.pin)
    specs = {name: target.component_spec(graph) for name, graph in traced.items()}
    draft = pipeline_manifest(model, recipe, specs, target.tools, assumed)
    evidence = evidence_for(model)
    return Workbench(recipe, target, model, evidence, components, traced, layers, formats, draft, progress, spread)


def _traced(target: Target, components: Sequence[Component], progress: StageProgress, stage: str) -> dict[str, Traced]:
    """Graphs of what the modules hold now; norms and biases are part of them."""
    traced = {}
    with progress.stage(stage, len(components)) as advance:
        for component in components:
            traced[component.name] = target.trace(component)
            advance()
    return traced


def _session(bench: Workbench, artifact: Path) -> Session:
    """The pictures of the parity check: prompts that neither calibration nor planning has seen."""
    asked = open_tokenizers(artifact, bench.draft), bench.evidence, bench.recipe.parity.pictures, bench.recipe.seed
    return Session.of_report(bench.draft, *asked)


def _compare_with_diffusers(bench: Workbench, session: Session) -> ToDiffusers:
    """How far our loop is from diffusers' pipeline; raises ParityFailed before hours are spent on a wrong loop."""
    with bench.progress.stage("reference"):
        found = compare_with_diffusers(bench.model, torch_runner(bench.components), session)
        found.require()
    return found


def _calibrate(bench: Workbench, session: Session) -> dict[str, LayerStats]:
    """Statistics of every layer while the float model draws at the shipped steps and guidance."""
    runner, pictures = torch_runner(bench.components), bench.recipe.calibrate.pictures
    with bench.progress.stage("calibrate", pictures) as advance:
        return calibrate(bench.modules, _calibration_drawing(bench, session, runner, pictures, advance))


def _calibration_drawing(
    bench: Workbench, session: Session, runner: Runner, wanted: int, advance: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """What draws so many pictures of calibration prompts in the runner."""
    file = bench.recipe.calibrate.prompts
    prompts = bench.evidence.prompts("calibrate", wanted, bench.recipe.seed)
    if file is not None:
        own = read_prompts(file)
        prompts = [own[index % len(own)] for index in range(wanted)]
    drawing = replace(session, prompts=prompts)

    def draw_all() -> None:
        for index in range(len(prompts)):
            drawing.draw(runner, index)
            advance()

    return draw_all


def _compress(
    bench: Workbench, session: Session, stats: Mapping[str, LayerStats], decided: Plan, run: Path
) -> dict[str, CompressedTensor]:
    """The plan carried out; block by block if asked for, with finished blocks kept in `run` until the build is done."""
    fit = bench.fit(parse_fit(bench.recipe.compress.fit))
    with bench.progress.stage("compress"):
        if not bench.recipe.compress.sequential:
            return compress(bench.layers, decided, fit, stats, bench.spread)
        runner, pictures = torch_runner(bench.components), bench.recipe.calibrate.pictures
        draw = _calibration_drawing(bench, session, runner, pictures)
        # The plan's losses are measured on the model's weights, so another model's blocks have another name.
        asked = bench.recipe.to_toml() + json.dumps(decided.to_json())
        folder = run / sha256(asked.encode()).hexdigest()[:16]
        asked_of = bench.modules, bench.layers, decided, fit, stats, group_name, draw, folder
        return compress_in_blocks(*asked_of, bench.spread)


def _fitted(bench: Workbench, stats: Mapping[str, LayerStats]) -> Workbench:
    """Graphs that hold the ranges which calibration saw."""
    components, ranges = {component.name: component for component in bench.components}, ranges_of(stats)
    traced = {name: bench.target.fitted(graph, components[name], ranges) for name, graph in bench.traced.items()}
    return replace(bench, traced=traced)


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


def _plan(
    bench: Workbench, stats: Mapping[str, LayerStats], choices: Mapping[str, LayerChoices], artifact: Path
) -> Plan:
    """The plan for graphs as they are; before fine-tuning, for graphs whose norms and biases all differ.

    A graph keeps equal ones once, and tuned ones are not equal.
    """
    if not bench.recipe.finetune.iterations:
        return _plan_for(bench, choices, artifact)
    with decompressed(bench.modules, stand_ins(bench.modules)):
        traced = _traced(bench.target, bench.components, bench.progress, "trace for fine-tuning")
        return _plan_for(_fitted(replace(bench, traced=traced), stats), choices, artifact)


def _plan_for(bench: Workbench, choices: Mapping[str, LayerChoices], artifact: Path) -> Plan:
    """The plan under the recipe's budget, with every byte that is not a layer's weight counted as fixed.

    How much graph a layer needs depends on its format, so the first pass counts the graphs at most; each later
    one counts what the formats of the pass before it need, and the best plan that truly fits is kept.
    """
    compression, target = bench.recipe.compress, bench.target
    to_come = [path for spec in bench.draft.components.values() for path in target.files(spec)]
    small = folder_bytes(artifact)
    small += expected_manifest_bytes(bench.draft, choices, to_come, target.runtime_names, artifact)
    candidates = {form for of_layer in bench.formats.values() for form in of_layer}
    fixed = small + sum(target.fixed_bytes(graph, candidates) for graph in bench.traced.values())
    fitting: list[Plan] = []
    for _ in range(PLANNING_PASSES):
        proposed = plan(list(choices.values()), compression.budget_bytes, fixed, compression.pin)
        formats = {choice.layer: parse_format(choice.format) for choice in proposed.choices}
        graphs = sum(
            target.lowered_bytes(graph, {name: formats[name] for name in graph.layers})
            for graph in bench.traced.values()
        )
        fixed = small + graphs - sum(choice.nbytes for choice in proposed.choices)
        exact = replace(proposed, fixed_bytes=fixed)
        if exact.budget_bytes is None or exact.total_bytes <= exact.budget_bytes:
            fitting.append(exact)
    return min(fitting, key=lambda fit: (fit.predicted_loss, fit.total_bytes))


def _fine_tune(
    bench: Workbench, session: Session, weights: Mapping[str, CompressedTensor]
) -> tuple[Mapping[str, CompressedTensor], dict[str, HeldOutLoss]]:
    """The weights after fine-tuning, with the norms and biases that it changed, if the recipe asks for it."""
    asked = bench.recipe.finetune
    if not asked.iterations:
        return weights, {}
    stored, losses = dict(weights), {}
    options = FineTuneOptions(
        asked.iterations, asked.batch, asked.learning_rate, bench.recipe.seed, bench.target.group_scale_digits
    )
    with bench.progress.stage("fine-tune", asked.pictures + asked.iterations * len(bench.components)) as advance:
        recorder = Recorder(torch_runner(bench.components))
        one_size = session.of_one_size()  # calls are trained on in batches
        _calibration_drawing(bench, one_size, recorder, asked.pictures, advance)()
        for component in bench.components:
            calls = [call for call in recorder.calls if call.component == component.name]
            seen = Calls.of(
                [
                    (_tensors(call.inputs, component.example_inputs), _tensors(call.outputs, component.output_names))
                    for call in calls
                ]
            )
            tuned = fine_tune(component.module, weights, seen, options, advance)
            stored |= tuned.weights
            losses[component.name] = HeldOutLoss(before=tuned.before, after=tuned.after)
    return stored, losses


def _tensors(arrays: Arrays, names: Iterable[str]) -> list[Tensor]:
    return [torch.from_numpy(arrays[name]) for name in names]


def _lowered(
    bench: Workbench, stats: Mapping[str, LayerStats], stored: Mapping[str, CompressedTensor], artifact: Path
) -> tuple[Workbench, dict[str, LoweringCost]]:
    """Writes the components; the draft then says what their files are. Also says what each one took."""
    rest = {name: value for name, value in stored.items() if name not in bench.layers}
    with decompressed(bench.modules, rest):
        if bench.recipe.finetune.iterations:
            traced = _traced(bench.target, bench.components, bench.progress, "trace again")
            bench = _fitted(replace(bench, traced=traced), stats)
        return _written(bench, stored, artifact)


def _written(
    bench: Workbench, stored: Mapping[str, CompressedTensor], artifact: Path
) -> tuple[Workbench, dict[str, LoweringCost]]:
    specs, costs = {}, {}
    with bench.progress.stage("lower", len(bench.traced)) as advance:
        for name, graph in bench.traced.items():
            start = time.monotonic()
            specs[name] = bench.target.lower(graph, {layer: stored[layer] for layer in graph.layers}, artifact)
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT
            costs[name] = LoweringCost(seconds=time.monotonic() - start, peak_bytes=peak_bytes)
            advance()
    return replace(bench, draft=bench.draft.model_copy(update={"components": specs})), costs


def _compare(
    bench: Workbench,
    session: Session,
    stored: Mapping[str, CompressedTensor],
    ranges: Mapping[str, Ranges],
    to_diffusers: ToDiffusers,
    artifact: Path,
) -> Gaps:
    """Both gaps, measured. Raises ParityFailed when the artifact does not compute what PyTorch computes."""
    weights = {name: stored[name] for name in bench.layers}
    limit = bench.recipe.parity.max_lowering_error or bench.target.lowering_limit(weights)
    runtimes = bench.target.runtimes(artifact, bench.draft, weights, limit)
    with bench.progress.stage("compare", gap_steps(runtimes)) as advance:
        as_run = [bench.target.as_run(component, weights, ranges) for component in bench.components]
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
