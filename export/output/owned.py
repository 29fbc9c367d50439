# SPDX-License-Identifier: Apache-2.0
"""What stands where an output is to go, and whether it may be replaced: never with a file that no command of ours made.

An artifact's manifest lists its files. Reports and students hold a record of theirs. The products of a build's stages
are known by their names, in folders that say what they are.
"""

import json
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError
from ...runtimes.manifest import MANIFEST_NAME
from .staging import artifacts_in, is_temporary, report_folder, write_atomically

RECORD = ".turbopocket.json"
_ELSEWHERE = "give another --out, or move that away"
KEY_FILE = "key.json"
"""What a product of a build's stage was made from, in its folder."""
_PRODUCT = re.compile(r"([a-z]+)-[0-9a-f]{16}(\.partial)?")
_IN_PRODUCT = re.compile(
    r"[a-z]+\.(json|safetensors)|measure-\d+\.json|measured\.bin|\w+-[0-9a-f]{32}\.safetensors|[\w.]+@[\w.+-]+\.safetensors|\d{3,}-.+\.safetensors"
    r"|inputs/([0-9a-f]{32}\.safetensors|calls\.json)|outputs/\d+-.+\.safetensors|units/[\w.]+\.json"
)
_INSIDE: tuple[list[str], ...] = ([], ["inputs"], ["outputs"], ["units"])
"""Folders of a product, as parts of their path in it."""
_HALF = re.compile(r"\.tmp[0-9A-Za-z]{6}|.+\.partial")
"""A file that a process was killed while writing: what safetensors calls it, and what we do."""
_LOWERED = "lower"
"""The stage whose products hold what a target writes: whatever is in them is ours."""


def write_record(folder: Path) -> None:
    """Writes into a finished folder which files it is made of; `refuse_folder` then knows them."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    write_atomically(folder / RECORD, (json.dumps({"files": files}, indent=1) + "\n").encode())


def refuse_build(out: Path, run: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when a build that works in `run` can not make the artifact `out` and its report."""
    refuse_occupied(out, overwrite)
    refuse_folder(report_folder(out), overwrite)
    refuse_journal(run)


def refuse_builds(out: Path, run: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when builds that work in `run` can not make their artifacts and reports in `out`."""
    refuse_occupied(out, overwrite)
    refuse_journal(run)


def refuse_journal(run: Path) -> None:
    """Raises TurbopocketError when `run` can not be, or become, the folder in which a build works."""
    ours = set(journal_files(run))
    refuse_run(run, [path for path in sorted(run.rglob("*")) if path not in ours and not _is_product_folder(path, run)])


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when `out` can not become a new folder of a build.

    An artifact, or a folder of nothing but artifacts and their reports, may be replaced with `overwrite`; anything
    else in the way never is.
    """
    if not _holds_something(out, overwrite):
        return
    artifacts = [artifact for artifact in artifacts_in(out) if not artifact.is_symlink()]
    ours = {path for artifact in artifacts for path in (artifact, report_folder(artifact))}
    if not artifacts or (out not in artifacts and set(out.iterdir()) - ours):
        raise TurbopocketError(
            f"output folder {out} is not empty and has no manifest.json, so it is not an artifact; "
            "--overwrite replaces artifacts only"
        )
    for artifact in artifacts:
        _refuse_strangers(artifact, _artifact_files(artifact))
        if artifact != out:
            refuse_folder(report_folder(artifact), overwrite)


def refuse_folder(folder: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when `folder` is neither free nor, with `overwrite`, as `write_record` left it."""
    if _holds_something(folder, overwrite):
        files = _values(folder / RECORD, "files")
        if files is None:
            raise TurbopocketError(
                f"{folder} is not empty and has no {RECORD}, so no command of this version made it; --overwrite "
                "replaces what is ours and nothing else",
                hint=_ELSEWHERE,
            )
        _refuse_strangers(folder, [RECORD, *map(str, files)])


def refuse_run(run: Path, strangers: Sequence[Path]) -> None:
    """Raises TurbopocketError when a run folder is none, or for the first of the strangers in it."""
    if os.path.lexists(run) and not run.is_dir():
        raise TurbopocketError(f"{run} is not a folder; what a killed command goes on from is kept there")
    if strangers:
        raise TurbopocketError(
            f"{run} holds {strangers[0].relative_to(run)}, which this command did not make; what it goes on from when "
            "it was killed is kept there",
            hint=_ELSEWHERE,
        )


def journal_files(run: Path) -> list[Path]:
    """All files in the folder `run` that stages of a build made."""
    return [path for path in sorted(run.rglob("*")) if path.is_file() and _is_product(path, run)]


def remove_halves(run: Path) -> None:
    """Removes files that a killed stage did not end; for whoever has the folder to itself."""
    for path in journal_files(run):
        if _HALF.fullmatch(path.name):
            path.unlink()


def remove_journal(run: Path, product: Path | None = None) -> int:
    """Removes what stages of a build made, or one product of them; anything else stays, and so do folders that hold it.

    Returns how many bytes are free.
    """
    within, freed = product or run, 0
    for path in journal_files(run):
        if path.is_relative_to(within):
            freed += path.lstat().st_size
            path.unlink()
    for path in [*sorted(within.rglob("*"), reverse=True), within]:
        if path.is_dir() and not path.is_symlink() and (path == run or _is_product_folder(path, run)):
            with suppress(OSError):  # not empty
                path.rmdir()
    return freed


def _is_product(path: Path, run: Path) -> bool:
    product, *inside = path.relative_to(run).parts
    stage = _PRODUCT.fullmatch(product)
    if stage is None or not inside or path.is_symlink() or (run / product).is_symlink():
        return False
    name = "/".join(inside).removesuffix(".partial")
    half = inside[:-1] in _INSIDE and _HALF.fullmatch(inside[-1])
    return stage[1] == _LOWERED or bool(half) or _IN_PRODUCT.fullmatch(name) is not None


def _is_product_folder(path: Path, run: Path) -> bool:
    product, *inside = path.relative_to(run).parts
    stage = _PRODUCT.fullmatch(product)
    return stage is not None and path.is_dir() and not path.is_symlink() and (inside in _INSIDE or stage[1] == _LOWERED)


def _holds_something(folder: Path, overwrite: bool) -> bool:
    """Whether what stands there has to be known for ours. Raises TurbopocketError for what is never replaced."""
    if folder.is_symlink():
        raise TurbopocketError(f"output {folder} is a symlink to {folder.readlink()}; it must be a new or empty folder")
    if folder.exists() and not folder.is_dir():
        raise TurbopocketError(f"output {folder} is a file; it must be a new or empty folder")
    if folder.is_mount():
        raise TurbopocketError(f"output {folder} is a mounted file system; no new folder can take its place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not overwrite:
        raise TurbopocketError(f"output folder {folder} is not empty", hint="give another folder, or --overwrite")
    return True


def _refuse_strangers(folder: Path, ours: Collection[str]) -> None:
    """Raises TurbopocketError for the first file that is not one of `ours`, and for a write-protected folder."""
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_dir() and not path.is_symlink():
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise TurbopocketError(f"{path} is write-protected; --overwrite does not change that")
        elif path.relative_to(folder).as_posix() not in ours and not is_temporary(path):
            raise TurbopocketError(
                f"{folder} holds {path.relative_to(folder)}, which no command of ours made; --overwrite replaces what "
                "is ours and nothing else",
                hint=_ELSEWHERE,
            )


def _artifact_files(artifact: Path) -> list[str]:
    files = _values(artifact / MANIFEST_NAME, "files")
    if files is None or not all(isinstance(entry, dict) and {"path", "sha256"} <= entry.keys() for entry in files):
        raise TurbopocketError(
            f"{artifact / MANIFEST_NAME} is not an artifact's manifest, or is damaged; --overwrite replaces artifacts "
            "only",
            hint=_ELSEWHERE,
        )
    return [MANIFEST_NAME, *(str(entry["path"]) for entry in files)]


def _values(path: Path, key: str) -> list[Any] | None:
    """The list under `key` of a JSON file; None when there is no such file, or none in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    values = found.get(key) if isinstance(found, dict) else None
    return values if isinstance(values, list) else None
