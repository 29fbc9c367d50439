# SPDX-License-Identifier: Apache-2.0
"""How a command talks and ends: data once on stdout, an exit code, one sentence on stderr for whatever went wrong."""

import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from .export.signals import Stopped, stopped_by_signals
from .ground.errors import TurbopocketError
from .ground.extras import install_hint
from .ground.reading import words

MOST_LETTERS = 4000
"""Of one error: what a user gave may be in it, and has no bound of its own."""
BUG = 70
"""Exit code of a bug of ours, as sysexits.h has it."""
CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code when whoever read our output has ended, as `head` does: what shells give other programs then."""


@dataclass
class Manner:
    """How this command is to talk: with a bug's traceback, without progress, and as JSON, which is said once."""

    tracebacks: bool = False
    quiet: bool = False
    as_json: bool = False
    said: bool = False

    def reset(self, as_json: bool) -> None:
        """Begins a command."""
        self.tracebacks = self.quiet = self.said = False
        self.as_json = as_json


manner = Manner()


class ReaderGone(Exception):
    """Whoever read our stdout has ended. No OSError: Typer would end the process on that, as on a wrong request."""


class Stdout(Console):
    """What a person reads of the data; brackets in names and paths are no markup, and a closed pipe is an error."""

    def __init__(self) -> None:
        super().__init__(markup=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def emit(value: Any, as_json: bool, show: Callable[[Console], None]) -> None:
    """Prints `value` as JSON, or lets `show` print it for a person."""
    try:
        if as_json:
            manner.said = True
            print(json.dumps(value))
        else:
            show(Stdout())
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it when it ends
        raise ReaderGone from None


def run_command(command: Callable[[], int | None]) -> None:
    """Runs a command and exits; a user's mistake becomes one message on stderr and an exit code, never a traceback.

    A bug of ours has a traceback for those who ask for it.
    """
    _silence_libraries()
    manner.reset("--json" in sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        with stopped_by_signals():
            code = command()
    except TurbopocketError as error:
        _fail(str(error), error.hint, error.exit_code)
    except ReaderGone:
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", None, 1)
    except Stopped as stop:
        _fail(f"{stop}; nothing half-written was left behind", None, 128 + stop.signal)
    except MemoryError as error:
        _fail(f"this machine's memory is not enough: {words(error)}", None, 1)
    except ModuleNotFoundError as error:
        if (hint := install_hint(error.name or "")) is None:
            _fail_with_bug(error)
        _fail(f"this needs {(error.name or '').partition('.')[0]}, which is not installed here", hint, 1)
    except Exception as error:
        # Typer's own complaints (unknown option, missing argument) end with 1 here: 2 means over budget.
        if not hasattr(error, "format_message"):
            _fail_with_bug(error)
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(0)
        _fail(error.format_message(), f"{context.command_path if context else 'turbopocket'} --help", 1)
    else:
        sys.exit(code or 0)


def _fail_with_bug(error: Exception) -> NoReturn:
    if manner.tracebacks:
        raise error
    at = traceback.extract_tb(error.__traceback__)[-1]
    _fail(
        f"a bug of turbopocket: {type(error).__name__}: {words(error)} ({Path(at.filename).name}:{at.lineno})",
        "put -v after turbopocket for the traceback, and report it with the command and its input",
        BUG,
    )


def _silence_libraries() -> None:
    """Libraries tell of GPU kernels and tensor types that they miss and nobody asked for; their errors still show."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    """The sentence on stderr; with --json it is the one JSON object on stdout as well, where data is not there yet."""
    shown = message if len(message) <= MOST_LETTERS else message[:MOST_LETTERS] + "…"
    if manner.as_json and not manner.said:
        print(json.dumps({"error": shown, "hint": hint, "exit_code": code}))
    print(f"error: {shown}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)
