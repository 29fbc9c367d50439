# SPDX-License-Identifier: Apache-2.0
"""Is an artifact what its build made, and does it still compute what PyTorch computes?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..quant.compress import load_weights
from ..runtimes.manifest import Manifest, load_manifest, verify
from ..runtimes.tokenizer import open_tokenizers
from .build import WEIGHTS_FILE
from .families import load
from .families.evidence import evidence_for
from .parity import Gaps, Session, gap_steps, measure_gaps
from .progress import StageProgress
from .recipe import parse_recipe
from .results import parity_summary, parity_table, show_unverified
from .staging import report_folder
from .targets import open_target


@dataclass(frozen=True)
class Checked:
    """What a check found. `gaps` is None when only the files could be checked; `why_not` then says why.

    `unverified` lists what only a device can tell.
    """

    manifest: Manifest
    gaps: Gaps | None
    why_not: str | None
    unverified: tuple[str, ...]

    @property
    def failure(self) -> str | None:
        """One sentence on the first thing that is wrong, None when everything that could be checked is right."""
        return self.gaps.failure if self.gaps else None

    def summary(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "files": len(self.manifest.files),
            "bytes": self.manifest.total_bytes,
            "files_verified": True,
            "parity": parity_summary(self.gaps) if self.gaps else None,
            "parity_not_measured": self.why_not,
            "not_verified_on_device": list(self.unverified),
        }

    def show(self, console: Console) -> None:
        """Prints the outcome for a person."""
        console.print(f"{len(self.manifest.files)} files are as the manifest says", highlight=False)
        if self.gaps is None:
            console.print(f"parity was not measured: {self.why_not}", highlight=False, soft_wrap=True)
        else:
            console.print(parity_table(self.gaps))
        show_unverified(self.unverified, console)


def check(artifact: Path, progress: StageProgress) -> Checked:
    """Verifies every file against the manifest, then measures both gaps again.

    Parity needs what lies beside the artifact after a build (the stored weights as PyTorch reads them) and the float
    model; without the former only the files are checked. Raises TurbopocketError for files that do not match.
    """
    manifest = load_manifest(artifact)
    recipe = parse_recipe(manifest.recipe, f"{artifact}: the manifest's recipe")
    target = open_target(recipe.target)
    with progress.stage("verify"):
        verify(artifact, manifest)
        unverified = target.inspect(artifact, manifest)
    stored = report_folder(artifact.absolute()) / WEIGHTS_FILE
    if not stored.is_file():
        why_not = f"{stored} is not there; it is made by `build`, beside the artifact"
        return Checked(manifest, None, why_not, unverified)
    with progress.stage("load"):
        model = load(recipe.model.source, recipe.model.lora, recipe.sampler.steps)
        evidence = evidence_for(model)
        prompts = evidence.prompts("report", recipe.parity.pictures, recipe.seed)
        session = Session(manifest, open_tokenizers(artifact, manifest), prompts, recipe.seed)
    components, weights = target.components(model), load_weights(stored)
    limit = recipe.parity.max_lowering_error or target.lowering_limit(weights)
    runtimes = target.runtimes(artifact, manifest, weights, limit)
    with progress.stage("compare", gap_steps(runtimes)) as advance:
        as_run = [target.as_run(component, weights) for component in components]
        gaps = measure_gaps(components, as_run, weights, runtimes, session, evidence, advance)
    return Checked(manifest, gaps, None, unverified)
