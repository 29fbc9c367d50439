# SPDX-License-Identifier: Apache-2.0
"""A real build, recorded: the disk before each operation that changes names or opens a file to write.

argv is a recipe as JSON, a folder and the number of workers. An output is built there, then another in its place. Each
state is what SIGKILL leaves at that moment; each is looked at as the next command finds it, and one of the second build
is built on. At the same moments another build of the output begins beside the one that lives. Prints of both builds how
many states there were, in how many of them the output was the older one, the new one and absent, and how often the
build beside was told that another is at work, or that there is an output, and how often it might have gone on.
Without workers, the folder is an output to build. Traces are kept beside the folder, for other cases too.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from turbopocket.export.build.build import build
from turbopocket.export.build.targets import build_targets
from turbopocket.export.output.owned import refuse_build
from turbopocket.export.output.replacing import JOURNAL
from turbopocket.export.output.staging import (
    Busy,
    artifacts_in,
    claimed,
    report_folder,
    run_folder,
    settle_output,
)
from turbopocket.export.progress import StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.workers import Workers
from turbopocket.runtimes.manifest import load_manifest, verify

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.export.build.traced_once import remember_traces
from tests.export.crash_states import changes_something

NEIGHBOURS = (".art.backup/gold", "art.txt", ".art.turbopocket.old/x")
HIDDEN = ".art.turbopocket"
NOWHERE = Path("/nowhere/at/all")
TRACES = "traces"
TOLD_EVERY = 50


@dataclass(frozen=True)
class Entry:
    """What a change of a file or folder changes."""

    is_folder: bool
    inode: int
    size: int
    time: int


State = dict[str, Entry]


def entries(folder: Path) -> State:
    """All that is in a folder, by its path there."""
    found, left = {}, [""]
    while left:
        within = left.pop()
        with os.scandir(folder / within) as listed:
            for each in listed:
                told, name, is_folder = (
                    each.stat(follow_symlinks=False),
                    f"{within}{each.name}",
                    each.is_dir(follow_symlinks=False),
                )
                found[name] = Entry(is_folder, told.st_ino, told.st_size, told.st_mtime_ns)
                left += [f"{name}/"] * is_folder
    return found


class Recording:
    """What a folder held before each operation in it, with a copy of each file of any of these states.

    `meanwhile` is done after each, as if by another process, and told before which operation.
    """

    def __init__(self, folder: Path, copies: Path, meanwhile: Callable[[str], None]) -> None:
        self.folder, self.copies, self.meanwhile, self.on = folder, copies, meanwhile, False
        self.states: list[State] = []
        copies.mkdir(exist_ok=True)
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and changes_something(self.folder, NOWHERE, event, args):
            self.on = False
            try:
                self.take(f"{event} {args[0]}")
            finally:
                self.on = True

    def take(self, operation: str) -> None:
        """The folder as it is before an operation, unless it is as it was."""
        state = entries(self.folder)
        if self.states and state == self.states[-1]:
            return
        for name, entry in state.items():
            if not entry.is_folder and not self._copy(entry).exists():
                shutil.copyfile(self.folder / name, self._copy(entry))
        self.states.append(state)
        tell("recorded", len(self.states))
        self.meanwhile(operation)

    def put(self, number: int, to_work_in: bool = False) -> None:
        """Makes the folder what it was, its files copied only where they may be written to.

        A journal, which names folders by inode, then names those that are there now.
        """
        state = self.states[number]
        there = entries(self.folder)
        for name in sorted(there, reverse=True):  # what is in a folder comes before it
            if not to_work_in and name in state and self._is(there[name], state[name]):
                continue
            (self.folder / name).rmdir() if there[name].is_folder else (self.folder / name).unlink()
            del there[name]
        for name in sorted(state.keys() - there.keys()):
            if state[name].is_folder:
                (self.folder / name).mkdir()
            else:
                (shutil.copyfile if to_work_in else os.link)(self._copy(state[name]), self.folder / name)
        journal = self.folder / HIDDEN / JOURNAL
        if journal.exists():
            folders = {entry.inode: self.folder / name for name, entry in state.items() if entry.is_folder}
            now = {name: folders[inode].stat().st_ino for name, inode in json.loads(journal.read_text()).items()}
            journal.unlink()
            journal.write_text(json.dumps(now))

    def _copy(self, entry: Entry) -> Path:
        return self.copies / f"{entry.inode}-{entry.size}-{entry.time}"

    def _is(self, found: Entry, wanted: Entry) -> bool:
        if found.is_folder or wanted.is_folder:
            return found.is_folder and wanted.is_folder
        return found.inode == self._copy(wanted).stat().st_ino


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def artifact_files(out: Path) -> dict[str, dict[str, str]]:
    """Of each artifact; a report also says how long its build took."""
    return {artifact.name: contents(artifact) for artifact in artifacts_in(out)}


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


def tell(what: str, states: int) -> None:
    if states % TOLD_EVERY == 0:
        print(f"{what} {states} states", file=sys.stderr, flush=True)


def build_beside(recording: Recording, out: Path, overwrite: bool) -> str:
    """What another command is told while a build lives; when that is at work, nothing of it is touched."""
    before = entries(recording.folder)
    settle_output(out)
    try:
        with claimed(out, lambda: refuse_build(out, run_folder(out), overwrite)):
            return "free"
    except Busy:
        assert entries(recording.folder) == before, "a second build changed what the first is working on"
        return "busy"
    except TurbopocketError as error:
        if overwrite or "is not empty" not in str(error):
            raise
        return "occupied"


def look(recording: Recording, out: Path, known: Mapping[str, dict[str, str]]) -> Counter[str]:
    """Holds each state against the outputs that are allowed, before and after the next build, which fails."""
    ends: Counter[str] = Counter()
    last, replaces = len(recording.states) - 1, "old" in known
    for number in range(last + 1):
        where = f"state {number} of {last}"
        recording.put(number)
        if replaces:  # a reader finds an artifact also before anybody put things right
            for each in artifacts_in(out):
                verify(each, load_manifest(each))
            assert artifacts_in(out), where
        settle_output(out)
        ends[require_one(out, known, not replaces, where)] += 1
        with (
            suppress(RuntimeError),
            claimed(out, lambda: refuse_build(out, run_folder(out), True)) as claim,
            claim.staged(out),
        ):
            raise RuntimeError
        require_one(out, known, not replaces, where)
        assert not (out.parent / HIDDEN).exists(), where
        tell("looked at", number + 1)
    return ends


def record(values: dict[str, Any], out: Path, workers: int, copies: Path) -> tuple[Recording, dict[str, Any]]:
    """A build in the place of what is there, and what was found in its states; in the end its output is there."""
    old = whole(out)
    told: dict[str, Counter[str]] = defaultdict(Counter)

    def begin_beside(operation: str) -> None:
        """Not where one got hold of the output already: one that always did would hold the first up for ever."""
        if not told[operation]["free"]:
            told[operation][build_beside(recording, out, bool(old))] += 1

    recording = Recording(out.parent, copies, begin_beside)
    recording.on = True
    make(values, out, workers)
    recording.on = False
    recording.take("end")
    ends = look(recording, out, {"new": whole(out)} | ({"old": old} if old else {}))
    recording.put(len(recording.states) - 1, to_work_in=True)
    return recording, {"states": len(recording.states), "ends": ends, "beside": sum(told.values(), Counter[str]())}


def go_on(recording: Recording, out: Path, values: dict[str, Any]) -> None:
    """Builds on the state in the middle, which has half a journal."""
    made, number = artifact_files(out), len(recording.states) // 2
    recording.put(number, to_work_in=True)
    make_apart(values, out)
    assert artifact_files(out) == made, f"state {number}: a build that went on there has other bytes"
    require_one(out, {"new": whole(out)}, False, f"state {number}")


def main() -> None:
    torch.set_num_threads(1)
    values, base = json.loads(sys.argv[1]), Path(sys.argv[2])
    if not sys.argv[3:]:
        remember_traces(make_recipe(values, "test"), base.parents[2] / TRACES)
        make(values, base, 1)
        return
    remember_traces(make_recipe(values, "test"), base.parent / TRACES)
    out, workers = base / "w" / "art", int(sys.argv[3])
    for name in NEIGHBOURS:
        (out.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (out.parent / name).write_text("mine")
    other = {**values, "seed": 1}
    _, first = record(values, out, workers, base / "copies")
    recording, second = record(other, out, workers, base / "copies")
    go_on(recording, out, other)
    print(json.dumps({"first": first, "second": second}))


if __name__ == "__main__":
    main()
