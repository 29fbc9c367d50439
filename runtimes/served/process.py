# SPDX-License-Identifier: Apache-2.0
"""A process that runs models and is spoken to over its pipes, as `wire` says."""

import contextlib
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from numpy.typing import NDArray

from ...ground.errors import TurbopocketError
from ..limits import MOST_SECONDS
from . import wire

Arrays = dict[str, NDArray[Any]]
MOST_LETTERS = 300
"""Of what a process said last."""
_END_SECONDS = 20


class ServedProcess:
    """One such process, from its start to `close`; `label` is what errors call it.

    Whatever ends it, such as an instruction that its CPU lacks, is a TurbopocketError of the request it did not answer.
    """

    def __init__(self, command: Sequence[str], label: str, environment: Mapping[str, str] | None = None) -> None:
        self.label = label
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=environment
        )
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        self._requests, self._replies = requests, replies

    def open(self, key: str, model: Path, weights: str = "") -> Arrays:
        """Makes a model ready under `key`, and gives what the process says of it, if anything.

        `weights` is its file or folder of weights, if it has one apart.
        """

        def body(pipe: IO[bytes]) -> None:
            wire.write_text(pipe, str(model))
            wire.write_text(pipe, weights)

        return self._ask(wire.OPEN, key, body, f"{key} from {model}")

    def run(self, key: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """The named outputs of an open model."""

        def body(pipe: IO[bytes]) -> None:
            wire.write_tensors(pipe, inputs)
            wire.write_texts(pipe, outputs)

        return self._ask(wire.RUN, key, body)

    def shut(self, key: str) -> None:
        """Frees an open model."""
        self._ask(wire.CLOSE, key)

    def about(self) -> Arrays:
        """What the process says of itself."""
        return self._ask(wire.ABOUT, "")

    def close(self) -> None:
        """Ends the process. Its work is lost; asking it again is an error."""
        with contextlib.suppress(OSError):  # it ended first
            self._requests.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(
        self, verb: int, key: str, body: Callable[[IO[bytes]], None] = lambda pipe: None, about: str | None = None
    ) -> Arrays:
        """The answer to one request; `about` is what errors name, by default the key."""
        about = about or key
        if self._requests.closed:
            raise TurbopocketError(f"{self.label} was closed, {key} can not be run on it any more")
        requests, replies = self._requests, self._replies
        watchdog = threading.Timer(MOST_SECONDS, self._process.kill)
        watchdog.start()
        try:
            requests.write(bytes([verb]))
            wire.write_text(requests, key)
            body(requests)
            requests.flush()
            if wire.read_exactly(replies, 1)[0] == wire.DONE:
                return wire.read_tensors(replies)
            reason = wire.read_text(replies)
        except (OSError, ValueError, wire.Broken) as error:
            raise TurbopocketError(f"{self.label}{f', {about}' if about else ''}: {self._end(error)}") from error
        finally:
            watchdog.cancel()
        raise TurbopocketError(f"{self.label}, {about}: {reason}")

    def _end(self, error: Exception) -> str:
        """Why there is no answer: how the process ended and the last it said, or what was wrong with the answer."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return str(error)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines() or ["nothing on stderr"]
        how = f"with {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        late = f" after {MOST_SECONDS} s without an answer" if code == -signal.SIGKILL else ""
        return f"the process ended {how}{late}: {said[-1][:MOST_LETTERS]}"
