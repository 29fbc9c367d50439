# SPDX-License-Identifier: Apache-2.0
"""Memory and time that a stranger's model may take: no more than there is, and not for ever.

Needs the standard library alone; the emulated side has no more.
"""

import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_SECONDS = 3600
"""Of one answer: a call of the largest model takes minutes on one core."""


def available_bytes() -> int | None:
    """Memory that can be had without taking anybody's, swap included; None where the system does not say."""
    found = _kilobytes(Path("/proc/meminfo"), "MemAvailable", "SwapFree")
    return None if len(found) < 2 else 1024 * sum(found)


def limit_memory() -> tuple[int, int] | None:
    """From now on who asks for more memory than is available is told that there is none, and nobody is ended for it.

    Returns the limits of before (soft and hard, in bytes); None where the system knows none, and nothing changed.
    """
    available, own = available_bytes(), _kilobytes(Path("/proc/self/status"), "VmData")
    if available is None or not own or not hasattr(resource, "RLIMIT_DATA"):
        return None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    known = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([1024 * own[0] + available, *known]), before[1]))
    return before


@contextmanager
def within_memory() -> Iterator[None]:
    """Memory is limited until the end of the block."""
    before = limit_memory()
    try:
        yield
    finally:
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def bounded(stop: Callable[[], object]) -> Iterator[threading.Event]:
    """Within it memory is limited, and `stop` is called from another thread after `MOST_SECONDS`; yields what is set
    then."""
    late = threading.Event()

    def end() -> None:
        late.set()
        stop()

    watchdog = threading.Timer(MOST_SECONDS, end)
    watchdog.daemon = True
    watchdog.start()
    try:
        with within_memory():
            yield late
    finally:
        watchdog.cancel()


def _kilobytes(table: Path, *names: str) -> list[int]:
    try:
        text = table.read_text()
    except OSError:  # not Linux
        return []
    found = [re.search(rf"^{name}:\s*(\d+) kB", text, re.M) for name in names]
    return [int(each[1]) for each in found if each]
