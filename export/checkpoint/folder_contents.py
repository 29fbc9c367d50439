# SPDX-License-Identifier: Apache-2.0
"""What a folder holds that is no diffusers pipeline, and how one gets a model from it."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from ...ground.errors import TurbopocketError
from .json_object import read_json_object
from .single_file import conversion_command, describe
from .weight_files import PICKLED_SUFFIXES

UNET_CLASS = "UNet2DConditionModel"
NAMES_SHOWN = 5
PIPELINES_BELOW = ("*/model_index.json", "*/*/model_index.json", "*/*/*/model_index.json")
"""As far down as in a hub cache: models--owner--name/snapshots/revision."""
# What is made for a runtime, by the suffixes of its files or folders.
LOWERED = {
    (".onnx",): "an ONNX export",
    (".mlpackage", ".mlmodelc", ".mlmodel"): "a Core ML export",
    (".pte",): "an ExecuTorch export",
    (".gguf",): "GGUF files, whose weights are compressed already",
}


def is_unet_folder(folder: Path) -> bool:
    """Whether it is a UNet's own folder: config.json beside the weights, and no pipeline in it."""
    return _component_class(folder) == UNET_CLASS and not (folder / "model_index.json").is_file()


def pipeline_around(folder: Path) -> Path | None:
    """Returns the pipeline's folder that a component's folder lies in, None when there is none around it."""
    around = folder.absolute().parent
    return around if (around / "model_index.json").is_file() else None


def refuse_other_folders(folder: Path) -> None:
    """Raises TurbopocketError when a folder is no diffusers pipeline: says what it holds, and what to give instead."""
    if model := _source_of_artifact(folder):
        raise TurbopocketError(f"{folder} is an artifact that `build` made", f"give what it was made from: {model}")
    if not (folder / "model_index.json").is_file():
        held, hint = _held(folder)
        raise TurbopocketError(
            f"{folder} has no model_index.json, so it is not a diffusers pipeline folder: it holds {held}", hint
        )


def _component_class(folder: Path) -> str | None:
    """The class that a folder's config.json names, None without one."""
    try:
        config = read_json_object(folder / "config.json")
    except (OSError, TurbopocketError):
        return None
    match config:
        case {"_class_name": str(name)} | {"architectures": [str(name), *_]}:
            return name
    return None


def _source_of_artifact(folder: Path) -> str | None:
    """What the artifact in a folder was made from, as its recipe has it; None when there is no artifact."""
    try:
        recipe = tomllib.loads(read_json_object(folder / "manifest.json")["recipe"])
        return str(recipe["model"]["source"])
    except (OSError, TurbopocketError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _held(folder: Path) -> tuple[str, str | None]:
    """(what the folder holds, the one action to take)."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if below := [path.parent for pattern in PIPELINES_BELOW for path in sorted(folder.glob(pattern))]:
        return f"{below[0].relative_to(folder)}, which has one", f"give {below[0]}"
    if name := _component_class(folder):
        whole = pipeline_around(folder)
        return f"a {name} only", f"give the whole model: {whole}" if whole else "give the pipeline that it belongs to"
    components = {path: name for path in entries if path.is_dir() and (name := _component_class(path))}
    if components:
        found = ", ".join(f"{path.name}/ ({name})" for path, name in components.items())
        if list(components.values()) == [UNET_CLASS]:
            return found, f"give {next(iter(components))}, and --config FOLDER with the rest"
        return found, "put the model_index.json of that pipeline beside them"
    return _held_files(entries)


def _held_files(entries: Sequence[Path]) -> tuple[str, str | None]:
    if files := {path: describe(path) for path in entries if path.suffix == ".safetensors"}:
        said = [f"{path.name} ({what})" for path, (what, _) in files.items()]
        usable = [path for path, (_, is_usable) in files.items() if is_usable]
        return _shown(said), f"give the file: {usable[0]}" if usable else None
    for suffixes, what in LOWERED.items():
        if names := [path.name for path in entries if path.suffix in suffixes]:
            return f"{what} ({_shown(names)})", "give the float model that it was made from"
    if pickles := [path for path in entries if path.suffix in PICKLED_SUFFIXES]:
        names = [path.name for path in pickles]
        return f"only pickles ({_shown(names)}), which can run code when opened", conversion_command(pickles[0], None)
    if not entries:
        return "nothing", None
    return (
        _shown([path.name for path in entries]),
        "save the pipeline with save_pretrained, and give the folder that was saved to",
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (" ..." if len(names) > NAMES_SHOWN else "")
