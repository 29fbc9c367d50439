# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch's bindings in the process of the tests, in the place of one of its own for each runner.

Starting one takes as long as lowering what it is to run. That a process of its own answers, and its end is survived, is
tested with `runtimes/executorch`.
"""

import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from turbopocket.runtimes.executorch.runner import ExecuTorchRunner
from turbopocket.runtimes.served import wire


@cache
def server() -> Any:
    from turbopocket.runtimes.executorch.serve import Server

    return Server()


class Here:
    """What `ServedProcess` offers, of programs of one runner."""

    def open(self, key: str, model: Path, weights: str = "") -> wire.Arrays:
        pipe = BytesIO()
        wire.write_text(pipe, str(model))
        wire.write_text(pipe, weights)
        return self._answer(wire.OPEN, key, pipe)

    def run(self, key: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> wire.Arrays:
        pipe = BytesIO()
        wire.write_tensors(pipe, inputs)
        wire.write_texts(pipe, outputs)
        return self._answer(wire.RUN, key, pipe)

    def shut(self, key: str) -> None:
        self._answer(wire.CLOSE, key, BytesIO())

    def _answer(self, verb: int, key: str, pipe: BytesIO) -> wire.Arrays:
        pipe.seek(0)
        found: wire.Arrays = server().answer(verb, f"{id(self)} {key}", pipe)
        return found


@contextmanager
def executorch_here() -> Iterator[None]:
    """While the block runs, runners begun in it start no process."""

    def started(runner: ExecuTorchRunner) -> Any:
        if runner._process is None:
            runner._scratch = tempfile.TemporaryDirectory(prefix="turbopocket-")
            runner._process = Here()  # type: ignore[assignment]
            runner._end = weakref.finalize(runner, runner._scratch.cleanup)
        return runner._process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExecuTorchRunner, "_started", started)
        yield
    if server.cache_info().currsize:
        server().opened.clear()
