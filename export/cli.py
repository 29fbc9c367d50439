# SPDX-License-Identifier: Apache-2.0
"""The `turbopocket` command: parses, calls one verb, prints. Data goes to stdout, talk to stderr."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..ground.errors import ParityFailed, TurbopocketError
from .signals import Stopped, stopped_by_signals

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
TARGET_HELP = "What the phone runs: onnx, coreml or executorch."
TargetName = Annotated[str | None, typer.Option("--target", help=TARGET_HELP)]
TargetNames = Annotated[list[str] | None, typer.Option("--target", help=f"{TARGET_HELP} May be given several times.")]
Deployment = Annotated[str | None, typer.Option(help="Oldest system for Core ML packages: iOS17, iOS18 or iOS26.")]
Activations = Annotated[
    str | None, typer.Option(help="ExecuTorch's 8-bit layers: dynamic, or static to round in steps chosen ahead.")
]
Artifact = Annotated[Path, typer.Argument(help="A folder that `build` made.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the emulated CPU; default: in the user's cache folder.")]
Artifacts = Annotated[Path, typer.Argument(help="An artifact, or a folder of artifacts, that `build` made.")]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="A .toml file or a shipped recipe's name.")]
Budget = Annotated[str | None, typer.Option(help="Bytes of the whole artifact, such as 8MB.")]
Formats = Annotated[str | None, typer.Option(help="Candidate formats, comma-separated; see `formats`.")]
LORA_HELP = "LoRA .safetensors merged before compression, at strength 1 or as in FILE:0.8; may be given several times."
Loras = Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[:STRENGTH]", help=LORA_HELP)]
Pins = Annotated[list[str] | None, typer.Option("--pin", help="GLOB=FORMAT for layers that must keep a format.")]

SIZE_HELP = "WIDTHxHEIGHT of pictures in pixels, such as 768x512"
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", help=f"{SIZE_HELP}. For onnx several times, the default first. Default: the model's own."),
]
Size = Annotated[
    str | None, typer.Option(help=f"{SIZE_HELP}: one that the artifact was built for. Default: its first.")
]


def _emit(value: Any, as_json: bool, show: Callable[[Console], None]) -> None:
    """Prints `value` as JSON, or lets `show` print it for a person."""
    if as_json:
        print(json.dumps(value))
    else:
        show(Console())


def _recipe(name: str | None, overrides: dict[str, Any]) -> Any:
    from .recipe import Recipe, load_recipe, with_overrides

    return with_overrides(load_recipe(name) if name else Recipe(), overrides)


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
    deployment: Deployment = None,
    activations: Activations = None,
    budget: Budget = None,
    recipe: RecipeFile = None,
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
    from ..quant.workers import Workers
    from .build.outcome import show_built
    from .build.targets import build_targets

    overrides = {
        "model.source": source,
        "model.config": config,
        "model.lora": lora or None,
        "target.name": target[0] if target else None,
        "target.also": target[1:] if target else None,
        "target.coreml.deployment": deployment,
        "target.executorch.activations": activations,
        "compress.budget": budget,
        "compress.formats": formats and formats.split(","),
        "compress.fit": fit,
        "compress.pin": _pins(pin),
        "sampler.steps": steps,
        "image.sizes": size or None,
        "sampler.guidance": guidance,
        "seed": seed,
    }
    made = build_targets(_recipe(recipe, overrides), out, overwrite, as_json, Workers(workers, ray))
    summaries = {built.folder.name: built.summary() for built in made}

    def show(console: Console) -> None:
        for built in made:
            show_built(built, console)

    _emit(made[0].summary() if len(made) == 1 else summaries, as_json, show)


@app.command()
def distill(
    source: Source,
    out: Annotated[Path, typer.Option(help="The model folder to make; checkpoints and logs go to OUT.run.")],
    steps: Annotated[int, typer.Option(help="Most steps of the student, 1 to 8; it also learns all fewer ones.")] = 4,
    method: Annotated[str, typer.Option(help="tdm, or mse: regression to the teacher's trajectory.")] = "tdm",
    iterations: Annotated[int, typer.Option(help="Student updates.")] = 2000,
    batch: Annotated[int, typer.Option(help="Prompts in each update, per process.")] = 32,
    guidance: Annotated[float | None, typer.Option(help="The teacher's guidance; default: what it ships with.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line; default: the model's own.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA matrices of this rank, not all weights.")] = None,
    student_lr: Annotated[float, typer.Option(help="Peak learning rate of the student.")] = 4e-6,
    fake_lr: Annotated[float, typer.Option(help="Peak learning rate of the fake score; above the student's.")] = 2e-5,
    horizon: Annotated[int, typer.Option(help="Walks start at this training timestep less one.")] = 800,
    without: Annotated[list[str] | None, typer.Option(help="Switch off one of TDM's devices, for ablations.")] = None,
    precision: Annotated[
        str, typer.Option(help="Arithmetic: no (float32), bf16, fp16; auto: bf16 where the device multiplies in it.")
    ] = "auto",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, a third more time.")] = False,
    config: Config = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT when it is a student.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distils a model to a few steps; prompts only, no pictures. Goes on where a killed run of the same request was."""
    from ..quant.distill.options import DistillOptions
    from .distill.distil import DistillRequest, devices_without, distil
    from .progress import StageProgress
    from .verify.table import show_remarks

    options = DistillOptions(
        iterations=iterations, batch=batch, student_lr=student_lr, fake_lr=fake_lr,
        devices=devices_without(without or []), seed=seed,
    )  # fmt: skip
    request = DistillRequest(
        source, steps, method, options, guidance, prompts, lora_rank, horizon, precision, gradient_checkpointing, config
    )
    summary = distil(request, out, overwrite, StageProgress(quiet=as_json))

    def show(console: Console) -> None:
        show_remarks((), summary["notes"], console)
        console.print(f"model     {summary['model']}", soft_wrap=True)

    _emit(summary, as_json, show)


@app.command()
def plan(
    source: OptionalSource = None,
    config: Config = None,
    target: TargetName = None,
    deployment: Deployment = None,
    budget: Budget = None,
    recipe: RecipeFile = None,
    formats: Formats = None,
    pin: Pins = None,
    measured: Annotated[Path | None, typer.Option(help="choices.json of a build: plan on measured losses.")] = None,
    as_json: AsJson = False,
) -> None:
    """Says in seconds what fits a budget, from the model's configs alone: no weights are read."""
    from .plan import plan_source, show_plan

    overrides = {
        "model.source": source,
        "model.config": config,
        "target.name": target,
        "target.coreml.deployment": deployment,
        "compress.budget": budget,
        "compress.formats": formats and formats.split(","),
        "compress.pin": _pins(pin),
    }
    summary = plan_source(_recipe(recipe, overrides), measured)
    _emit(summary, as_json, lambda console: show_plan(summary, console))


@app.command()
def check(
    artifact: Artifacts,
    cpu: Annotated[list[str] | None, typer.Option(help="Also on an emulated CPU, such as arm64:cortex-a76.")] = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Verifies an artifact's files against its manifest, and its outputs against PyTorch."""
    from .check import check as run_check
    from .output.staging import artifacts_in
    from .progress import StageProgress

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
    artifact: Artifact,
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
    from .draw import draw

    result = draw(artifact, prompt, out, seed, steps, guidance, negative, size, image, strength, overwrite)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    _emit(result, as_json, lambda console: console.print(f"{result['picture']}", soft_wrap=True))


@app.command()
def report(artifact: Artifact, as_json: AsJson = False) -> None:
    """Writes report.html again from what the build measured."""
    from .report.page import rewrite_report

    path = rewrite_report(artifact)
    _emit({"report": str(path)}, as_json, lambda console: console.print(str(path), soft_wrap=True))


@app.command()
def formats(as_json: AsJson = False) -> None:
    """Lists formats × targets, with the reason beside every no."""
    from .listings import format_rows, show_formats

    rows = format_rows()
    _emit({"formats": rows}, as_json, lambda console: show_formats(rows, console))


@app.command()
def models(as_json: AsJson = False) -> None:
    """Lists the bundled models and the pipeline classes that load."""
    from .listings import model_rows, show_models

    rows = model_rows()
    _emit(rows, as_json, lambda console: show_models(rows, console))


@arm64_app.command("setup")
def arm64_setup(cache: Cache = None, as_json: AsJson = False) -> None:
    """Fetches the emulator, ARM libraries and a cross compiler (about 175 MB) into a cache folder; once."""
    from ..runtimes.arm64.setup import default_cache, prepare

    talk = Console(stderr=True, quiet=as_json)
    found = prepare(cache or default_cache(), lambda text: talk.print(text, highlight=False, soft_wrap=True))
    _emit(found, as_json, lambda console: console.print(f"cache     {found['cache']}", soft_wrap=True))


@recipe_app.command("show")
def recipe_show(
    name: Annotated[str | None, typer.Argument(help="A .toml file or a shipped recipe's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prints a recipe with every default filled in."""
    from .recipe import Recipe, load_recipe

    shown = load_recipe(name) if name else Recipe()
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
