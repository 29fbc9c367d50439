# SPDX-License-Identifier: Apache-2.0
"""model_index.json: which pipeline a diffusers folder holds, and the pipeline's own settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtimes.errors import TurbopocketError
from .base import ModelFamily
from .json_object import read_json_object


def read_pipeline_index(folder: Path) -> dict[str, Any]:
    """Returns model_index.json; raises TurbopocketError when there is none or it is not a JSON object."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise TurbopocketError(
            f"{folder} has no model_index.json, so it is not a diffusers pipeline folder",
            hint="save the pipeline with save_pretrained, and give the folder that was saved to",
        )
    return read_json_object(path)


def family_of(index: dict[str, Any], folder: Path, families: Sequence[ModelFamily]) -> ModelFamily:
    """Returns the family whose pipeline class the index names.

    Raises TurbopocketError when no family has that class, or a part of the pipeline is absent, or is of
    another class than the family's.
    """
    path, found = folder / "model_index.json", index.get("_class_name")
    for family in families:
        if family.pipeline_class == found:
            _check_parts(index, folder, family)
            return family
    supported = ", ".join(family.pipeline_class for family in families)
    raise TurbopocketError(f"{path}: pipeline class {found!r} is not supported; supported: {supported}")


def _check_parts(index: dict[str, Any], folder: Path, family: ModelFamily) -> None:
    path = folder / "model_index.json"
    for name in family.folders:
        if index.get(name) in (None, [None, None]):
            raise TurbopocketError(f"{path} has no {name!r}, which every {family.pipeline_class} needs")
        if not (folder / name).is_dir():
            raise TurbopocketError(f"{folder} has no folder {name!r}, which its model_index.json names")
    for name, spec in family.modules.items():
        wanted = [spec.library, spec.class_name]
        if index[name] != wanted:
            raise TurbopocketError(f"{path}: {name!r} is {index[name]}; supported: {wanted}")


def pipeline_config(index: dict[str, Any], family: ModelFamily) -> dict[str, Any]:
    """Returns the pipeline's settings: all of the index that is neither a part nor about the file itself."""
    own = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    return {**family.pipeline_defaults, **own}


def as_drawn(scheduler_config: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    """Returns the scheduler's settings as of the class in the index: where they differ, diffusers draws with that."""
    named = index["scheduler"]
    is_named = isinstance(named, list) and len(named) == 2
    return scheduler_config | {"_class_name": named[1]} if is_named else scheduler_config
