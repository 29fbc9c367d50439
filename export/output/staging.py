# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all: they are made beside their final place and put there when they are done.

All that a command makes lies in one hidden folder beside its output until then, under a lock that the system frees when
the process ends, however it ends. The next command for the same output clears up what a killed one left.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...ground.errors import TurbopocketError
from ...runtimes.manifest import MANIFEST_NAME
from .replacing import CONTENTS, JOURNAL, NEW, replace_folders, settle

_LOCK = "lock"
_TEMPORARY = ".turbopocket-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What only writing meets; the error of an open file does not name it."""


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


def output_path(out: Path) -> Path:
    """Returns the absolute path of an output. Raises TurbopocketError for the root folder, which nothing is beside."""
    out = out.absolute()
    if out.name in ("", ".."):
        out = out.resolve()
    if not out.name:
        raise TurbopocketError(f"output {out} is the root of the file system; it must be a new or empty folder")
    return out


class Busy(TurbopocketError):
    """Another process holds the output."""


@dataclass(frozen=True)
class Claim:
    """An output that is this process's to make; `refuse` raises TurbopocketError when something is in its way."""

    hidden: Path
    refuse: Callable[[], None]

    @contextmanager
    def staged(self, *finals: Path) -> Iterator[tuple[Path, ...]]:
        """Yields empty folders that take the places of `finals`, beside one another, on success; none of them else.

        Raises TurbopocketError when one can not be written, or something came into its way meanwhile.
        """
        made = tuple(self.hidden / NEW / final.name for final in finals)
        with _can_not_write(finals[0]):
            for folder in made:
                folder.mkdir(parents=True)
        with _can_not_write(finals[0], self.hidden):
            yield made
        with _can_not_write(finals[0]):
            self.refuse()
            replace_folders(self.hidden, [final.name for final in finals])


@contextmanager
def claimed(out: Path, refuse: Callable[[], None]) -> Iterator[Claim]:
    """Makes the output at `out` (see `output_path`) this process's while the block runs, after ending what a killed
    one left of it.

    `refuse` is asked before the block, and again before anything is replaced. Raises TurbopocketError at once when
    another process holds the output.
    """
    hidden, lock = _hidden_folder(out), None
    missing = [folder for folder in hidden.parents if not folder.exists()]
    try:
        with _can_not_write(out):
            lock = _lock(hidden, out)
            settle(hidden)
            _clear(hidden)
            refuse()
        yield Claim(hidden, refuse)
    finally:
        if lock is not None:
            if not (hidden / JOURNAL).exists():
                _clear(hidden)
                with contextlib.suppress(OSError):
                    (hidden / _LOCK).unlink()
                    hidden.rmdir()
            os.close(lock)
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: there is an output
                folder.rmdir()


def settle_output(out: Path) -> None:
    """Puts right what a command that was killed while it replaced `out` left; for those who only read it.

    Raises TurbopocketError when that can not be done.
    """
    out = output_path(out)
    if (_hidden_folder(out) / JOURNAL).is_file():
        with contextlib.suppress(Busy), claimed(out, lambda: None):
            pass


def _hidden_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.turbopocket")


@contextmanager
def _can_not_write(path: Path, within: Path | None = None) -> Iterator[None]:
    """Makes one sentence of an OSError: of any, or of those of files `within` a folder and of a disk that is full."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else None
        if within and error.errno not in _FULL and not (named and Path(named).is_relative_to(within)):
            raise
        raise TurbopocketError(f"can not write {path}: {error.strerror or error}") from error


def _lock(hidden: Path, out: Path) -> int:
    """An open file in the hidden folder that only this process has a lock on.

    The last holder removes file and folder, so what was opened may be gone by the time that it is locked.
    """
    while True:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        created = _made_or_ours(hidden)
        try:
            file = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), (hidden / _LOCK).lstat()):
                os.truncate(file, 0)
                os.write(file, str(os.getpid()).encode())
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = os.read(file, 20).decode(errors="replace")
            os.close(file)
            process = f" (process {holder})" if holder.isdecimal() else ""
            raise Busy(f"output {out} is being made by another command{process}") from None
        except OSError as error:
            if created:  # no locks on this file system: making the folder, which only one can, is as good
                return file
            os.close(file)
            raise TurbopocketError(
                f"output {out} may be in the making: {hidden} is there, and this file system has no locks "
                f"({error.strerror}) to tell whether a process still uses it",
                hint="when none does, move what you need from that folder, and remove it",
            ) from error
        os.close(file)


def _made_or_ours(hidden: Path) -> bool:
    """Makes the folder, or returns False for one that another command made. TurbopocketError for a foreign one."""
    try:
        with contextlib.suppress(FileExistsError):
            hidden.mkdir(mode=0o700)
            return True
        found = hidden.lstat()
        foreign = not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid()
        if foreign or not {path.name for path in hidden.iterdir()} <= {*CONTENTS, _LOCK}:
            raise TurbopocketError(f"{hidden} is in the way, and is not of a turbopocket command of this user")
    except FileNotFoundError:  # its owner has just ended
        pass
    return False


def _clear(hidden: Path) -> None:
    for path in [hidden / name for name in CONTENTS]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_file(path: Path, overwrite: bool) -> None:
    """Raises TurbopocketError when no file can be written at `path`, before any work is done.

    Only a free place will do, or a plain file with `overwrite`: never a link, device, pipe or socket.
    """
    with _can_not_write(path):
        _refuse_in_the_way(path, overwrite)
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        tempfile.TemporaryFile(dir=os.path.realpath(folder)).close()  # on Linux it never has a name


def write_atomically(path: Path, data: bytes, overwrite: bool = True) -> None:
    """Writes a file, in folders that are made for it, whole or not at all. Raises as `refuse_file` does."""
    beside = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    with _can_not_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Unlike the files of `tempfile`, one that others may read as the user's mask says.
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(data)
            _refuse_in_the_way(path, overwrite)
            if overwrite:
                beside.replace(path)
            else:
                _rename_to_free_place(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether this is what a killed `write_atomically` left."""
    return path.name.startswith(_TEMPORARY) and path.is_file()


def _rename_to_free_place(file: Path, path: Path) -> None:
    """Unlike a rename, a link takes no place that came to be taken a moment ago."""
    try:
        path.hardlink_to(file)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        file.rename(path)


def _refuse_in_the_way(path: Path, overwrite: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise TurbopocketError(f"output {path} is a {_kind(mode)}; it must be a new file, or a plain one to overwrite")
    if not overwrite:
        raise TurbopocketError(f"output {path} exists", hint="give another file, or --overwrite")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFLNK: "symlink", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
