# SPDX-License-Identifier: Apache-2.0
"""Is an artifact what its build made, and does it still compute what PyTorch computes?"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..ground.errors import TurbopocketError
from ..quant.ranges import load_ranges
from ..quant.store import load_weights
from ..runtimes.arm64.cpus import PREFIX, Cpu
from ..runtimes.arm64.emulator import Emulator
from ..runtimes.compare.self_check import SelfTest
from ..runtimes.compare.self_check import self_test as run_self_test
from ..runtimes.drawing.tokenizer import open_tokenizers
from ..runtimes.manifest import Manifest, verify
from ..runtimes.open import open_runner
from .build.manifest import planned_schemes
from .build.rewriting import require_same_encoders, rewritten
from .checkpoint.identity import model_identity
from .checkpoint.load import load
from .evidence import Evidence, evidence_for
from .families.base import LoadedModel
from .families.components import layers_of
from .families.graphs import Component
from .families.sizes import size_notes
from .output.names import RANGES_FILE, WEIGHTS_FILE
from .output.staging import report_folder
from .progress import StageProgress
from .recipe import Recipe
from .request import open_emulators, read_artifact
from .targets.base import Target
from .targets.registry import open_target
from .verify.diffusers_reference import compare_with_diffusers
from .verify.emulated import Emulated, measure_emulated
from .verify.gaps import Gaps, Session, gap_steps, measure_gaps, torch_runner
from .verify.table import parity_summary, show_parity, show_remarks


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        manifest: the artifact's, whose files are as it says.
        gaps: what compression changed and what lowering did, per component and timestep; None when only the files
            could be checked, and `why_not` then says why.
        unverified: what only a device can tell; notes: what to know of the model and of how it ran on this machine.
        emulated: gaps on emulated CPUs, by name.
        self_test: the build's self-check, run here; None when it was not asked for.
        loosened: one sentence on a limit in the artifact's recipe that is above its target's own, and was not accepted.
    """

    manifest: Manifest
    gaps: Gaps | None
    why_not: str | None
    unverified: tuple[str, ...]
    notes: tuple[str, ...]
    emulated: Mapping[str, Emulated] = field(default_factory=dict)
    loosened: str | None = None
    self_test: SelfTest | None = None

    @property
    def failure(self) -> str | None:
        """One sentence on the first thing that is wrong, None when everything that could be checked is right."""
        if self.self_test and self.self_test.failure:
            return self.self_test.failure
        if self.gaps and self.gaps.failure:
            return self.gaps.failure
        failures = {name: each.failure for name, each in self.emulated.items()}
        return next((f"{name} {failure}" for name, failure in failures.items() if failure), self.loosened)

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "files": len(self.manifest.files),
            "bytes": self.manifest.total_bytes,
            "files_verified": True,
            "parity": parity_summary(self.gaps) if self.gaps else None,
            "parity_not_measured": self.why_not,
            "self_test": self.self_test and self.self_test.summary(),
            "emulated": {name: each.summary() for name, each in self.emulated.items()},
            "not_verified_on_device": list(self.unverified),
            "notes": list(self.notes),
        }

    def show(self, console: Console) -> None:
        """Prints the outcome for a person."""
        console.print(f"{len(self.manifest.files)} files are as the manifest says", highlight=False)
        if self.gaps is None:
            console.print(f"parity was not measured: {self.why_not}", highlight=False, soft_wrap=True)
        else:
            show_parity(self.gaps, console, self.emulated)
        if self.self_test is not None:
            console.print(str(self.self_test), highlight=False, soft_wrap=True)
        for name, each in self.emulated.items():
            ran = ", ".join(f"{count:,} {kind}" for kind, count in each.kernels.items())
            console.print(
                f"{name} drew in {each.steps} steps; instructions it ran: {ran}", highlight=False, soft_wrap=True
            )
        show_remarks(self.unverified, self.notes, console)


def check(
    artifact: Path | str,
    progress: StageProgress | None = None,
    cpus: Sequence[str] = (),
    cache: Path | None = None,
    accept_limit: bool = False,
    files_only: bool = False,
    self_test: bool = False,
) -> Checked:
    """Verifies every file against the manifest, then measures both gaps again, and once more on each emulated CPU.

    What is wrong with the numbers is the outcome's `failure`; `progress` is told of each stage, by default on stderr.

    A limit in the artifact's recipe that is above its target's own is a failure unless `accept_limit`: whoever may have
    changed the artifact may have written it.

    With `self_test` the build's self-check is run instead, which needs the artifact alone: what a phone does once.

    Parity needs what lies beside the artifact after a build (the stored weights as PyTorch reads them) and the float
    model; without the former, or with `files_only`, only the files are checked. Raises TurbopocketError for files that
    do not match, a manifest that contradicts itself, and emulated CPUs (`arm64:<name>`) not known, not set up in
    `cache` or not run.
    """
    emulators = open_emulators(cpus, cache, self_test)
    artifact, progress = Path(artifact), progress or StageProgress()
    manifest, recipe = read_artifact(artifact)
    target = open_target(recipe.target)
    with progress.stage("verify"):
        verify(artifact, manifest)
        unverified = target.inspect(artifact, manifest)
        notes = (*manifest.notes, *target.notes(artifact, manifest))
    if self_test:
        return _self_tested(artifact, manifest, unverified, notes, progress)
    stored = report_folder(artifact.absolute()) / WEIGHTS_FILE
    if why_not := _why_no_parity(artifact, stored, cpus, files_only):
        return Checked(manifest, None, why_not, unverified, notes)
    files = Checked(manifest, None, None, unverified, notes)
    return _compared(files, artifact, recipe, target, stored, emulators, accept_limit, progress)


def _compared(
    files: Checked,
    artifact: Path,
    recipe: Recipe,
    target: Target,
    stored: Path,
    emulators: Sequence[tuple[Cpu, Emulator]],
    accept_limit: bool,
    progress: StageProgress,
) -> Checked:
    """What was found of the files, with both gaps, here and on the emulated CPUs."""
    manifest = files.manifest
    with progress.stage("load"):
        model = _model(artifact, manifest, recipe)
        evidence, tokenizers = evidence_for(model), open_tokenizers(artifact, manifest)
        session = Session.of_report(manifest, tokenizers, evidence, recipe.parity.pictures, recipe.seed)
    components = _components(target, model, manifest, recipe, evidence)
    kept, ranges = load_weights(stored), load_ranges(stored.parent / RANGES_FILE)
    weights = {name: kept[name] for name in layers_of(components) if name in kept}
    schemes = target.schemes_of(weights, planned_schemes(manifest), ranges)
    own_limit = target.lowering_limit(schemes)
    limit = recipe.parity.max_lowering_error or own_limit
    asked_of = artifact, manifest, weights, limit, schemes
    runtimes = target.runtimes(*asked_of) | target.kernel_runtimes(*asked_of)
    as_run = [target.as_run(component, weights, ranges, schemes) for component in components]
    with progress.stage("reference"):
        to_diffusers = compare_with_diffusers(model, torch_runner(components), session)
    with progress.stage("compare", gap_steps(runtimes)) as advance:
        gaps = measure_gaps(components, as_run, kept, runtimes, session, evidence, to_diffusers, advance)
    here = next(iter(runtimes.values()))
    emulated: dict[str, Emulated] = {}
    for cpu, emulator in emulators:
        there = target.emulated(artifact, manifest, weights, cpu, emulator, schemes)
        with progress.stage(cpu.name, 2) as advance, closing(there.runner):
            asked = components, as_run, kept, there, here, gaps.compression, session, evidence, advance
            emulated[f"{PREFIX}{cpu.name}"] = measure_emulated(*asked)
    loosened = None if accept_limit else _loosened(limit, own_limit, target.name)
    notes = (*files.notes, *size_notes(model, manifest.sizes))
    return replace(files, gaps=gaps, notes=notes, emulated=emulated, loosened=loosened)


def _self_tested(
    artifact: Path, manifest: Manifest, unverified: tuple[str, ...], notes: tuple[str, ...], progress: StageProgress
) -> Checked:
    with progress.stage("self-test"):
        found = run_self_test(artifact, manifest, open_tokenizers(artifact, manifest), open_runner(artifact, manifest))
    return Checked(manifest, None, "only the self-test was asked for", unverified, notes, self_test=found)


def _why_no_parity(artifact: Path, stored: Path, cpus: Sequence[str], files_only: bool) -> str | None:
    """Why only the files are checked, if so. Raises TurbopocketError when more was asked for."""
    if files_only:
        why_not = "only the files were asked for"
    elif stored.is_file():
        return None
    else:
        why_not = f"{stored} is not there; it is made by `build`, beside the artifact"
    if cpus:
        raise TurbopocketError(f"{artifact} can not be compared on {', '.join(cpus)}: {why_not}")
    return why_not


def _model(artifact: Path, manifest: Manifest, recipe: Recipe) -> LoadedModel:
    """The float model. Raises TurbopocketError when its content is not that of the model the artifact was made from, or
    its text encoders are not those of which the artifact holds constants."""
    model = load(recipe.model.source, recipe.model.lora, recipe.sampler.steps, recipe.model.config)
    if manifest.model is not None and model_identity(model) != manifest.model.sha256:
        raise TurbopocketError(
            f"{recipe.model.source} is not the model that {artifact} was made from, {manifest.model.name} with "
            f"sha256 {manifest.model.sha256[:12]}…: its weights, configs or tokenizers differ"
        )
    require_same_encoders(manifest, model, artifact)
    return model


def _components(
    target: Target, model: LoadedModel, manifest: Manifest, recipe: Recipe, evidence: Evidence
) -> list[Component]:
    """The float model's graphs, with the rewrites of the artifact's."""
    components = target.components(model, manifest.sizes, recipe.sampler.image_to_image)
    return rewritten(model, components, recipe, evidence).components


def _loosened(limit: float, own: float, target: str) -> str | None:
    if limit <= own:
        return None
    return (
        f"its recipe allows a lowering error of {limit:g}, where {target} allows {own:g}; --accept-limit takes the "
        "recipe's for it"
    )
