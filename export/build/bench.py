# SPDX-License-Identifier: Apache-2.0
"""What all stages of one build share."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ...quant.calibrate import ranges_of
from ...quant.fit import VQDM, Fit
from ...quant.fit.native import search_notes
from ...quant.formats import Additive, LayerFormat
from ...quant.layer_rounding import Rounding, roundings_of
from ...quant.observe import LayerStats
from ...quant.ranges import Ranges
from ...quant.scheme import Scheme
from ...quant.split import content_of
from ...quant.workers import Spread
from ...runtimes.drawing.tokenizer import open_tokenizers
from ...runtimes.manifest import Manifest, ModelOrigin
from ..checkpoint.card import model_card
from ..checkpoint.load import load
from ..evidence import Evidence, evidence_for
from ..families.base import LoadedModel
from ..families.components import layers_of, shapes_of
from ..families.graphs import Component
from ..families.sizes import drawn_sizes
from ..progress import StageProgress
from ..recipe import Recipe
from ..targets.base import Target, Traced
from ..targets.registry import open_target
from ..verify.gaps import Session
from .candidates import candidate_schemes, resolved, with_floats
from .draft import pipeline_manifest
from .rewriting import rewritten
from .walk import require_short

ENOUGH_CALLS = 24
"""With a prompt, at one timestep, of a layer whose ranges are by timestep. `pocket-turbo`'s inputs in W8A8, in PyTorch:
of 8 calls such ranges clip and are 0.9 dB behind one range of all, of 24 they were 2.5 dB ahead of it."""


@dataclass(frozen=True)
class Workbench:
    """What all stages of one build share: the float model as graphs, and what it draws with.

    `candidates` are the schemes that each layer may have; before calibration (`with_ranges`) as they were asked for.
    """

    recipe: Recipe
    target: Target
    model: LoadedModel
    evidence: Evidence
    components: Sequence[Component]
    traced: Mapping[str, Traced]
    layers: Mapping[str, nn.Module]
    candidates: Mapping[str, Sequence[Scheme]]
    draft: Manifest
    progress: StageProgress
    spread: Spread

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Each component's model, which holds the float weights between stages."""
        return {component.name: component.module.model for component in self.components}

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """Every block of every component by its name."""
        return {name: block for component in self.components for name, block in component.blocks().items()}

    @property
    def formats(self) -> dict[str, list[LayerFormat]]:
        """The weight formats of the candidates."""
        return {name: list(dict.fromkeys(each.weight for each in own)) for name, own in self.candidates.items()}

    def roundings(self, ranges: Mapping[str, Ranges]) -> dict[str, dict[str, Rounding]]:
        """How candidates of layers that saw these ranges round activations, where there is something to decide."""
        return roundings_of({name: own for name, own in self.candidates.items() if len(own) > 1}, ranges)

    def made_from(self, identity: str) -> "Workbench":
        """The same, whose manifest says that the model has this identity."""
        card = model_card(self.model.folder)
        origin = ModelOrigin(name=self.model.name, sha256=identity, license=card.license, author=card.author)
        return replace(self, draft=self.draft.model_copy(update={"model": origin}))

    def fit(self, fit: Fit) -> Fit:
        """The fit, with scales as exact as the target keeps them."""
        return replace(fit, group_scale_digits=self.target.group_scale_digits)


def make_workbench(recipe: Recipe, assumed: Sequence[str], progress: StageProgress, spread: Spread) -> Workbench:
    """Of a recipe that says how pictures are drawn; `assumed` are sentences on what of that it did not say before."""
    with progress.stage("load"):
        model = load(recipe.model.source, recipe.model.lora, recipe.sampler.steps, recipe.model.config)
        target = open_target(recipe.target).crediting(model_card(model.folder))
        components = target.components(
            model, drawn_sizes(model, recipe.image.image_sizes), recipe.sampler.image_to_image
        )
    evidence = evidence_for(model)
    with progress.stage("rewrite") if recipe.compress.rewrites else nullcontext():
        rewrites = rewritten(model, components, recipe, evidence)
    components, assumed = rewrites.components, (*assumed, *rewrites.remarks)
    for note in (*model.notes, *assumed):
        progress.remark(f"note: {note}")
    graphs = traced(target, components, progress, "trace")
    # A layer that the graph does not run (a projection nobody reads) is neither planned nor shipped.
    used = {name for graph in graphs.values() for name in graph.layers}
    layers = {name: layer for name, layer in layers_of(components).items() if name in used}
    candidates = candidate_schemes(target, shapes_of(layers), recipe.compress.formats, recipe.compress.pin)
    if recipe.compress.exempt:
        candidates = with_floats(target, shapes_of(layers), candidates)
    specs = {name: target.component_spec(graph) for name, graph in graphs.items()}
    draft = pipeline_manifest(model, recipe, specs, target.tools, assumed)
    only_these_steps = draft.only_these_steps or rewrites.only_these_steps
    of_target = {"rewrites": list(rewrites.specs), "runtime": target.runtime_spec()}
    draft = draft.model_copy(update={**of_target, "only_these_steps": only_these_steps})
    if content_of(list(layers), recipe.compress.content):
        require_short(draft)
    searched = any(isinstance(each.weight, Additive) for schemes in candidates.values() for each in schemes)
    for note in search_notes() if searched and recipe.compress.fit == VQDM.name else ():
        progress.remark(f"note: {note}")
    return Workbench(recipe, target, model, evidence, components, graphs, layers, candidates, draft, progress, spread)


def traced(target: Target, components: Sequence[Component], progress: StageProgress, stage: str) -> dict[str, Traced]:
    """Graphs of what the modules hold now; norms and biases are part of them."""
    graphs = {}
    with progress.stage(stage, len(components)) as advance:
        for component in components:
            graphs[component.name] = target.trace(component)
            advance()
    return graphs


def parity_session(bench: Workbench, artifact: Path) -> Session:
    """The pictures of the parity check: prompts that neither calibration nor planning has seen."""
    asked = open_tokenizers(artifact, bench.draft), bench.evidence, bench.recipe.parity.pictures, bench.recipe.seed
    return Session.of_report(bench.draft, *asked)


def with_ranges(bench: Workbench, stats: Mapping[str, LayerStats]) -> Workbench:
    """Graphs that hold the ranges which calibration saw, and candidates resolved for them."""
    components, ranges = {component.name: component for component in bench.components}, ranges_of(stats)
    traced = {name: bench.target.fitted(graph, components[name], ranges) for name, graph in bench.traced.items()}
    candidates = resolved(bench.target, shapes_of(bench.layers), bench.candidates, ranges)
    return replace(bench, traced=traced, candidates=candidates)


def few_calls_notes(candidates: Mapping[str, Sequence[Scheme]], ranges: Mapping[str, Ranges]) -> list[str]:
    """A sentence where layers that may round by the timestep saw less than `ENOUGH_CALLS` at one."""
    counts = {
        name: min(step.calls for step in ranges[name].steps)
        for name, own in candidates.items()
        if any(each.is_by_step for each in own) and ranges[name].steps
    }
    few = [count for count in counts.values() if count < ENOUGH_CALLS]
    if not few:
        return []
    return [
        f"the ranges by timestep of {len(few)} layers come from {min(few)} calls each, {ENOUGH_CALLS} or more are "
        "needed, or other pictures are clipped: calibrate.pictures says how many there are"
    ]
