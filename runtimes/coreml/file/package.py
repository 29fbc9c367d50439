# SPDX-License-Identifier: Apache-2.0
"""The folder that is an .mlpackage: `Manifest.json`, the model's protobuf, and the files beside it."""

import importlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ....ground.errors import TurbopocketError
from ....ground.extras import install_hint
from ....ground.reading import read_json

_AUTHOR = "com.apple.CoreML"
_FORMAT = "1.0.0"


@dataclass(frozen=True)
class Package:
    """A package's items: the model file, and every item path (file or folder) of its manifest."""

    folder: Path
    model: Path
    items: tuple[Path, ...]


def open_package(folder: Path) -> Package:
    """The package's items, each of which exists inside the folder; TurbopocketError names the first that does not."""
    found = _manifest(folder)
    entries = found.get("itemInfoEntries")
    root = found.get("rootModelIdentifier")
    if found.get("fileFormatVersion") != _FORMAT or not isinstance(entries, dict) or not isinstance(root, str):
        raise TurbopocketError(
            f"{folder}/Manifest.json must have fileFormatVersion {_FORMAT}, itemInfoEntries and rootModelIdentifier"
        )
    items = {key: _item(folder, entry) for key, entry in entries.items()}
    if root not in items:
        raise TurbopocketError(f"{folder}/Manifest.json has no item of its rootModelIdentifier {root!r}")
    if not items[root].is_file():
        raise TurbopocketError(f"{items[root]} is not a file, the model must be one")
    return Package(folder, items[root], tuple(items.values()))


def load_model(package: Package) -> Any:
    """The protobuf `Model` message. Needs coremltools; TurbopocketError when it is absent or the bytes are no model."""
    model_proto = coremltools_module("proto.Model_pb2")
    try:
        return model_proto.Model.FromString(package.model.read_bytes())
    except (OSError, importlib.import_module("google.protobuf.message").DecodeError) as error:
        raise TurbopocketError(f"{package.model} is not a Core ML model: {error}") from error


def coremltools_module(name: str) -> Any:
    """A module of coremltools; its import says nothing. TurbopocketError when coremltools is not installed."""
    whole = f"coremltools.{name}"
    if sys.modules.get(whole) is not None:  # asked for at every operator, and setting a level empties logging's caches
        return sys.modules[whole]
    logger = logging.getLogger("coremltools")
    level = logger.level
    # at import it reports an untested PyTorch and, away from a Mac, that Core ML itself is absent
    logger.setLevel(logging.CRITICAL)
    try:
        return importlib.import_module(whole)
    except ImportError as error:
        raise TurbopocketError("Core ML packages need coremltools", hint=install_hint("coremltools")) from error
    finally:
        logger.setLevel(level)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "Manifest.json"
    if not path.is_file():
        raise TurbopocketError(f"{folder} is not a Core ML package: it holds no Manifest.json")
    found = read_json(path)
    if not isinstance(found, dict):
        raise TurbopocketError(f"{path} must hold an object")
    return found


def _item(folder: Path, entry: Any) -> Path:
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str) or entry.get("author") != _AUTHOR:
        raise TurbopocketError(f"{folder}/Manifest.json has an item without a path or not by {_AUTHOR}: {entry!r}")
    return inside(folder / "Data", path, f"{folder}/Manifest.json")


def inside(root: Path, relative: str, said_by: str) -> Path:
    """`root / relative`, which exists; TurbopocketError when it is missing or would leave `root`."""
    pure = PurePosixPath(relative)
    if relative != str(pure) or relative == "." or pure.is_absolute() or {"..", "\0"} & {*pure.parts, *relative}:
        raise TurbopocketError(f"{said_by} names {relative!r}, which is not a plain relative path")
    path = root / relative
    try:
        present = path.exists() and not path.is_symlink()
    except (OSError, ValueError):  # a name too long, or one that no file can have
        present = False
    if not present:
        raise TurbopocketError(f"{path} is missing, {said_by} names it")
    return path
