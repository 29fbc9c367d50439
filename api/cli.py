# SPDX-License-Identifier: Apache-2.0
"""The `turbopocket` command: parses, calls one verb, prints. Data goes to stdout, talk to stderr."""

import io
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import ParityFailed, TurbopocketError
from .door import run_command, show_tracebacks
from .options import (
    SOURCE_HELP,
    ArtifactFolder,
    ArtifactFolders,
    AsJson,
    Assigned,
    AssignedToDistill,
    Budget,
    Cache,
    Config,
    Formats,
    Loras,
    OptionalSource,
    Pins,
    Ray,
    RecipeFile,
    RunFolder,
    Size,
    Sizes,
    TargetName,
    TargetNames,
    WorkerCount,
    asked_pins,
    asked_recipe,
    emit,
)
from .stage_commands import stages_app

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Makes SDXL-Turbo-class text-to-image models run on phones: compress, lower, check, report.",
)  # fmt: skip
recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: what a build asks for.")
app.add_typer(recipe_app, name="recipe")
arm64_app = typer.Typer(no_args_is_help=True, help="An emulated ARM CPU, for `check --cpu`.")
app.add_typer(arm64_app, name="arm64")
app.add_typer(stages_app)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of a bug.")] = False,
) -> None:
    show_tracebacks(verbose)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="The artifact folder to make.")],
    source: OptionalSource = None,
    config: Config = None,
    target: TargetNames = None,
    budget: Budget = None,
    recipe: RecipeFile = None,
    assigned: Assigned = None,
    formats: Formats = None,
    pin: Pins = None,
    lora: Loras = None,
    fit: Annotated[str | None, typer.Option(help="How values are chosen: absmax, mse, gptq or vqdm.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps the artifact ships with.")] = None,
    size: Sizes = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance the artifact ships with; 1 or less: none.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT when it is not empty.")] = False,
    workers: WorkerCount = 1,
    ray: Ray = None,
    run: RunFolder = None,
    keep: Annotated[
        bool | None, typer.Option(help="Whether intermediate results stay; default: when they are not over 1 GiB.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compresses a model to a byte budget, lowers it, checks it against PyTorch and writes a report."""
    from . import Workers, build_targets
    from .export.build.outcome import show_built

    overrides = {
        "model.source": source,
        "model.config": config,
        "model.lora": lora or None,
        "target.name": target[0] if target else None,
        "target.also": target[1:] if target else None,
        "compress.budget": budget,
        "compress.formats": formats and formats.split(","),
        "compress.fit": fit,
        "compress.pin": asked_pins(pin),
        "sampler.steps": steps,
        "image.sizes": size or None,
        "sampler.guidance": guidance,
        "seed": seed,
    }
    made = build_targets(
        asked_recipe(recipe, overrides, assigned), out, overwrite, as_json, Workers(workers, ray), keep, run
    )
    summaries = {built.folder.name: built.summary() for built in made}

    def show(console: Console) -> None:
        for built in made:
            show_built(built, console)

    emit(made[0].summary() if len(made) == 1 else summaries, as_json, show)


@app.command()
def distill(
    out: Annotated[Path, typer.Option(help="The model folder to make; checkpoints and logs go to OUT.run.")],
    source: Annotated[str | None, typer.Argument(help=f"{SOURCE_HELP} Default: the recipe's, else pocket.")] = None,
    config: Config = None,
    recipe: RecipeFile = None,
    assigned: AssignedToDistill = None,
    steps: Annotated[
        int | None, typer.Option(help="Most steps of the student, 1 to 8; it also learns all fewer ones.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Student updates.")] = None,
    guidance: Annotated[float | None, typer.Option(help="The teacher's guidance; default: what it ships with.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line; default: the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT when it is a student.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distils a model to a few steps; prompts only, no pictures. Goes on where a killed run of the same request was."""
    from . import DistillRecipe, StageProgress, load_distill_recipe
    from . import distill as run_distill
    from .export.settings import with_values
    from .export.verify.table import show_remarks

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
    made = run_distill(asked, out, overwrite, StageProgress(quiet=as_json))

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
    recipe: RecipeFile = None,
    assigned: Assigned = None,
    formats: Formats = None,
    pin: Pins = None,
    measured: Annotated[Path | None, typer.Option(help="choices.json of a build: plan on measured losses.")] = None,
    as_json: AsJson = False,
) -> None:
    """Says in seconds what fits a budget, from the model's configs alone: no weights are read."""
    from . import plan as run_plan
    from .export.plan import show_plan

    overrides = {
        "model.source": source,
        "model.config": config,
        "target.name": target,
        "compress.budget": budget,
        "compress.formats": formats and formats.split(","),
        "compress.pin": asked_pins(pin),
    }
    planned = run_plan(asked_recipe(recipe, overrides, assigned), measured)
    emit(planned.summary(), as_json, lambda console: show_plan(planned, console))


@app.command()
def check(
    artifact: ArtifactFolders,
    cpu: Annotated[list[str] | None, typer.Option(help="Also on an emulated CPU, such as arm64:cortex-a76.")] = None,
    cache: Cache = None,
    accept_limit: Annotated[
        bool,
        typer.Option("--accept-limit", help="Take the limit of its recipe, even above the target's own."),
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Only repeat the build's self-check, as a phone does; no model needed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verifies an artifact's files against its manifest, and its outputs against PyTorch."""
    from . import StageProgress
    from . import check as run_check
    from .export.output.staging import artifacts_in

    asked = StageProgress(quiet=as_json), cpu or (), cache, accept_limit, self_test
    results = {path: run_check(path, *asked) for path in artifacts_in(artifact) or [artifact]}
    summaries = {path.name: result.summary() for path, result in results.items()}

    def show(console: Console) -> None:
        for result in results.values():
            result.show(console)

    emit(summaries if len(summaries) > 1 else next(iter(summaries.values())), as_json, show)
    for path, result in results.items():
        if result.failure is not None:
            raise ParityFailed(f"{path}: {result.failure}")


@app.command()
def generate(
    artifact: ArtifactFolder,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("out.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: what the artifact ships.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance.")] = None,
    size: Size = None,
    negative: Annotated[str | None, typer.Option(help="What guidance is to steer away from.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin with, cut to the artifact's size.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it changes, up to 1; default 0.6.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the PNG when it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draws a picture from the artifact alone; PyTorch is not used."""
    from . import Artifact
    from .export.artifact import DEFAULT_STRENGTH
    from .export.output.staging import refuse_file, write_atomically

    refuse_file(out, overwrite)
    if artifact.resolve() in out.resolve().parents:
        raise TurbopocketError(f"output {out} is in the artifact, which would not match its manifest any more")
    opened = Artifact.open(artifact)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = opened.generate(prompt, seed, steps, guidance, negative, size, image, strength)
    seconds = time.monotonic() - start
    data = io.BytesIO()
    picture.save(data, format="PNG")
    write_atomically(out, data.getvalue(), overwrite)
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
    from .export.report.page import rewrite_report

    path = rewrite_report(artifact)
    emit({"report": str(path)}, as_json, lambda console: console.print(str(path), soft_wrap=True))


@app.command()
def formats(as_json: AsJson = False) -> None:
    """Lists formats × targets, with the reason beside every no."""
    from .export.listings import format_rows, show_formats

    rows = format_rows()
    emit({"formats": rows}, as_json, lambda console: show_formats(rows, console))


@app.command()
def models(as_json: AsJson = False) -> None:
    """Lists the bundled models and the pipeline classes that load."""
    from .export.listings import model_rows, show_models

    rows = model_rows()
    emit(rows, as_json, lambda console: show_models(rows, console))


@arm64_app.command("setup")
def arm64_setup(cache: Cache = None, as_json: AsJson = False) -> None:
    """Fetches the emulator, ARM libraries and a cross compiler (about 175 MB) into a cache folder; once."""
    from .runtimes.arm64.setup import default_cache, prepare

    talk = Console(stderr=True, quiet=as_json, markup=False)
    found = prepare(cache or default_cache(), lambda text: talk.print(text, highlight=False, soft_wrap=True))
    emit(found, as_json, lambda console: console.print(f"cache     {found['cache']}", soft_wrap=True))


@recipe_app.command("show")
def recipe_show(
    name: Annotated[str | None, typer.Argument(help="A .toml file or a shipped recipe's name.")] = None,
    assigned: Assigned = None,
    of_distill: Annotated[bool, typer.Option("--distill", help="A recipe of `distill`, not of `build`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prints a recipe with every default filled in."""
    from . import DistillRecipe, Recipe, load_distill_recipe, load_recipe
    from .export.settings import Section, with_values

    shown: Section
    if of_distill:
        shown = load_distill_recipe(name) if name else DistillRecipe()
    else:
        shown = load_recipe(name) if name else Recipe()
    shown = with_values(shown, {}, assigned or ())
    emit(shown.model_dump(mode="json"), as_json, lambda _: print(shown.to_toml(), end=""))


def main() -> None:
    """Runs the command."""
    run_command(lambda: app(standalone_mode=False))
