# SPDX-License-Identifier: Apache-2.0
"""A command that is told to stop clears up first: signals become exceptions, as Ctrl-C does in every Python."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLEARING_UP_S = 5.0
"""A closing terminal sends SIGHUP twice, and people press Ctrl-C twice: what comes so soon disturbs no clearing up."""


class Stopped(BaseException):
    """The process was told to stop by `signal`. No KeyboardInterrupt: Typer ends the process on one, without a word."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.signal = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raises Stopped in the block on Ctrl-C, SIGTERM and SIGHUP; on none that this process was started to ignore.

    Only the main thread can be told so: elsewhere the block runs as it is.
    """
    last: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None or now - last > CLEARING_UP_S:
            last = now
            raise Stopped(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in heard:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
