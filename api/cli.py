# SPDX-License-Identifier: Apache-2.0
"""The `turbopocket` command: parses, calls one verb, prints. Data goes to stdout, talk to stderr."""

import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import ParityFailed, TurbopocketError
from .export.signals import Stopped, stopped_by_signals
from .export.target_options import TARGET_ENTRIES, with_several_sizes

if TYPE_CHECKING:
    from . import Recipe

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Makes SDXL-Turbo-class text-to-image models run on phones: compress, lower, check, report.",
)  # fmt: skip
recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: what a build asks for.")
app.add_typer(recipe_app, name="recipe")
arm64_app = typer.Typer(no_args_is_help=True, help="An emulated ARM CPU, for `check --cpu`.")
app.add_typer(arm64_app, name="arm64")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
SOURCE_HELP = "A bundled name (see `models`), a diffusers folder, a single-file checkpoint, or a hub id."
Source = Annotated[str, typer.Argument(help=SOURCE_HELP)]
OptionalSource = Annotated[str | None, typer.Argument(help=f"{SOURCE_HELP} Default: the recipe's, else pocket-turbo.")]
Config = Annotated[
    str | None, typer.Option("--config", help="For a single file or a UNet: a folder or hub id with all that it lacks.")
]
TARGET_HELP = f"What the phone runs: {', '.join(TARGET_ENTRIES)}."
TargetName = Annotated[str | None, typer.Option("--target", help=TARGET_HELP)]
TargetNames = Annotated[list[str] | None, typer.Option("--target", help=f"{TARGET_HELP} May be given several times.")]
ArtifactFolder = Annotated[Path, typer.Argument(help="A folder that `build` made.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the emulated CPU; default: in the user's cache folder.")]
ArtifactFolders = Annotated[Path, typer.Argument(help="An artifact, or a folder of artifacts, that `build` made.")]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="A .toml file or a shipped recipe's name.")]
SET_HELP = "Any other key of the recipe, such as target.coreml.deployment=iOS17; see `recipe show`. May be repeated."
Assigned = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)]
SET_DISTILL_HELP = "Any other key, such as distill.method=mse; see `recipe show --distill`. May be repeated."
AssignedToDistill = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_DISTILL_HELP)]
Budget = Annotated[str | None, typer.Option(help="Bytes of the whole artifact, such as 8MB.")]
Formats = Annotated[str | None, typer.Option(help="Candidate formats or schemes, comma-separated; see `formats`.")]
LORA_HELP = "LoRA .safetensors merged before compression, at strength 1 or as in FILE:0.8; may be given several times."
Loras = Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[:STRENGTH]", help=LORA_HELP)]
Pins = Annotated[list[str] | None, typer.Option("--pin", help="GLOB=FORMAT (or scheme) for layers that must keep it.")]

SIZE_HELP = "WIDTHxHEIGHT of pictures in pixels, such as 768x512"
SEVERAL = f"For {' or '.join(with_several_sizes())} several times, the default first. Default: the model's own."
Sizes = Annotated[list[str] | None, typer.Option("--size", help=f"{SIZE_HELP}. {SEVERAL}")]
Size = Annotated[
    str | None, typer.Option(help=f"{SIZE_HELP}: one that the artifact was built for. Default: its first.")
]


def _emit(value: Any, as_json: bool, show: Callable[[Console], None]) -> None:
    """Prints `value` as JSON, or lets `show` print it for a person."""
    if as_json:
        print(json.dumps(value))
    else:
        show(Console())


def _recipe(name: str | None, overrides: dict[str, Any], assigned: list[str] | None) -> "Recipe":
    from . import Recipe, load_recipe
    from .export.settings import with_values

    return with_values(load_recipe(name) if name else Recipe(), overrides, assigned or ())


def _pins(pins: list[str] | None) -> dict[str, str] | None:
    if not pins:
        return None
    pairs = [text.split("=", 1) for text in pins]
    for text, pair in zip(pins, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise TurbopocketError(f"--pin {text!r} is not GLOB=FORMAT", hint="like --pin 'unet.conv_out=fp16'")
    return dict(pairs)


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
    workers: Annotated[int, typer.Option(help="Processes that fit layers side by side.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Let Ray start the workers: auto, local or host:port.")] = None,
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
        "compress.pin": _pins(pin),
        "sampler.steps": steps,
        "image.sizes": size or None,
        "sampler.guidance": guidance,
        "seed": seed,
    }
    made = build_targets(_recipe(recipe, overrides, assigned), out, overwrite, as_json, Workers(workers, ray))
    summaries = {built.folder.name: built.summary() for built in made}

    def show(console: Console) -> None:
        for built in made:
            show_built(built, console)

    _emit(made[0].summary() if len(made) == 1 else summaries, as_json, show)


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

    _emit(made.summary(), as_json, show)


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
        "compress.pin": _pins(pin),
    }
    planned = run_plan(_recipe(recipe, overrides, assigned), measured)
    _emit(planned.summary(), as_json, lambda console: show_plan(planned, console))


@app.command()
def check(
    artifact: ArtifactFolders,
    cpu: Annotated[list[str] | None, typer.Option(help="Also on an emulated CPU, such as arm64:cortex-a76.")] = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Verifies an artifact's files against its manifest, and its outputs against PyTorch."""
    from . import StageProgress
    from . import check as run_check
    from .export.output.staging import artifacts_in

    asked = StageProgress(quiet=as_json), cpu or (), cache
    results = {path: run_check(path, *asked) for path in artifacts_in(artifact) or [artifact]}
    summaries = {path.name: result.summary() for path, result in results.items()}

    def show(console: Console) -> None:
        for result in results.values():
            result.show(console)

    _emit(summaries if len(summaries) > 1 else next(iter(summaries.values())), as_json, show)
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
    _emit(result, as_json, lambda console: console.print(str(out), soft_wrap=True))


@app.command()
def report(artifact: ArtifactFolder, as_json: AsJson = False) -> None:
    """Writes report.html again from what the build measured."""
    from .export.report.page import rewrite_report

    path = rewrite_report(artifact)
    _emit({"report": str(path)}, as_json, lambda console: console.print(str(path), soft_wrap=True))


@app.command()
def formats(as_json: AsJson = False) -> None:
    """Lists formats × targets, with the reason beside every no."""
    from .export.listings import format_rows, show_formats

    rows = format_rows()
    _emit({"formats": rows}, as_json, lambda console: show_formats(rows, console))


@app.command()
def models(as_json: AsJson = False) -> None:
    """Lists the bundled models and the pipeline classes that load."""
    from .export.listings import model_rows, show_models

    rows = model_rows()
    _emit(rows, as_json, lambda console: show_models(rows, console))


@arm64_app.command("setup")
def arm64_setup(cache: Cache = None, as_json: AsJson = False) -> None:
    """Fetches the emulator, ARM libraries and a cross compiler (about 175 MB) into a cache folder; once."""
    from .runtimes.arm64.setup import default_cache, prepare

    talk = Console(stderr=True, quiet=as_json)
    found = prepare(cache or default_cache(), lambda text: talk.print(text, highlight=False, soft_wrap=True))
    _emit(found, as_json, lambda console: console.print(f"cache     {found['cache']}", soft_wrap=True))


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
    _emit(shown.model_dump(mode="json"), as_json, lambda _: print(shown.to_toml(), end=""))


def main() -> None:
    """Runs the command; a user's mistake becomes one message on stderr and an exit code, never a traceback."""
    _silence_libraries()
    try:
        with stopped_by_signals():
            code = app(standalone_mode=False)
    except TurbopocketError as error:
        _fail(str(error), error.hint, error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", None, 1)
    except Stopped as stop:
        _fail(f"{stop}; nothing half-written was left behind", None, 128 + stop.signal)
    except Exception as error:
        # Typer's own complaints (unknown option, missing argument) end with 1 here: 2 means over budget.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), "turbopocket --help", 1)
    else:
        sys.exit(code or 0)


def _silence_libraries() -> None:
    """Libraries tell of GPU kernels and tensor types that they miss and nobody asked for; their errors still show."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fail(message: str, hint: str | None, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)
