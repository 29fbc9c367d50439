# SPDX-License-Identifier: Apache-2.0
"""model_index.json: which pipeline a diffusers folder holds, and the pipeline's own settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ground.errors import TurbopocketError
from ..families.keys import Honoured, check_config, shown
from .json_object import read_json_object

if TYPE_CHECKING:  # an index that is not there needs no PyTorch
    from ..families.base import ModelFamily, ModuleSpec


def read_pipeline_index(folder: Path) -> dict[str, Any]:
    """Returns model_index.json; raises TurbopocketError when there is none or it is not a JSON object."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise TurbopocketError(
            f"{folder} has no model_index.json, so it is not a diffusers pipeline folder",
            hint="save the pipeline with save_pretrained, and give the folder that was saved to",
        )
    return read_json_object(path)


def family_of(
    index: dict[str, Any], folder: Path, families: "Sequence[ModelFamily]", configs_only: bool = False
) -> "ModelFamily":
    """Returns the family whose pipeline class the index names.

    Raises TurbopocketError when no family has that class, a part of the pipeline is absent, a tokenizer is of another
    class, or a setting is not known. With `configs_only` folders without a config may be absent.
    """
    path, found = folder / "model_index.json", index.get("_class_name")
    for family in families:
        if found in family.pipeline_classes:
            _check_parts(index, folder, family, configs_only)
            settings = {key: value for key, value in index.items() if key not in family.folders}
            check_config(settings, family.keys, family.pipeline_defaults, path, f"a {family.pipeline_class}")
            return family
    supported = ", ".join(name for family in families for name in family.pipeline_classes)
    raise TurbopocketError(f"{path}: pipeline class {shown(found)} is not supported; supported: {supported}")


def _check_parts(index: dict[str, Any], folder: Path, family: "ModelFamily", configs_only: bool) -> None:
    path = folder / "model_index.json"
    for name in family.folders:
        if index.get(name) in (None, [None, None]):
            raise TurbopocketError(f"{path} has no {name!r}, which every {family.pipeline_class} needs")
        if not (folder / name).is_dir() and not (configs_only and name not in family.modules):
            raise TurbopocketError(f"{folder} has no folder {name!r}, which its model_index.json names")
    for name in family.tokenizers:
        if index[name] not in (classes := family.tokenizer.named):
            raise TurbopocketError(f"{path}: {name!r} is {shown(index[name])}; supported: {classes[0]}")


def modules_of(index: dict[str, Any], folder: Path, family: "ModelFamily") -> "dict[str, ModuleSpec]":
    """Returns, for each module of the family, the one of its possible classes that the index names.

    Raises TurbopocketError when it names another.
    """
    chosen = {}
    for name, spec in family.modules.items():
        known = [spec, *spec.others]
        match = next((each for each in known if each.is_named(index[name])), None)
        if match is None:
            supported = " or ".join(str(each.named) for each in known)
            path = folder / "model_index.json"
            raise TurbopocketError(f"{path}: {name!r} is {shown(index[name])}; supported: {supported}")
        chosen[name] = match
    return chosen


def scheduler_class(index: dict[str, Any], folder: Path) -> str:
    """Returns the scheduler's class: diffusers makes the one of the index, whatever the scheduler's config says."""
    match index["scheduler"]:
        case ["diffusers", str(name)]:
            return name
        case other:
            path = folder / "model_index.json"
            raise TurbopocketError(f"{path}: 'scheduler' is {shown(other)}; a class of diffusers is needed")


def pipeline_config(index: dict[str, Any], family: "ModelFamily") -> dict[str, Any]:
    """Returns the settings of the pipeline that are honoured when drawing."""
    honoured = {key for key, treatment in family.keys.items() if isinstance(treatment, Honoured)}
    own = {key: value for key, value in index.items() if key in honoured and not key.startswith("_")}
    return {**family.pipeline_defaults, **own}
