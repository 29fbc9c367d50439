# SPDX-License-Identifier: Apache-2.0
"""The `turbopocket` command: parses, calls one verb, prints. Data goes to stdout, talk to stderr."""

import copy
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import OverBudget, ParityFailed, TurbopocketError
from .door import emit, manner, run_command
from .options import (
    SOURCE_HELP,
    AcceptLimit,
    ArtifactFolder,
    ArtifactFolders,
    AsJson,
    Assigned,
    AssignedToDistill,
    Budget,
    Cache,
    Config,
    Devices,
    DistillRecipeFile,
    EmulatedCpus,
    Fit,
    Formats,
    Guidance,
    Keep,
    Loras,
    MaxRam,
    OptionalSource,
    PeakMemory,
    PictureFile,
    Pins,
    Prompts,
    Quiet,
    Ray,
    RecipeFile,
    RunFolder,
    ShowVersion,
    Size,
    Sizes,
    Steps,
    TargetName,
    TargetNames,
    Verbose,
    WorkerCount,
    asked_pins,
    asked_recipe,
    talk,
)
from .recipe_commands import recipe_app
from .stage_commands import stages_app

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes SDXL-Turbo-class text-to-image models run on phones: compress, lower, check, report.",
    epilog="Exit codes: 0 fine, 1 the request was wrong, 2 over budget, 3 parity failed, 70 a bug, 128 + N signal N.",
)  # fmt: skip
app.add_typer(recipe_app, name="recipe")
arm64_app = typer.Typer(no_args_is_help=True, help="An emulated ARM CPU, for `check --cpu`.")
app.add_typer(arm64_app, name="arm64")
app.add_typer(stages_app)


@app.callback()
def _options(verbose: Verbose = False, quiet: Quiet = False, show_version: ShowVersion = False) -> None:
    """Options of every command, which it takes before its name or behind."""


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="The artifact folder to make.")],
    source: OptionalSource = None,
    config: Config = None,
    target: TargetNames = None,
    budget: Budget = None,
    peak_memory: PeakMemory = None,
    recipe: RecipeFile = None,
    assigned: Assigned = None,
    formats: Formats = None,
    pin: Pins = None,
    lora: Loras = None,
    fit: Fit = None,
    steps: Steps = None,
    size: Sizes = None,
    guidance: Guidance = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT when it is not empty.")] = False,
    workers: WorkerCount = 1,
    ray: Ray = None,
    run: RunFolder = None,
    max_ram: MaxRam = None,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Compresses a model to a budget, lowers it, checks and reports.

    What was compressed and lowered is compared with PyTorch; what differs from it more than it may is not written.
    """
    overrides = {
        "model.source": source,
        "model.config": config,
        "model.lora": lora or None,
        "target.name": target[0] if target else None,
        "target.also": target[1:] if target else None,
        "compress.budget": budget,
        "compress.peak_memory": peak_memory,
        "compress.formats": formats and formats.split(","),
        "compress.fit": fit,
        "compress.pin": asked_pins(pin),
        "sampler.steps": steps,
        "image.sizes": size or None,
        "sampler.guidance": guidance,
        "machine.max_ram": max_ram,
        "seed": seed,
    }
    asked = asked_recipe(recipe, overrides, assigned)
    from . import Workers
    from .export.request import refuse_output

    spread = Workers(workers, ray)
    refuse_output(asked, out, overwrite, run)
    from . import build_targets
    from .export.build.outcome import show_all

    made = build_targets(asked, out, overwrite, as_json or manner.quiet, spread, keep, run)
    summaries = {built.folder.name: built.summary() for built in made}
    summary = made[0].summary() if len(made) == 1 else summaries
    emit(summary, as_json, lambda console: show_all(made, console))


@app.command()
def distill(
    out: Annotated[Path, typer.Option(help="The model folder to make; checkpoints and logs go to OUT.run.")],
    source: Annotated[str | None, typer.Argument(help=f"{SOURCE_HELP} Default: the recipe's, else pocket.")] = None,
    config: Config = None,
    recipe: DistillRecipeFile = None,
    assigned: AssignedToDistill = None,
    steps: Annotated[
        int | None, typer.Option(help="Most steps of the student, 1 to 8; it also learns all fewer ones.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Student updates.")] = None,
    guidance: Annotated[float | None, typer.Option(help="The teacher's guidance; default: what it ships with.")] = None,
    prompts: Prompts = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT when it is a student.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distils a model to a few steps, from prompts alone.

    A run that was killed goes on when the same is asked for again.
    """
    from . import DistillRecipe, load_distill_recipe
    from .export.distill.run import refuse_recipe
    from .export.settings import with_values

    overrides = {
        "teacher.source": source,
        "teacher.config": config,
        "teacher.guidance": guidance,
        "distill.steps": steps,
        "distill.iterations": iterations,
        "distill.prompts": prompts,
        "seed": seed,
    }
    asked = with_values(load_distill_recipe(recipe) if recipe else DistillRecipe(), overrides, assigned or ())
    refuse_recipe(asked, out, overwrite)
    from . import distill as run_distill
    from .export.verify.table import show_remarks

    made = run_distill(asked, out, overwrite, talk(as_json))

    def show(console: Console) -> None:
        show_remarks((), made.notes, console)
        console.print(f"model     {made.folder}", soft_wrap=True)

    emit(made.summary(), as_json, show)


@app.command()
def plan(
    source: OptionalSource = None,
    config: Config = None,
    target: TargetName = None,
    budget: Budget = None,
    peak_memory: PeakMemory = None,
    recipe: RecipeFile = None,
    assigned: Assigned = None,
    formats: Formats = None,
    pin: Pins = None,
    fit: Fit = None,
    steps: Steps = None,
    size: Sizes = None,
    guidance: Guidance = None,
    measured: Annotated[Path | None, typer.Option(help="choices.json of a build: plan on measured losses.")] = None,
    max_ram: MaxRam = None,
    device: Devices = None,
    as_json: AsJson = False,
) -> None:
    """Says in seconds what fits a budget, from a model's configs.

    Weights are not read, and need not be there. Exits with 2 when a phone that was named has too little memory.
    """
    overrides = {
        "model.source": source,
        "model.config": config,
        "target.name": target,
        "compress.budget": budget,
        "compress.peak_memory": peak_memory,
        "compress.formats": formats and formats.split(","),
        "compress.fit": fit,
        "compress.pin": asked_pins(pin),
        "sampler.steps": steps,
        "image.sizes": size or None,
        "sampler.guidance": guidance,
        "machine.max_ram": max_ram,
    }
    from .export.devices import require_devices
    from .export.request import require_measured

    asked = asked_recipe(recipe, overrides, assigned)
    require_devices(device or ())
    if measured is not None:
        require_measured(measured)
    from . import plan as run_plan
    from .export.plan import show_plan

    planned = run_plan(asked, measured, devices=device or ())
    emit(planned.summary(), as_json, lambda console: show_plan(planned, console))
    if not all(each.fits for each in planned.devices):
        raise typer.Exit(OverBudget.exit_code)


@app.command()
def check(
    artifact: ArtifactFolders,
    cpu: EmulatedCpus = None,
    cache: Cache = None,
    accept_limit: AcceptLimit = False,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Stop after the files' hashes: all that an artifact alone can tell.")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Only repeat the build's self-check, as a phone does; no model needed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verifies an artifact's files, and its outputs by PyTorch."""
    from .export.output.staging import artifacts_in
    from .export.request import open_emulators, read_artifact

    artifacts = artifacts_in(artifact) or [artifact]
    open_emulators(cpu or (), cache, self_test)
    for path in artifacts:
        read_artifact(path)
    from . import check as run_check

    asked = talk(as_json), cpu or (), cache, accept_limit, files_only, self_test
    results = {path: run_check(path, *asked) for path in artifacts}
    summaries = {path.name: result.summary() for path, result in results.items()}

    def show(console: Console) -> None:
        for result in results.values():
            result.show(console)

    emit(summaries if len(summaries) > 1 else next(iter(summaries.values())), as_json, show)
    for path, result in results.items():
        if result.failure is not None:
            raise ParityFailed(f"{path}: {result.failure}")
    for path, result in results.items():
        if result.gaps is None and not (files_only or self_test):
            raise TurbopocketError(
                f"{path}: files are right, parity was not measured: {result.why_not}",
                hint="--files-only asks for no more than the files",
            )


@app.command()
def generate(
    artifact: ArtifactFolder,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: PictureFile = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: what the artifact ships.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance.")] = None,
    size: Size = None,
    negative: Annotated[str | None, typer.Option(help="What guidance is to steer away from.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin with, cut to the artifact's size.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it changes, up to 1; default 0.6.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the picture when it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draws a picture from an artifact alone."""
    from . import Artifact
    from .export.artifact import DEFAULT_STRENGTH
    from .export.output.staging import refuse_file, write_atomically
    from .export.picture_file import file_bytes, kind_of

    kind = kind_of(out)
    refuse_file(out, overwrite)
    if artifact.resolve() in out.resolve().parents:
        raise TurbopocketError(f"output {out} is in the artifact, which would not match its manifest any more")
    opened = Artifact.open(artifact)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = opened.generate(prompt, seed, steps, guidance, negative, size, image, strength)
    seconds = time.monotonic() - start
    write_atomically(out, file_bytes(picture, kind), overwrite)
    cautions = list(dict.fromkeys(str(warning.message) for warning in caught))
    sampler = opened.manifest.sampler
    result = {
        "picture": str(out),
        "prompt": prompt,
        "seed": seed,
        "size": f"{picture.width}x{picture.height}",
        "steps": steps or sampler.steps,
        "guidance": sampler.guidance_scale if guidance is None else guidance,
        "seconds": round(seconds, 3),
        "negative_prompt": negative,
        "image": None if image is None else str(image),
        "strength": DEFAULT_STRENGTH if image is not None and strength is None else strength,
        "warnings": cautions,
    }
    for caution in cautions:
        print(f"warning: {caution}", file=sys.stderr)
    emit(result, as_json, lambda console: console.print(str(out), soft_wrap=True))


@app.command()
def report(artifact: ArtifactFolder, as_json: AsJson = False) -> None:
    """Writes report.html again from what the build measured."""
    from .export.report.rewrite import rewrite_report

    path = rewrite_report(artifact)
    emit({"report": str(path)}, as_json, lambda console: console.print(str(path), soft_wrap=True))


@app.command()
def formats(as_json: AsJson = False) -> None:
    """Lists formats by target, with the reason beside every no."""
    from .export.listings import format_rows, show_formats

    rows = format_rows()
    emit({"formats": rows}, as_json, lambda console: show_formats(rows, console))


@app.command()
def models(as_json: AsJson = False) -> None:
    """Lists the bundled models, and the pipelines that load."""
    from .export.listings import model_rows, show_models

    rows = model_rows()
    emit(rows, as_json, lambda console: show_models(rows, console))


@arm64_app.command("setup")
def arm64_setup(cache: Cache = None, as_json: AsJson = False) -> None:
    """Fetches emulator, ARM libraries, compiler: once, 175 MB."""
    from .runtimes.arm64.setup import default_cache, prepare

    found = prepare(cache or default_cache(), talk(as_json).remark)
    emit(found, as_json, lambda console: console.print(f"cache     {found['cache']}", soft_wrap=True))


def _with_common_options(command: Any, options: list[Any]) -> None:
    for each in getattr(command, "commands", {}).values():
        if hasattr(each, "commands"):
            _with_common_options(each, options)
        else:
            each.params += options


def main() -> None:
    """Runs the command."""
    root: Any = typer.main.get_command(app)
    common = [copy.copy(option) for option in root.params if option.name in ("verbose", "quiet")]
    for option in common:
        option.expose_value = False
    _with_common_options(root, common)
    run_command(lambda: root(prog_name="turbopocket", standalone_mode=False))
