# SPDX-License-Identifier: Apache-2.0
"""What a folder holds that is no diffusers pipeline, and how one gets a model from it."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from ...runtimes.errors import TurbopocketError
from .json_object import read_json_object
from .single_file import conversion_command, describe
from .weight_files import PICKLED_SUFFIXES

UNET_CLASS = "UNet2DConditionModel"
NAMES_SHOWN = 5
PIPELINE_DEPTH = 3  # of a hub cache: models--owner--name/snapshots/revision/model_index.json
# What is made for a runtime, by the suffixes of its files or folders.
LOWERED = {
    (".onnx",): "an ONNX export",
    (".mlpackage", ".mlmodelc", ".mlmodel"): "a Core ML export",
    (".pte",): "an ExecuTorch export",
    (".gguf",): "GGUF files, whose weights are compressed already",
}


def is_unet_folder(folder: Path) -> bool:
    """Whether it is a UNet's own folder: config.json beside the weights, and no pipeline around them."""
    return _component_class(folder) == UNET_CLASS and not (folder / "model_index.json").is_file()


def _component_class(folder: Path) -> str | None:
    """The class that a folder's config.json names, None without one."""
    try:
        config = read_json_object(folder / "config.json")
    except (OSError, TurbopocketError):
        return None
    architectures = config.get("architectures")
    named = config.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    return named if isinstance(named, str) else None


def refuse_other_folders(folder: Path) -> None:
    """Raises TurbopocketError when a folder is no diffusers pipeline: says what it holds, and what to give instead."""
    if model := _source_of_artifact(folder):
        raise TurbopocketError(f"{folder} is an artifact that `build` made", f"give what it was made from: {model}")
    if not (folder / "model_index.json").is_file():
        held, hint = _held(folder)
        raise TurbopocketError(
            f"{folder} has no model_index.json, so it is not a diffusers pipeline folder: it holds {held}", hint
        )


def _held(folder: Path) -> tuple[str, str | None]:
    """(what the folder holds, the one action to take)."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not entries:
        return "nothing", None
    inside = [
        path.parent for depth in range(PIPELINE_DEPTH) for path in folder.glob("*/" * (depth + 1) + "model_index.json")
    ]
    if inside:
        return f"{_shown(inside, folder)}, which has one", f"give {inside[0]}"
    if name := _component_class(folder):
        return f"it holds a {name} only", f"give the pipeline that the {name} belongs to"
    components = {path: _component_class(path) for path in entries if path.is_dir() and _component_class(path)}
    if components:
        unets = [path for path, name in components.items() if name == UNET_CLASS]
        found = ", ".join(f"{path.name}/ ({name})" for path, name in components.items())
        return f"{found}", f"give {unets[0]} and --config FOLDER with the rest" if unets else None
    return _held_files(entries)


def _held_files(entries: Sequence[Path]) -> tuple[str, str | None]:
    if files := [path for path in entries if path.suffix == ".safetensors"]:
        found = {path: describe(path) for path in files}
        said = ", ".join(f"{path.name} ({what})" for path, (what, _) in list(found.items())[:NAMES_SHOWN])
        usable = [path for path, (_, is_usable) in found.items() if is_usable]
        return f"{said}", f"give the file: {usable[0]}" if usable else None
    for suffixes, what in LOWERED.items():
        if files := [path for path in entries if path.suffix in suffixes]:
            return f"{what} ({_shown(files)})", "give the float model that was exported"
    if files := [path for path in entries if path.suffix in PICKLED_SUFFIXES]:
        return f"it holds pickles only ({_shown(files)}), which can run code when opened", conversion_command(
            files[0], None
        )
    return f"{_shown(entries)}", "save the pipeline with save_pretrained, and give the folder that was saved to"


def _source_of_artifact(folder: Path) -> str | None:
    """Returns what the artifact in a folder was made from, as its recipe has it; None when there is no artifact."""
    try:
        manifest = read_json_object(folder / "manifest.json")
        return str(tomllib.loads(manifest["recipe"])["model"]["source"])
    except (OSError, TurbopocketError, KeyError, TypeError, tomllib.TOMLDecodeError):
        return None


def _shown(paths: Sequence[Path], below: Path | None = None) -> str:
    names = [str(path.relative_to(below)) if below else path.name for path in paths[:NAMES_SHOWN]]
    return ", ".join(names) + (" ..." if len(paths) > NAMES_SHOWN else "")
