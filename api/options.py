# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and what they are turned into."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import TurbopocketError
from .export.target_options import TARGET_ENTRIES, with_several_sizes

if TYPE_CHECKING:
    from . import Recipe

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
WORKERS_HELP = "Processes that fit layers side by side."
WorkerCount = Annotated[int, typer.Option("--workers", help=WORKERS_HELP)]
Ray = Annotated[str | None, typer.Option("--ray", help="Let Ray start the workers: auto, local or host:port.")]
RUN_HELP = "Folder of intermediate results, from which a killed build goes on; default: OUT.run."
RunFolder = Annotated[Path | None, typer.Option("--run", help=RUN_HELP)]


def emit(value: Any, as_json: bool, show: Callable[[Console], None]) -> None:
    """Prints `value` as JSON, or lets `show` print it for a person; brackets in names and paths are no markup."""
    if as_json:
        print(json.dumps(value))
    else:
        show(Console(markup=False))


def asked_recipe(name: str | None, overrides: dict[str, Any], assigned: list[str] | None) -> "Recipe":
    from . import Recipe, load_recipe
    from .export.settings import with_values

    return with_values(load_recipe(name) if name else Recipe(), overrides, assigned or ())


def asked_pins(pins: list[str] | None) -> dict[str, str] | None:
    if not pins:
        return None
    pairs = [text.split("=", 1) for text in pins]
    for text, pair in zip(pins, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise TurbopocketError(f"--pin {text!r} is not GLOB=FORMAT", hint="like --pin 'unet.conv_out=fp16'")
    return dict(pairs)
