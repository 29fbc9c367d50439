# SPDX-License-Identifier: Apache-2.0
"""Is an artifact what its build made, and does it still compute what PyTorch computes?"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..ground.errors import TurbopocketError
from ..quant.compress import load_weights
from ..quant.ranges import load_ranges
from ..runtimes.arm64.cpus import PREFIX, parse_cpu
from ..runtimes.arm64.setup import default_cache, open_emulator
from ..runtimes.drawing.redundant import require_agreement
from ..runtimes.drawing.tokenizer import open_tokenizers
from ..runtimes.manifest import Manifest, load_manifest, verify
from .build.manifest import planned_schemes
from .checkpoint.load import load
from .evidence import evidence_for
from .families.components import layers_of
from .families.sizes import size_notes
from .output.kept import RANGES_FILE, WEIGHTS_FILE
from .output.staging import report_folder, settle_output
from .progress import StageProgress
from .recipe import parse_recipe
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
    """

    manifest: Manifest
    gaps: Gaps | None
    why_not: str | None
    unverified: tuple[str, ...]
    notes: tuple[str, ...]
    emulated: Mapping[str, Emulated] = field(default_factory=dict)

    @property
    def failure(self) -> str | None:
        """One sentence on the first thing that is wrong, None when everything that could be checked is right."""
        if self.gaps and self.gaps.failure:
            return self.gaps.failure
        failures = {name: each.failure for name, each in self.emulated.items()}
        return next((f"{name} {failure}" for name, failure in failures.items() if failure), None)

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "files": len(self.manifest.files),
            "bytes": self.manifest.total_bytes,
            "files_verified": True,
            "parity": parity_summary(self.gaps) if self.gaps else None,
            "parity_not_measured": self.why_not,
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
) -> Checked:
    """Verifies every file against the manifest, then measures both gaps again, and once more on each emulated CPU.

    What is wrong with the numbers is the outcome's `failure`; `progress` is told of each stage, by default on stderr.

    Parity needs what lies beside the artifact after a build (the stored weights as PyTorch reads them) and the float
    model; without the former only the files are checked. Raises TurbopocketError for files that do not match, a
    manifest that contradicts itself, and emulated CPUs (`arm64:<name>`) that are not known, not set up in `cache`, or
    could not be compared with PyTorch.
    """
    emulators = [(cpu, open_emulator(cache or default_cache())) for cpu in map(parse_cpu, cpus)]
    artifact, progress = Path(artifact), progress or StageProgress()
    settle_output(artifact)
    manifest = load_manifest(artifact)
    require_agreement(manifest)
    recipe = parse_recipe(manifest.recipe, f"{artifact}: the manifest's recipe")
    target = open_target(recipe.target)
    with progress.stage("verify"):
        verify(artifact, manifest)
        unverified = target.inspect(artifact, manifest)
        notes = (*manifest.notes, *target.notes(artifact, manifest))
    stored = report_folder(artifact.absolute()) / WEIGHTS_FILE
    if not stored.is_file():
        why_not = f"{stored} is not there; it is made by `build`, beside the artifact"
        if emulators:
            raise TurbopocketError(f"{artifact} can not be compared on {', '.join(cpus)}: {why_not}")
        return Checked(manifest, None, why_not, unverified, notes)
    with progress.stage("load"):
        model = load(recipe.model.source, recipe.model.lora, recipe.sampler.steps, recipe.model.config)
        evidence = evidence_for(model)
        asked = manifest, open_tokenizers(artifact, manifest), evidence, recipe.parity.pictures, recipe.seed
        session = Session.of_report(*asked)
        notes += size_notes(model, manifest.sizes)
    components = target.components(model, manifest.sizes, recipe.sampler.image_to_image)
    kept, ranges = load_weights(stored), load_ranges(stored.parent / RANGES_FILE)
    weights = {name: kept[name] for name in layers_of(components) if name in kept}
    schemes = target.schemes_of(weights, planned_schemes(manifest), ranges)
    limit = recipe.parity.max_lowering_error or target.lowering_limit(schemes)
    asked_of = artifact, manifest, weights, limit
    runtimes = target.runtimes(*asked_of) | target.kernel_runtimes(*asked_of)
    as_run = [target.as_run(component, weights, ranges, schemes) for component in components]
    with progress.stage("reference"):
        to_diffusers = compare_with_diffusers(model, torch_runner(components), session)
    with progress.stage("compare", gap_steps(runtimes)) as advance:
        gaps = measure_gaps(components, as_run, kept, runtimes, session, evidence, to_diffusers, advance)
    here = next(iter(runtimes.values()))
    emulated = {}
    for cpu, emulator in emulators:
        there = target.emulated(artifact, manifest, weights, cpu, emulator, schemes)
        with progress.stage(cpu.name, 2) as advance, closing(there.runner):
            measured = measure_emulated(
                components, as_run, kept, there, here, gaps.compression, session, evidence, advance
            )
        emulated[f"{PREFIX}{cpu.name}"] = measured
    return Checked(manifest, gaps, None, unverified, notes, emulated)
