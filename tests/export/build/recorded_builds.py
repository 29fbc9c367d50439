# SPDX-License-Identifier: Apache-2.0
"""A real build, recorded: the disk before each operation that changes names or opens a file to write.

argv is a recipe as JSON, a folder, the number of workers, 1 or 0 for whether it replaces an older build, and how many
of the states are built on. Each state is what SIGKILL leaves at that moment; each is looked at as the next command
finds it. Prints how many there were, and in how many of them the output was the older one, the new one and absent.
Without what follows the folder, that is an output to build. Only the first build of a component traces it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from turbopocket.export.build.build import build
from turbopocket.export.build.targets import build_targets
from turbopocket.export.output.replacing import JOURNAL
from turbopocket.export.output.staging import artifacts_in, claimed, report_folder, settle_output
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.quant.workers import Workers
from turbopocket.runtimes.manifest import load_manifest, verify

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.export.build.traced_once import remember_traces
from tests.export.crash_states import changes_something

NEIGHBOURS = (".art.backup/gold", "art.txt", ".art.turbopocket.old/x")
HIDDEN = ".art.turbopocket"
NOWHERE = Path("/nowhere/at/all")
TRACES = "traces"


class Recording:
    """Copies of a folder, made before each operation in it, and the inodes that its folders had."""

    def __init__(self, folder: Path, states: Path) -> None:
        self.folder, self.states, self.on = folder, states, False
        self.inodes: list[dict[int, str]] = []
        self._seen: object = None
        (states / "files").mkdir(parents=True)
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and changes_something(self.folder, NOWHERE, event, args):
            self.on = False
            try:
                self.take()
            finally:
                self.on = True

    def take(self) -> None:
        """The folder as it is, unless it is as it was."""
        found = {path.relative_to(self.folder).as_posix(): path.lstat() for path in sorted(self.folder.rglob("*"))}
        told = [(name, each.st_ino, each.st_size, each.st_mtime_ns) for name, each in found.items()]
        if told == self._seen:
            return
        self._seen = told
        state = self.states / str(len(self.inodes))
        state.mkdir()
        self.inodes.append({})
        for name, each in found.items():
            if (self.folder / name).is_dir():
                (state / name).mkdir()
                self.inodes[-1][each.st_ino] = name
                continue
            kept = self.states / "files" / f"{each.st_ino}-{each.st_size}-{each.st_mtime_ns}"
            if not kept.exists():
                shutil.copyfile(self.folder / name, kept)
            os.link(kept, state / name)

    def put(self, number: int, to_work_in: bool = False) -> None:
        """Makes the folder what it was, its files copied only where they may be written to.

        A journal, which names folders by inode, then names those that are there now.
        """
        shutil.rmtree(self.folder)
        way = shutil.copy2 if to_work_in else os.link
        shutil.copytree(self.states / str(number), self.folder, copy_function=way)
        journal = self.folder / HIDDEN / JOURNAL
        if journal.exists():
            named = {name: self.inodes[number][inode] for name, inode in json.loads(journal.read_text()).items()}
            now = {name: (self.folder / where).stat().st_ino for name, where in named.items()}
            journal.unlink()
            journal.write_text(json.dumps(now))


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def whole(out: Path) -> dict[str, str]:
    """The files of all that a build makes; of its artifacts, each verified."""
    artifacts = artifacts_in(out) if out.is_dir() else []
    for artifact in artifacts:
        verify(artifact, load_manifest(artifact))
    found = contents(out) if artifacts else {}
    return found | {f"report/{name}": each for name, each in contents(report_folder(out)).items()}


def require_one(out: Path, known: Mapping[str, dict[str, str]], absent: bool, where: str) -> str:
    found = whole(out)
    name = next((name for name, each in known.items() if each == found), None)
    if name is None and not found and absent and not out.exists():
        name = "absent"
    assert name, f"{where}: neither the old output nor the new one: {sorted(found)}"
    for each in NEIGHBOURS:
        kept = out.parent / each
        assert kept.is_file(), f"{where}: {each}, which is the user's, is gone"
        assert kept.read_text() == "mine", f"{where}: {each}"
    return name


def make(values: dict[str, Any], out: Path, workers: int) -> None:
    recipe = make_recipe(values, "test")
    if recipe.target.also:
        build_targets(recipe, out, True, quiet=True, workers=Workers(workers), keep=True)
    else:
        build(recipe, out, True, StageProgress(quiet=True), Workers(workers), keep=True)


def make_apart(values: dict[str, Any], out: Path) -> None:
    """A build in a new process: autograd and ONNX Runtime have threads in this one, and no fork is the same."""
    subprocess.run([sys.executable, __file__, json.dumps(values), str(out)], check=True)


def main() -> None:
    torch.set_num_threads(1)
    values, base = json.loads(sys.argv[1]), Path(sys.argv[2])
    if not sys.argv[3:]:
        remember_traces(make_recipe(values, "test"), base.parents[1] / TRACES)
        make(values, base, 1)
        return
    remember_traces(make_recipe(values, "test"), base / TRACES)
    workers = int(sys.argv[3])
    overwrite, built_on = sys.argv[4] == "1", int(sys.argv[5])
    folder = base / "w"
    out = folder / "art"
    for name in NEIGHBOURS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    known = {}
    if overwrite:
        make({**values, "seed": 1}, out, 1)
        known["old"] = whole(out)
    recording = Recording(folder, base / "states")
    recording.on = True
    make(values, out, workers)
    recording.on = False
    recording.take()
    known["new"] = whole(out)
    artifact = contents(out)
    assert artifact
    ends: Counter[str] = Counter()
    last = len(recording.inodes) - 1
    for number in range(last + 1):
        where = f"state {number} of {last}"
        recording.put(number)
        if overwrite:  # a reader finds an artifact also before anybody put things right
            for each in artifacts_in(out):
                verify(each, load_manifest(each))
            assert artifacts_in(out), where
        settle_output(out)
        ends[require_one(out, known, not overwrite, where)] += 1
        with suppress(RuntimeError), claimed(out, lambda: None) as claim, claim.staged(out):
            raise RuntimeError
        require_one(out, known, not overwrite, where)
        assert not (folder / HIDDEN).exists(), where
    for number in sorted({last * index // max(1, built_on - 1) for index in range(built_on)}):
        recording.put(number, to_work_in=True)
        make_apart(values, out)
        assert contents(out) == artifact, f"state {number} of {last}: a build that went on there has other bytes"
        require_one(out, {"new": whole(out)}, False, f"state {number}")
    print(json.dumps({"states": last + 1, "ends": ends}))


if __name__ == "__main__":
    main()
