# SPDX-License-Identifier: Apache-2.0
"""What stages made, in files, each under the hash of what it was made from: a build goes on where one was killed.

The journal of `art` is the folder `art.run` beside it. A product is whole, or in a folder whose name ends in
`.partial`, in which its stage goes on. No key holds a place, so a journal can be moved to another machine.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...ground.files import write_whole
from ..output.owned import KEY_FILE, journal_files, remove_halves, remove_journal
from ..output.staging import Busy, output_path, run_folder
from ..progress import StageProgress
from ..units import format_bytes

if TYPE_CHECKING:  # neither clearing up nor a lock needs PyTorch
    from ..families.base import LoadedModel

Stage = Literal["calibrate", "measure", "compress", "lower"]
"""Stages at which a build can stop, in order."""

KEPT_BYTES = 2**30
"""What a finished build leaves of itself unless it is told to: a second target or another budget is then quick, and no
disk fills up unasked."""
TOOLS = ("turbopocket", "torch", "diffusers", "transformers", "numpy")
"""The libraries that compute."""
_SOURCES = ("ground", "quant", "runtimes", "export")
_CODE = (".py", ".cpp", ".h", ".safetensors")


class Journal:
    """The products of one model's stages; `model` is its identity."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model, self._always = folder, model, {"model": model, "code": code_identity()}

    def key(self, stage: str, inputs: Mapping[str, Any]) -> str:
        """16 hexadecimal digits of a stage, what it is made from, the model, our code and the libraries' versions.

        `inputs` are JSON values.
        """
        return sha256(self._told(stage, inputs).encode()).hexdigest()[:16]

    def product(self, stage: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """The folder of a stage's product; `make` fills it when it is not there, or goes on where it was killed."""
        final = self.folder / f"{stage}-{self.key(stage, inputs)}"
        if not final.is_dir():
            partial = self._begun(final.with_name(f"{final.name}.partial"), stage, inputs)
            try:
                make(partial)
            except BaseException:
                if [each.name for each in partial.iterdir()] == [KEY_FILE]:  # nothing to go on from
                    remove_journal(self.folder, partial)
                raise
            partial.rename(final)
        return final

    def store(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        """A folder for products of a stage that are whole file by file."""
        return self._begun(self.folder / f"{stage}-{self.key(stage, inputs)}", stage, inputs)

    def unusable(self) -> list[Path]:
        """Folders of products of another version of our code, or of another model, or of this one before it changed."""
        folders = [folder for folder in sorted(self.folder.iterdir()) if (folder / KEY_FILE).is_file()]
        return [folder for folder in folders if not self._is_of_now(folder)]

    def _is_of_now(self, folder: Path) -> bool:
        try:
            told = json.loads((folder / KEY_FILE).read_text(encoding="utf-8"))
            return all(told[name] == value for name, value in self._always.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _begun(self, folder: Path, stage: str, inputs: Mapping[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / KEY_FILE).is_file():
            with write_whole(folder / KEY_FILE) as file:
                file.write_text(self._told(stage, inputs) + "\n", encoding="utf-8")
        return folder

    def _told(self, stage: str, inputs: Mapping[str, Any]) -> str:
        return json.dumps({"stage": stage, **self._always, **inputs}, sort_keys=True, indent=1)


@dataclass
class RunFolder:
    """The folder in which a build works, and this process's alone while it does."""

    path: Path
    progress: StageProgress
    of_now: Journal | None = None

    def journal(self, model: "LoadedModel") -> Journal:
        """The journal of a model; says so once when there are products that are not of it."""
        from ..checkpoint.identity import model_identity

        self.of_now = Journal(self.path, model_identity(model))
        if odd := self.of_now.unusable():
            self.progress.remark(
                f"note: {self.path} holds results of another version, or of another model or this one before it "
                f"changed: {len(odd)} are not used"
            )
        return self.of_now

    def finish(self, keep: bool | None) -> None:
        """Removes what a build that has succeeded left and nobody can use, and decides about the rest; see `settle`."""
        for folder in self.of_now.unusable() if self.of_now else ():
            remove_journal(self.path, folder)
        settle(self.path, keep, self.progress)


@contextmanager
def opened(path: Path, keep: bool | None, progress: StageProgress | None) -> Iterator[RunFolder]:
    """The run folder while the block works in it; what it holds is decided about when the block ends well.

    `progress` is told, by default on stderr.
    Raises TurbopocketError when another process works in it.
    """
    path.mkdir(parents=True, exist_ok=True)
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(held, path)
        try:
            remove_halves(path)
            run = RunFolder(path, progress or StageProgress())
            yield run
            run.finish(keep)
        finally:
            with suppress(OSError):  # not empty
                path.rmdir()
    finally:
        os.close(held)


def _lock(held: int, path: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(f"{path} is in use by another build", hint="wait for it, or give another --run") from None
    except OSError:  # a file system without locks: what two builds write there is the same
        pass


def clean(out: Path, run: Path | None = None) -> tuple[Path, int]:
    """Removes what builds of `out` left in `run`, by default `<out>.run`; returns that folder, and the bytes freed.

    Raises TurbopocketError when a build works there. What no build made stays.
    """
    path = run or run_folder(output_path(out))
    if not path.is_dir():
        return path, 0
    with opened(path, True, StageProgress(quiet=True)):
        return path, remove_journal(path)


def settle(path: Path, keep: bool | None, progress: StageProgress) -> None:
    """Removes a journal when `keep` is False, or is None and it is over `KEPT_BYTES`; says in a line what is done."""
    size = sum(file.stat().st_size for file in journal_files(path))
    if keep is False or (keep is None and size > KEPT_BYTES):
        remove_journal(path)
        if keep is None:
            progress.remark(f"note: {format_bytes(size)} of intermediate results were removed; --keep keeps them")
    elif size and keep is None:
        progress.remark(
            f"note: another budget or target goes on from {path} ({format_bytes(size)}); `turbopocket clean` removes it"
        )


@lru_cache
def code_identity() -> str:
    """A hash of our own source files and of the versions of the libraries that compute."""
    root, told = Path(__file__).parents[2], sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _CODE and path.is_file():
                told.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    told.update(json.dumps({name: metadata.version(name) for name in TOOLS}).encode())
    return told.hexdigest()[:16]
