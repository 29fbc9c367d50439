# SPDX-License-Identifier: Apache-2.0
"""Turning what a user calls a model into a folder on this machine."""

from collections.abc import Collection
from importlib import resources
from pathlib import Path

from ... import pocket
from ...runtimes.errors import TurbopocketError
from .hub import REPO_ID, download

_FOLDER = Path(str(resources.files(pocket)))
BUNDLED = {"pocket-turbo": _FOLDER / "turbo_weights", "pocket": _FOLDER / "weights"}
"""The few-step student, which is the default model, and its teacher."""


def resolve(source: str, folders: Collection[str], with_weights: bool) -> tuple[str, Path]:
    """Returns (name, folder) of a model: a bundled name, else a local folder, else a hub id.

    Raises TurbopocketError when `source` is none of them, or a bundled model that was not installed.
    """
    if source in BUNDLED:
        if not BUNDLED[source].is_dir():
            raise TurbopocketError(f"the bundled model {source!r} has no weights in this installation")
        return source, BUNDLED[source]
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve().name, folder
    if folder.is_file():
        raise TurbopocketError(
            f"{source} is a file; a diffusers folder with a model_index.json is needed",
            hint="convert it with diffusers: Pipeline.from_single_file(file).save_pretrained(folder)",
        )
    if REPO_ID.fullmatch(source):
        return source.split("/")[1], download(source, folders, with_weights)
    raise TurbopocketError(
        f"{source!r} is neither a bundled model ({', '.join(BUNDLED)}), nor a folder, nor a hub id (owner/name)"
    )
