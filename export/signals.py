# SPDX-License-Identifier: Apache-2.0
"""A command that is told to stop clears up first: signals become exceptions, as Ctrl-C does in every Python."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLEARING_UP_S = 5.0
"""A closing terminal sends SIGHUP twice, and people press Ctrl-C twice: what comes so soon disturbs no clearing up."""
REMINDING_S = 0.05
PATIENCE_S = 5.0
"""A tracer is native code that calls Python nearly all the time: after so long it is left from wherever it is."""
_TRACING = {"__torch_dispatch__", "__torch_function__"}
_TRACING_FILE = "sym_node.py"


class Stopped(BaseException):
    """The process was told to stop by `signal`. No KeyboardInterrupt: Typer ends the process on one, without a word."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.signal = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raises Stopped in the block on Ctrl-C, SIGTERM and SIGHUP; on none that this process was started to ignore.

    It is raised later in an import, a destructor, and for a while in PyTorch's tracer: what is raised there can be lost
    (libraries whose import fails are done without, and what a destructor raises is ignored), become another exception,
    or end the process at once. Where it was lost nevertheless it is raised again, and what it has become is Stopped.
    Only the main thread can be told so: elsewhere the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    stop = _Stop()
    try:
        for number in heard:
            signal.signal(number, stop.hear)
        yield
    except Exception as error:
        if stop.asked is not None:
            raise Stopped(stop.asked) from error
        raise
    finally:
        stop.end()
        for number, handler in heard.items():
            signal.signal(number, handler)


class _Stop:
    """What a block was told by signals."""

    asked: signal.Signals | None = None

    def __init__(self) -> None:
        self._ended = self._is_reminder = False
        self._first = 0.0
        self._raised: float | None = None
        self._lock = _thread.allocate_lock()

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Raises Stopped, where it may be raised; a reminder comes later. Called in the main thread."""
        is_reminder, self._is_reminder = self._is_reminder, False
        now = time.monotonic()
        if self._ended:
            return
        if self.asked is None:
            self.asked, self._first = signal.Signals(number), now
            # not by threading.Thread, whose locks the interrupted code may hold
            _thread.start_new_thread(self._remind, (self.asked,))
        elif self._raised is not None and (_clearing_up() if is_reminder else now - self._raised <= CLEARING_UP_S):
            return
        if _can_be_raised_from(sys._getframe(1), now - self._first <= PATIENCE_S):
            self._raised = now
            raise Stopped(self.asked)

    def end(self) -> None:
        """From now on signals are heard no more, reminders neither."""
        with self._lock:
            self._ended = True

    def _remind(self, number: signal.Signals) -> None:
        """Calls `hear` in the main thread as a signal would, until the block has ended."""
        while True:
            time.sleep(REMINDING_S)
            with self._lock:  # or it would come after the block, to another handler
                if self._ended:
                    return
                self._is_reminder = True
                _thread.interrupt_main(number)


def _clearing_up() -> bool:
    """Whether a Stopped is being handled, itself or behind what was raised since."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _can_be_raised_from(frame: FrameType | None, patient: bool) -> bool:
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name == "__del__" or file.startswith("<frozen importlib") or file.endswith(("weakref.py", "_weakrefset.py")):
            return False
        if patient and (name in _TRACING or file.endswith(_TRACING_FILE)):
            return False
        frame = frame.f_back
    return True
