# SPDX-License-Identifier: Apache-2.0
"""What this process and those it started hold of memory.

What counts is anonymous: a mapped file's pages can be dropped and read again, and so need no memory of their own.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.05
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
_PROCESSES = Path("/proc")


def anonymous_bytes(pid: int | None = None) -> int:
    """Anonymous bytes in memory of a process, this one by default, and all that it started, native libraries' included.

    One that has not begun a program of its own yet does not count: it still shows its parent's memory, twice what there
    is. Where the system does not tell them (it is not Linux), all bytes of theirs that are in memory.
    """
    pid = os.getpid() if pid is None else pid
    if sys.platform != "linux":
        return sum(_resident(each) for each in (pid, *_all_started_by(pid)))
    own = _command(pid)
    return _anonymous(pid) + sum(anonymous_bytes(child) for child in _started_by(pid) if _command(child) != own)


def _command(pid: int) -> bytes:
    """What it was started with, which is its parent's until then."""
    try:
        return (_PROCESSES / str(pid) / "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def _anonymous(pid: int) -> int:
    try:
        found = _ANONYMOUS.search((_PROCESSES / str(pid) / "status").read_text(encoding="utf-8"))
    except OSError:  # it has ended
        return 0
    return 1024 * int(found[1]) if found else 0


def _started_by(pid: int) -> list[int]:
    """Processes that each of its threads started, as far as they run."""
    found: list[int] = []
    try:
        for thread in (_PROCESSES / str(pid) / "task").iterdir():
            found += map(int, (thread / "children").read_text(encoding="utf-8").split())
    except OSError:  # it, or a thread, has ended
        pass
    return found


def _all_started_by(pid: int) -> list[int]:
    try:
        return [each.pid for each in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def available_bytes() -> int:
    """What processes can still take of this machine's memory before it swaps."""
    return int(psutil.virtual_memory().available)


def machine_bytes() -> int:
    """All memory that processes can have here, swap space included; what a container allows where that is less."""
    whole = int(psutil.virtual_memory().total + psutil.swap_memory().total)
    try:
        return min(whole, int(_CONTAINER_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # there is none
        return whole


_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


class PeakBytes:
    """The most that was seen of `read()` since it was last reset."""

    def __init__(self, read: Callable[[], int] = anonymous_bytes) -> None:
        self._read, self._lock = read, threading.Lock()
        self.bytes = 0

    def look(self) -> None:
        """Reads once."""
        found = self._read()
        with self._lock:
            self.bytes = max(self.bytes, found)

    def restart(self) -> int:
        """The peak so far; from now on what is seen from now on."""
        self.look()
        with self._lock:
            peak, self.bytes = self.bytes, 0
        return peak

    @contextmanager
    def watched(self, interval: float = SAMPLE_SECONDS) -> Iterator["PeakBytes"]:
        """Looks every `interval` seconds while the block runs, from a thread of its own."""
        ended = threading.Event()

        def look_on() -> None:
            while not ended.wait(interval):
                self.look()

        watcher = threading.Thread(target=look_on, daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            ended.set()
            watcher.join()
            self.look()
