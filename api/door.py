# SPDX-License-Identifier: Apache-2.0
"""How a command ends: an exit code, and one sentence on stderr for whatever went wrong."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from .export.signals import Stopped, stopped_by_signals
from .ground.errors import TurbopocketError
from .ground.reading import words

MOST_LETTERS = 4000
"""Of one error: what a user gave may be in it, and has no bound of its own."""
BUG = 70
"""Exit code of a bug of ours, as sysexits.h has it."""
_shown = {"traceback": False}


def show_tracebacks(asked: bool) -> None:
    """Whether a bug of ours is to end with its traceback."""
    _shown["traceback"] = asked


def run_command(command: Callable[[], int | None]) -> None:
    """Runs a command and exits; a user's mistake becomes one message on stderr and an exit code, never a traceback.

    A bug of ours has a traceback for those who ask for it.
    """
    _silence_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        with stopped_by_signals():
            code = command()
    except TurbopocketError as error:
        _fail(str(error), error.hint, error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", None, 1)
    except Stopped as stop:
        _fail(f"{stop}; nothing half-written was left behind", None, 128 + stop.signal)
    except MemoryError as error:
        _fail(f"this machine's memory is not enough: {words(error)}", None, 1)
    except Exception as error:
        # Typer's own complaints (unknown option, missing argument) end with 1 here: 2 means over budget.
        if hasattr(error, "format_message"):
            _fail(error.format_message(), "turbopocket --help", 1)
        if _shown["traceback"]:
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        _fail(
            f"a bug of turbopocket: {type(error).__name__}: {words(error)} ({Path(at.filename).name}:{at.lineno})",
            "put -v after turbopocket for the traceback, and report it with the command and its input",
            BUG,
        )
    else:
        sys.exit(code or 0)


def _silence_libraries() -> None:
    """Libraries tell of GPU kernels and tensor types that they miss and nobody asked for; their errors still show."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fail(message: str, hint: str | None, code: int) -> None:
    print(f"error: {message if len(message) <= MOST_LETTERS else message[:MOST_LETTERS] + '…'}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)
