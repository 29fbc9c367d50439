# SPDX-License-Identifier: Apache-2.0
"""Every state that a kill can leave on disk: the work is done in a child that gets SIGKILL before its nth operation."""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from turbopocket.export.output import replacing
from turbopocket.export.output.staging import claimed

_MOVES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.move")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def crash_states(folder: Path, prepare: Callable[[], None], work: Callable[[], None], besides: Path) -> Iterator[str]:
    """Yields each operation of the work, with `folder` as a kill before it leaves it; at last "" for none.

    An operation is whatever changes names or opens a file to write in `folder`, but not in the folders of `besides`.
    `prepare` makes the state before the work, each time anew.
    """
    operation = "first"
    for number in itertools.count():
        if not operation:
            return
        prepare()
        operation = killed_before(number, folder, work, besides)
        yield operation


def killed_before(number: int, folder: Path, work: Callable[[], None], besides: Path) -> str:
    """Does the work in a child that is killed before that operation, which is returned; "" if it has fewer."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(_killer(number, folder, besides, write_end))
            work()
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        operation = pipe.read()
    assert (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL) == bool(operation)
    return operation


def _killer(number: int, folder: Path, besides: Path, pipe: int) -> Callable[[str, tuple[Any, ...]], None]:
    done = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if not changes_something(folder, besides, event, args):
            return
        if done == number:
            os.write(pipe, f"{event} {' '.join(str(arg) for arg in args[:2])}".replace(str(folder), "").encode())
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    return audit


def changes_something(folder: Path, besides: Path, event: str, args: tuple[Any, ...]) -> bool:
    if event == "ctypes.dlsym":
        return bool(args[1] == "renameat2")
    if event not in (*_MOVES, "open") or (event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES)):
        return False
    paths = [Path(arg) for arg in args[:2] if isinstance(arg, str | Path) and arg]
    if all(besides in path.parent.parents for path in paths):
        return False
    # rmtree gives names in an open folder.
    return any(folder in path.parents or not path.is_absolute() for path in paths)


def killed_between(finals: tuple[Path, Path]) -> None:
    """Replaces the second of two folders by a new one with a file `new`, and leaves the first as SIGKILL does then."""
    child = os.fork()
    if child == 0:
        try:
            _replace_second(finals)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _replace_second(finals: tuple[Path, Path]) -> None:
    honest = replacing._put

    def put(hidden: Path, name: str) -> None:
        honest(hidden, name)
        os.kill(os.getpid(), signal.SIGKILL)

    replacing._put = put
    with claimed(finals[0], lambda: None) as claim, claim.staged(*finals) as folders:
        for folder in folders:
            (folder / "new").write_text("new")
