# SPDX-License-Identifier: Apache-2.0
"""Rewrites of the denoiser that a recipe asks for: made before tracing, held against what the float model gave."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ground.arrays import Arrays
from ...ground.errors import TurbopocketError
from ...runtimes.compare.replay import Call, Recorder
from ...runtimes.drawing.tokenizer import open_tokenizers
from ...runtimes.manifest import Manifest, RewriteSpec
from ...runtimes.pipeline import Pipeline, TextFeed
from ...runtimes.runner import Runner
from ..checkpoint.identity import module_identity
from ..evidence import Evidence
from ..families.base import LoadedModel
from ..families.components import described
from ..families.graphs import Component
from ..recipe import Recipe
from ..rewrites.base import applied
from ..rewrites.registry import REWRITES
from ..sampling.spec import sampler_spec
from ..targets.side_files import write_tokenizers
from ..verify.gaps import Session, torch_runner
from .draft import pipeline_manifest

PROMPTS = 2
CALLS = 2
"""Calls of the denoiser for each prompt: a step with guidance is two."""


@dataclass(frozen=True)
class RewrittenModel:
    """Components of which the denoiser is rewritten, what a manifest says of that, and a sentence for each rewrite."""

    components: list[Component]
    specs: Sequence[RewriteSpec] = ()
    remarks: tuple[str, ...] = ()

    @property
    def only_these_steps(self) -> bool:
        """Whether the denoiser is right at the shipped timesteps alone."""
        return any(REWRITES[spec.name].only_these_steps for spec in self.specs)


def rewritten(
    model: LoadedModel, components: Sequence[Component], recipe: Recipe, evidence: Evidence
) -> RewrittenModel:
    """The model's components with the recipe's rewrites, whose outputs are those of before on recorded calls.

    Raises TurbopocketError for a rewrite that does not fit the model, or changes an output.
    """
    if not recipe.compress.rewrites:
        return RewrittenModel(list(components))
    draft = pipeline_manifest(model, recipe, {each.name: described(each) for each in components}, ())
    denoiser = next(each for each in components if each.name == draft.pipeline.denoiser.component)
    with TemporaryDirectory() as folder:
        write_tokenizers(model, Path(folder))
        prompts = evidence.prompts("measure", PROMPTS, recipe.seed)
        session = Session(draft, open_tokenizers(Path(folder), draft), prompts, recipe.seed)
    calls = recorded(session, components)
    encoders = {name: module_identity(model.modules[name]) for name in draft.pipeline.text_encoders}
    specs, remarks = [], []
    for name in recipe.compress.rewrites:
        rewrite = REWRITES[name]
        found = applied(rewrite, denoiser, draft.pipeline, calls, draft.sampler.timesteps)
        denoiser = found.component
        made_of = encoders if rewrite.of_text else {}
        specs.append(RewriteSpec(name=name, text_encoders=made_of, facts=dict(found.facts)))
        remarks.append(f"{name}: {found.remark}")
    return RewrittenModel(_in_order(components, denoiser), specs, tuple(remarks))


def shaped(components: Sequence[Component], recipe: Recipe, model: LoadedModel) -> list[Component]:
    """The model's components with the recipe's rewrites, for plans from shapes: constants have no values.

    Raises TurbopocketError for a rewrite that does not fit the model, as far as shapes tell, and for one that needs the
    timesteps where nothing says how many there are.
    """
    pipeline = model.family.pipeline(model, {each.name: described(each) for each in components})
    denoiser = next(each for each in components if each.name == pipeline.denoiser.component)
    for name in recipe.compress.rewrites:
        REWRITES[name].require(denoiser, pipeline)
        timesteps = sampler_spec(model, recipe.sampler).timesteps if REWRITES[name].only_these_steps else ()
        denoiser = REWRITES[name].shaped(denoiser, pipeline, timesteps)
    return _in_order(components, denoiser)


def require_same_encoders(manifest: Manifest, model: LoadedModel, artifact: Path) -> None:
    """Returns when the text encoders are those of which an artifact's rewrites hold constants; else TurbopocketError
    naming the first other one."""
    for rewrite in manifest.rewrites:
        for name, sha256 in rewrite.text_encoders.items():
            if (found := module_identity(model.modules[name])) != sha256:
                raise TurbopocketError(
                    f"{artifact}: the constants of {rewrite.name} were made from another {name}: sha256 "
                    f"{sha256[:12]}…, that of {model.name} has {found[:12]}…",
                    hint="build again",
                )


def recorded(session: Session, components: Sequence[Component]) -> list[Call]:
    """The denoiser's first calls for each of the session's prompts, drawn by the components, and one without a prompt
    where zeros stand for that: an artifact may be asked so whatever its recipe says of guidance."""
    runner = torch_runner(components)
    pipeline = session.manifest.pipeline
    calls: list[Call] = []
    for index in range(len(session.prompts)):
        first = _FirstCalls(runner, pipeline.denoiser.component, CALLS)
        with suppress(_Enough):
            session.draw(first, index)
        calls += first.calls
    if pipeline.without_prompt == "zeros":
        inputs = _without_prompt(calls[-1].inputs, pipeline)
        calls.append(Call(pipeline.denoiser.component, inputs, runner.run(pipeline.denoiser.component, inputs)))
    return calls


def _without_prompt(inputs: Arrays, pipeline: Pipeline) -> Arrays:
    feeds = pipeline.denoiser.inputs
    return {n: np.zeros_like(v) if isinstance(feeds.get(n), TextFeed) else v for n, v in inputs.items()}


class _Enough(Exception):
    """As many calls as are wanted have been recorded."""


@dataclass
class _FirstCalls:
    """A runner that records a component's first calls, and ends the drawing after them."""

    runner: Runner
    component: str
    wanted: int
    calls: list[Call] = field(default_factory=list)

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        recorder = Recorder(self.runner)
        outputs = recorder.run(component, inputs)
        if component == self.component:
            self.calls += recorder.calls
            if len(self.calls) == self.wanted:
                raise _Enough
        return outputs


def _in_order(components: Sequence[Component], denoiser: Component) -> list[Component]:
    return [denoiser if each.name == denoiser.name else each for each in components]
