# SPDX-License-Identifier: Apache-2.0
"""Builds that are killed at random moments and started again until they end.

argv is a recipe as JSON, a folder, the number of kills, a seed and the number of threads. Prints what was killed when,
and the files that each build ended with.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from turbopocket.export.build import build as module
from turbopocket.export.output.staging import settle_output
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.runtimes.manifest import MANIFEST_NAME, load_manifest


class Told(StageProgress):
    """Writes the name of each stage into a file as it begins."""

    def __init__(self, file: Path) -> None:
        super().__init__(quiet=True)
        self.file = file

    def stage(self, name: str, total: int | None = None) -> Any:
        self.file.write_text(name)
        return super().stage(name, total)


def attempt(values: dict[str, Any], out: Path, stage: Path, seconds: float) -> bool:
    """Whether a build ended before it was killed; a process for itself, which has all imported already."""
    stage.write_text("start")
    child = os.fork()
    if child == 0:
        module.build(make_recipe(values, "test"), out, False, Told(stage), keep=True)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"a build failed with status {status} in {stage.read_text()}")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    values, folder, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    draw, stage = random.Random(int(sys.argv[4])), folder / "stage"
    torch.set_num_threads(int(sys.argv[5]))
    folder.mkdir(parents=True)
    start = time.monotonic()
    attempt(values, folder / "undisturbed", stage, 1e9)
    whole = time.monotonic() - start
    finished = [folder / "undisturbed"]
    killed: list[tuple[str, float]] = []
    while True:
        out, last = folder / f"build{len(finished)}", len(killed) == kills
        seconds = 1e9 if last else draw.uniform(0, whole)
        if attempt(values, out, stage, seconds):
            finished.append(out)
        else:
            killed.append((stage.read_text(), round(seconds, 2)))
            settle_output(out)
            if (out / MANIFEST_NAME).is_file():  # killed when all was done
                finished.append(out)
        if last:
            break
    files = {out.name: {each.path: each.sha256 for each in load_manifest(out).files} for out in finished}
    print(json.dumps({"seconds": whole, "killed": killed, "files": files}))


if __name__ == "__main__":
    main()
