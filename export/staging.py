# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all: they are made beside their final place and renamed."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtimes.errors import TurbopocketError
from ..runtimes.manifest import MANIFEST_NAME

_LOCK = ".lock"


def report_folder(artifact: Path) -> Path:
    """Returns where the report and the build's measurements lie: beside the artifact, since they are not shipped."""
    return artifact.with_name(artifact.name + ".report")


def run_folder(out: Path) -> Path:
    """Returns where the work lies that a killed run goes on from: beside its output."""
    return out.with_name(out.name + ".run")


def artifacts_in(folder: Path) -> list[Path]:
    """Returns the folder itself when it is an artifact, else the artifacts that lie in it, by name."""
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when `out` can not become a new folder, before any work is done.

    An artifact, or a folder of nothing but artifacts and their reports, may be replaced with `overwrite`; anything
    else in the way never is.
    """
    if out.exists() and not out.is_dir():
        raise TurbopocketError(f"output {out} is a file; it must be a new or empty folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise TurbopocketError(f"output folder {out} is not empty", hint="give another folder, or --overwrite")
    artifacts = artifacts_in(out)
    ours = {path for artifact in artifacts for path in (artifact, report_folder(artifact))}
    if not artifacts or (out not in artifacts and set(out.iterdir()) - ours):
        raise TurbopocketError(
            f"output folder {out} is not empty and has no manifest.json, so it is not an artifact; "
            "--overwrite replaces artifacts only"
        )


@contextmanager
def staged_folders(finals: tuple[Path, ...]) -> Iterator[tuple[Path, ...]]:
    """Yields empty folders that take the places of `finals` on success and vanish on any failure.

    What a killed process left of the same kind goes too: its lock is gone with it.
    """
    stage = held = None
    try:
        parent, prefix = finals[0].parent, f".{finals[0].name}."
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, prefix)
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        held = _lock(stage / _LOCK)
        made = tuple(stage / final.name for final in finals)
        for folder in made:
            folder.mkdir()
        yield made
        for folder, final in zip(made, finals, strict=True):
            _replace(folder, final)
    except OSError as error:
        raise TurbopocketError(f"can not write {finals[0]}: {error.strerror or error}") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        if held is not None:
            os.close(held)


def _lock(path: Path) -> int | None:
    """An open file that only this process has a lock on; None when another has it, or locks do not work there."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for lock in parent.glob(f"{prefix}*/{_LOCK}"):
        held = _lock(lock)
        if held is not None:
            shutil.rmtree(lock.parent, ignore_errors=True)
            os.close(held)


def _replace(new: Path, final: Path) -> None:
    """Puts folder `new` in the place of `final`; an old folder there is kept until the new one stands."""
    old = new.with_name(new.name + ".old")
    if final.exists():
        final.rename(old)
    try:
        new.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file through a temporary one in the same folder. Raises TurbopocketError when that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TurbopocketError(f"can not write {path}: {error.strerror or error}") from error
