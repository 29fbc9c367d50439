# SPDX-License-Identifier: Apache-2.0
"""New folders in the places of old ones: all of them or none, also when the process is killed in between.

They are made in `NEW` of a hidden folder beside their places and put there one by one, the first of them last: its move
decides. A journal tells which is which meanwhile. Whoever finds one takes the moves before the deciding one back, or,
when that was done, forgets what was replaced.

Linux swaps two folders in one step, so that a reader always finds one (renameat2, Linux 3.15; ext4, XFS, Btrfs, tmpfs).
Elsewhere the old folder moves to `OLD` first: for that moment its place is empty, and a kill then leaves it so until
the next command that settles.
"""

import ctypes
import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...ground.errors import TurbopocketError

NEW, OLD, JOURNAL = "new", "old", "journal.json"
_JOURNAL_BEGUN = "journal.begun"
CONTENTS = (NEW, OLD, JOURNAL, _JOURNAL_BEGUN)
"""All that a hidden folder holds."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def replace_folders(hidden: Path, names: Sequence[str]) -> None:
    """Puts the folders `hidden/NEW/<name>` beside `hidden`, and what stands there into `hidden`.

    Raises OSError or TurbopocketError when one can not be put; then all stand as before, else see `settle`.
    """
    made = {name: hidden / NEW / name for name in names}
    for folder in made.values():
        _flush(folder)
    begun = hidden / _JOURNAL_BEGUN
    with begun.open("w") as file:
        json.dump({name: _inode(folder) for name, folder in made.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    begun.replace(hidden / JOURNAL)
    try:
        for name in reversed(names):
            _put(hidden, name)
    finally:
        settle(hidden)


def settle(hidden: Path) -> None:
    """Ends a replacement that was cut short: done when its deciding move was, else everything is put back.

    Without a journal nothing has moved. Raises TurbopocketError, and moves nothing more, when the folders there are not
    those that the journal names; the journal then stays.
    """
    try:
        inodes: dict[str, int] = json.loads((hidden / JOURNAL).read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise TurbopocketError(f"{hidden / JOURNAL} is damaged: {error}; {_by_hand(hidden)}") from error
    placed = {name: _is_placed(hidden, name, inode) for name, inode in inodes.items()}
    if not next(iter(placed.values())):
        for name, inode in inodes.items():
            _take_back(hidden, name, inode, placed)
    (hidden / JOURNAL).unlink()


def exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step. False, and nothing done, where the system or the file system can not."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _put(hidden: Path, name: str) -> None:
    made, final = hidden / NEW / name, hidden.parent / name
    try:
        made.rename(final)  # to a free place, or over an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if not exchange(made, final):
        (hidden / OLD).mkdir(exist_ok=True)
        final.rename(hidden / OLD / name)
        made.rename(final)


def _is_placed(hidden: Path, name: str, inode: int) -> bool:
    """Whether the new folder has left `NEW`: a folder keeps its inode when it moves, and a swap leaves the old one."""
    in_new, in_place = _inode(hidden / NEW / name), _inode(hidden.parent / name)
    if inode in (in_new, in_place) or in_new is None:
        return in_new != inode
    if in_place is None:  # a user moved it on, or a kill fell between the two renames
        return _inode(hidden / OLD / name) is None
    raise TurbopocketError(
        f"{hidden.parent / name}: a killed command was replacing it, and which of two folders is the new one can not "
        f"be told any more; {_by_hand(hidden)}"
    )


def _take_back(hidden: Path, name: str, inode: int, placed: Mapping[str, bool]) -> None:
    made, old, final = hidden / NEW / name, hidden / OLD / name, hidden.parent / name
    new_stands = _inode(final) == inode
    if _inode(old) is not None:
        if new_stands:
            final.rename(made)
        _restore(old, final, hidden)
    elif placed[name] and _inode(made) is not None:
        if not (new_stands and exchange(made, final)):
            _restore(made, final, hidden)
    elif new_stands:
        final.rename(made)


def _restore(kept: Path, final: Path, hidden: Path) -> None:
    try:
        kept.rename(final)
    except OSError as error:
        raise TurbopocketError(
            f"{kept} can not go back to {final} ({error.strerror}), which a killed command was replacing; "
            f"{_by_hand(hidden)}"
        ) from error


def _by_hand(hidden: Path) -> str:
    return f"what it replaced lies in {hidden}: move what you need from there, then remove that folder"


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def _flush(folder: Path) -> None:
    """Every file of the folder on disk, so that no power cut leaves the name of a new one with nothing in it."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_file() or path.is_dir():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
