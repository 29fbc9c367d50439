# SPDX-License-Identifier: Apache-2.0
"""Options of every command and those that several have, and what they are turned into."""

from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import TurbopocketError
from .door import manner
from .export.target_options import TARGET_ENTRIES, with_several_sizes
from .quant.names import FIT_NAMES
from .runtimes.arm64.cpus import CPUS, PREFIX

if TYPE_CHECKING:
    from . import Recipe, StageProgress


def _verbose(asked: bool) -> None:
    manner.tracebacks |= asked


def _quiet(asked: bool) -> None:
    manner.quiet |= asked


def _version(asked: bool) -> None:
    if asked:
        print(f"turbopocket {version('turbopocket')}")
        raise typer.Exit


Verbose = Annotated[bool, typer.Option("--verbose", "-v", callback=_verbose, help="Show the traceback of a bug.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, help="Show no progress.")]
ShowVersion = Annotated[
    bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and end.")
]
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


def _shipped(folder: str) -> str:
    files = (resources.files("turbopocket.export.recipes") / folder).iterdir()
    return ", ".join(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


RECIPE_HELP = f"A .toml file, or a shipped recipe: {_shipped('.')}."
DISTILL_RECIPES = _shipped("distill")
RecipeFile = Annotated[str | None, typer.Option("--recipe", help=RECIPE_HELP)]
DistillRecipeFile = Annotated[
    str | None, typer.Option("--recipe", help=f"A .toml file, or a shipped recipe: {DISTILL_RECIPES}.")
]
AcceptLimit = Annotated[
    bool, typer.Option("--accept-limit", help="Take the limit of its recipe, even above the target's own.")
]
CPU_HELP = f"Also on an emulated CPU: {', '.join(PREFIX + cpu.name for cpu in CPUS)}. May be repeated."
EmulatedCpus = Annotated[list[str] | None, typer.Option("--cpu", help=CPU_HELP)]
PictureFile = Annotated[Path, typer.Option("--out", "-o", help="The picture to write: .png, .jpg or .webp.")]
SET_HELP = "Any other key of the recipe, such as target.coreml.deployment=iOS17; see `recipe show`. May be repeated."
Assigned = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)]
SET_DISTILL_HELP = "Any other key, such as distill.method=mse; see `recipe show --distill`. May be repeated."
AssignedToDistill = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_DISTILL_HELP)]
Budget = Annotated[str | None, typer.Option(help="Bytes of the whole artifact, such as 8MB.")]
PEAK_MEMORY_HELP = "Most memory that a component is predicted to take of the device at its peak, such as 1.5GB."
PeakMemory = Annotated[str | None, typer.Option("--peak-memory", help=PEAK_MEMORY_HELP)]
MAX_RAM_HELP = "Most memory of all processes together, such as 8GB: refused when it can not hold, kept to when it can."
MaxRam = Annotated[str | None, typer.Option("--max-ram", help=MAX_RAM_HELP)]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", metavar="NAME", help="A phone that it must draw on, such as android-8gb; several times."),
]
Formats = Annotated[str | None, typer.Option(help="Candidate formats or schemes, comma-separated; see `formats`.")]
LORA_HELP = "LoRA .safetensors merged before compression, at strength 1 or as in FILE:0.8; may be given several times."
Loras = Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[:STRENGTH]", help=LORA_HELP)]
Pins = Annotated[list[str] | None, typer.Option("--pin", help="GLOB=FORMAT (or scheme) for layers that must keep it.")]
Fit = Annotated[str | None, typer.Option(help=f"How values are chosen: {', '.join(FIT_NAMES)}.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps the artifact ships with.")]
Keep = Annotated[
    bool | None, typer.Option(help="Whether intermediate results stay; default: when they are not over 1 GiB.")
]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance the artifact ships with; 1 or less: none.")
]
Prompts = Annotated[Path | None, typer.Option(help="Text file, one prompt a line; default: the model's own.")]

SIZE_HELP = "WIDTHxHEIGHT of pictures in pixels, such as 768x512"
SEVERAL = f"For {' or '.join(with_several_sizes())} several times, the default first. Default: the model's own."
Sizes = Annotated[list[str] | None, typer.Option("--size", help=f"{SIZE_HELP}. {SEVERAL}")]
Size = Annotated[
    str | None, typer.Option(help=f"{SIZE_HELP}: one that the artifact was built for. Default: its first.")
]
WORKERS_HELP = "Processes that fit layers side by side, and measure what they lose where that takes long."
WorkerCount = Annotated[int, typer.Option("--workers", help=WORKERS_HELP)]
Ray = Annotated[str | None, typer.Option("--ray", help="Let Ray start the workers: auto, local or host:port.")]
RUN_HELP = "Folder of intermediate results, from which a killed build goes on; default: OUT.run."
RunFolder = Annotated[Path | None, typer.Option("--run", help=RUN_HELP)]


def talk(as_json: bool) -> "StageProgress":
    """Returns what tells of progress on stderr: silent for programs, and for people who ask for silence."""
    from . import StageProgress

    return StageProgress(quiet=as_json or manner.quiet)


def asked_recipe(name: str | None, overrides: dict[str, Any], assigned: list[str] | None) -> "Recipe":
    """The recipe that is asked for, once nothing that this machine can tell is wrong with it; PyTorch is not imported
    for that."""
    from . import Recipe, load_recipe
    from .export.request import refuse_recipe
    from .export.settings import with_values

    asked = with_values(load_recipe(name) if name else Recipe(), overrides, assigned or ())
    refuse_recipe(asked)
    return asked


def asked_pins(pins: list[str] | None) -> dict[str, str] | None:
    if not pins:
        return None
    pairs = [text.split("=", 1) for text in pins]
    for text, pair in zip(pins, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise TurbopocketError(f"--pin {text!r} is not GLOB=FORMAT", hint="like --pin 'unet.conv_out=fp16'")
    return dict(pairs)
