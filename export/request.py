# SPDX-License-Identifier: Apache-2.0
"""What of a request this machine can tell to be wrong before PyTorch is imported, which takes longer than a mistake
should take. Stages ask the same functions when their turn comes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..ground.errors import TurbopocketError
from ..runtimes.arm64.cpus import Cpu, parse_cpu
from ..runtimes.arm64.emulator import Emulator
from ..runtimes.arm64.setup import default_cache, open_emulator
from ..runtimes.drawing.redundant import require_agreement
from ..runtimes.manifest import Manifest, load_manifest
from .checkpoint.lora.header import read_lora
from .checkpoint.source import require_source
from .evidence import read_prompts
from .output.owned import refuse_build, refuse_builds, refuse_journal
from .output.staging import claimed, output_path, run_folder, settle_output
from .recipe import Recipe, recipe_of


def refuse_recipe(recipe: Recipe) -> None:
    """Raises TurbopocketError when the model, a LoRA or the prompts that a recipe names are not there, or no such."""
    require_source(recipe.model.source, recipe.model.config)
    for each in recipe.model.lora:
        read_lora(each.file)
    if recipe.calibrate.prompts is not None:
        read_prompts(recipe.calibrate.prompts)


def refuse_output(recipe: Recipe, out: Path, overwrite: bool, run: Path | None) -> None:
    """Raises TurbopocketError when a build of the recipe's targets can not write to `out`, or work in `run`."""
    out = output_path(out)
    refuse = refuse_build if len(recipe.per_target()) == 1 else refuse_builds
    _refuse(out, lambda: refuse(out, run or run_folder(out), overwrite))


def refuse_stage_output(out: Path, run: Path | None) -> None:
    """Raises TurbopocketError when a stage of a build of `out` can not work in `run`."""
    out = output_path(out)
    _refuse(out, lambda: refuse_journal(run or run_folder(out)))


def _refuse(out: Path, refuse: Callable[[], None]) -> None:
    with claimed(out, refuse):
        pass  # and let go of: the build claims it for itself


def read_artifact(artifact: Path) -> tuple[Manifest, Recipe]:
    """An artifact's manifest, and the recipe in it.

    Raises TurbopocketError for a folder that is no artifact, and when the recipe is for another target than the
    artifact, or the manifest contradicts itself elsewhere.
    """
    settle_output(artifact)
    manifest = load_manifest(artifact)
    require_agreement(manifest)
    recipe = recipe_of(artifact, manifest)
    if recipe.target.name != manifest.target:
        raise TurbopocketError(
            f"{artifact} is for {manifest.target}, and the recipe in its manifest for {recipe.target.name}",
            hint="the manifest was changed: build again",
        )
    return manifest, recipe


def open_emulators(cpus: Sequence[str], cache: Path | None, self_test: bool) -> list[tuple[Cpu, Emulator]]:
    """The emulated CPUs that a check asks for. Raises TurbopocketError for one that is not known, or not set up in
    `cache`, and for any beside the self-test."""
    if self_test and cpus:
        raise TurbopocketError(f"the self-test runs here alone, {', '.join(cpus)} was asked with it")
    return [(cpu, open_emulator(cache or default_cache())) for cpu in map(parse_cpu, cpus)]


def require_measured(file: Path) -> None:
    """Raises TurbopocketError when there are no measured losses to plan on."""
    if not file.is_file():
        raise TurbopocketError(f"{file} is not a file; --measured takes the choices.json of a build")
