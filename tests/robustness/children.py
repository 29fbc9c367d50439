# SPDX-License-Identifier: Apache-2.0
"""What one command did with hostile input, in a child of `zygote`, and whether that is allowed."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

IMPORTED = (
    "turbopocket.cli",
    "turbopocket.export.artifact",
    "turbopocket.export.build.targets",
    "turbopocket.export.check",
    "turbopocket.export.plan",
    "turbopocket.runtimes.coreml.runner",
    "turbopocket.runtimes.executorch.runner",
    "turbopocket.runtimes.onnx.runner",
    "diffusers",
    "transformers",
)
SECONDS = 120
"""Of one case, on a machine that does other things as well."""
BUG = 70


@dataclass(frozen=True)
class Ran:
    """How one command ended."""

    code: int
    hung: bool
    seconds: float
    out: str
    err: str

    @property
    def fault(self) -> str | None:
        """What no input may cause; None for a success and for a refusal in one sentence."""
        if self.hung:
            return "hang"
        if self.code < 0:
            return f"native crash (signal {-self.code})"
        if "Traceback (most recent call last)" in self.err + self.out:
            return "traceback"
        if self.code == BUG:
            return "bug"
        if self.code not in (0, 1, 2, 3):
            return f"exit code {self.code}"
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.code != 0 and len(errors) != 1:
            return "a refusal without its sentence"
        return None


class Children:
    """One process, in a changed environment, that forks a child for each command.

    `planted` is code that each child runs first: a fault to be found.
    """

    planted = ""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, str(Path(__file__).with_name("zygote.py")), json.dumps(IMPORTED)]
        changed = {**os.environ, **(environment or {})}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=changed)
        assert self._answer() == "ready"

    def command(self, folder: Path, *arguments: object, seconds: float = SECONDS) -> Ran:
        """Runs `turbopocket` with these arguments in a folder."""
        return self._run(folder, seconds, verb="command", arguments=[str(each) for each in arguments])

    def read_model(self, folder: Path, model: Path, seconds: float = SECONDS) -> Ran:
        """Does all that a build does with a model before it traces it."""
        return self._run(folder, seconds, verb="read", model=str(model))

    def _run(self, folder: Path, seconds: float, **job: Any) -> Ran:
        out, err = folder / ".stdout", folder / ".stderr"
        asked = {
            "folder": str(folder),
            "stdout": str(out),
            "stderr": str(err),
            "seconds": seconds,
            "planted": self.planted,
        }
        asked |= job
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._answer())
        said = [file.read_text(errors="replace") for file in (out, err)]
        return Ran(**found, out=said[0], err=said[1])

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
