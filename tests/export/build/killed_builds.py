# SPDX-License-Identifier: Apache-2.0
"""Builds that are killed at random moments, again and again, and go on until they end.

argv is a recipe as JSON, a folder and the number of threads: makes `known` there, a build that nobody disturbs; then
another that takes what was traced, and tells which stages and steps it passed when. With a number of kills and a seed
after them, the life of a build: each kill draws a stage, then a step of it, then a moment between that step and the
next, so that short stages get as many as long ones; kills come in the order of the stages, each on what the one before
it left. After each kill what is there is looked at. Prints where it was killed, and how many builds ended.

All but the first build trace nothing anew: most of the time of so short a build, in which nothing comes onto the disk.
"""

import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch

from turbopocket.export.build import build as module
from turbopocket.export.check import check
from turbopocket.export.output.owned import journal_files, refuse_build
from turbopocket.export.output.staging import report_folder, run_folder, settle_output
from turbopocket.export.progress import Advance, StageProgress
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.errors import TurbopocketError

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.export.build.recorded_builds import contents
from tests.export.build.traced_once import remember_traces

KNOWN = "known"
LONGEST_WAIT = 0.05


class Told(StageProgress):
    """Writes into a pipe where the build is: a line as a stage begins, after each step of it, and as it ends."""

    def __init__(self, pipe: int) -> None:
        super().__init__(quiet=True)
        self.pipe = pipe

    def _tell(self, stage: str, step: object) -> None:
        os.write(self.pipe, f"{stage}, {step}\n".encode())

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        self._tell(name, 0)
        steps = count(1)
        with super().stage(name, total) as advance:

            def told() -> None:
                advance()
                self._tell(name, next(steps))

            yield told
        self._tell(name, "end")


class Attempt:
    """A build in a process for itself, and the places where it has been.

    A build that ends writes into the file `modules` what it has imported.
    """

    def __init__(self, values: dict[str, Any], out: Path, modules: Path | None = None) -> None:
        self.start = time.monotonic()
        self.passed = [("start, 0", 0.0)]
        self._pipe, writing = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            module.build(make_recipe(values, "test"), out, False, Told(writing), keep=True)
            if modules:
                modules.write_text(json.dumps(sorted(sys.modules)))
            os._exit(0)
        os.close(writing)

    def ends(self, places: Sequence[str] = (), moment: tuple[int, float] | None = None) -> bool:
        """Whether it ended before the moment: so many seconds after one of `places`, or after one behind that."""
        due = None
        seen = 0
        while True:
            while moment and due is None and seen < len(self.passed):
                place, at = self.passed[seen]
                if place in places and places.index(place) >= moment[0]:
                    due = self.start + at + moment[1]
                seen += 1
            left = LONGEST_WAIT if due is None else due - time.monotonic()
            if left <= 0:
                os.kill(self._child, signal.SIGKILL)
            ended, status = os.waitpid(self._child, 0 if left <= 0 else os.WNOHANG)
            self._listen(0 if ended else min(left, LONGEST_WAIT))
            if ended:
                os.close(self._pipe)
                self.seconds = time.monotonic() - self.start
                if status not in ((0, signal.SIGKILL) if left <= 0 else (0,)):
                    raise SystemExit(f"a build failed with status {status} after {self.passed[-1][0]}")
                return status == 0

    def _listen(self, seconds: float) -> None:
        """Waits for what the build tells."""
        if select.select([self._pipe], [], [], seconds)[0]:
            now = time.monotonic() - self.start
            lines = os.read(self._pipe, 1 << 20).decode().splitlines()
            self.passed += [(line, now) for line in lines]


def seconds_of(passed: Sequence[tuple[str, float]], end: float) -> dict[str, float]:
    """How long a build that ended after `end` seconds was at each place."""
    ends = [*(at for _, at in passed[1:]), end]
    return {place: after - at for (place, at), after in zip(passed, ends, strict=True)}


def moments(draw: Random, places: Sequence[str], kills: int) -> list[tuple[int, float]]:
    """So many places by number, and which part of the time at each is to pass, in their order.

    Each stage is drawn as often as any other.
    """
    stages: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        stages.setdefault(place.rpartition(", ")[0], []).append(index)
    return sorted((draw.choice(stages[draw.choice(list(stages))]), draw.random()) for _ in range(kills))


def trusted(run: Path) -> dict[str, str]:
    """What a next build would read as it is, by name: all but files that were not ended and components half lowered."""
    found = {}
    for path in journal_files(run):
        product, *inside = path.relative_to(run).parts
        half = product.startswith("lower-") and product.endswith(".partial")
        if half or path.suffix == ".partial" or path.name.startswith(".tmp"):
            continue
        content = path.read_bytes()
        if path.name == "lowered.json":  # which also holds seconds
            content = json.dumps(json.loads(content)["spec"]).encode()
        found["/".join([product.removesuffix(".partial"), *inside])] = sha256(content).hexdigest()
    return found


def ended_sound(out: Path, known: Mapping[str, Any]) -> bool:
    """Whether the artifact is there after a kill, or after the end.

    It is whole or not there, each file of the journal is whole or known for a half, and nothing is in the way of
    a next build.
    """
    settle_output(out)
    there = contents(out) if out.exists() else None
    assert there in (None, known["files"]), f"{out} is neither absent nor whole: {sorted(there or ())}"
    report = report_folder(out)
    assert sorted(contents(report)) == ([] if there is None else known["report"]), f"{report} is half of one"
    if there is None:
        refuse_build(out, run_folder(out), False)
        with suppress(TurbopocketError):
            check(out)
            raise AssertionError(f"check passes {out}, which is not there")
    wanted = known["journal"]
    odd = [name for name, told in trusted(run_folder(out)).items() if wanted.get(name, told) != told]
    assert not odd, f"{odd} would be read, and are not what an undisturbed build makes"
    return there is not None


def import_all(modules: Sequence[str]) -> None:
    """So that builds, which are forks of this process, do not spend their time on that."""
    for name in modules:
        with suppress(Exception):  # what only looks like a module
            importlib.import_module(name)


def live(values: dict[str, Any], folder: Path, known: Mapping[str, Any], kills: int, seed: int) -> dict[str, Any]:
    draw = Random(seed)
    seconds = seconds_of(known["passed"], known["seconds"])
    places = list(seconds)
    left = moments(draw, places, kills)
    outs = (folder / f"build{number}" for number in count())
    out, ended, killed = next(outs), 0, list[str]()
    while left:
        index, part = left[0]
        attempt = Attempt(values, out)
        all_passed = attempt.ends(places, (index, part * seconds[places[index]]))
        if not all_passed:
            killed.append(attempt.passed[-1][0])
            print(f"killed after {killed[-1]}", file=sys.stderr, flush=True)
            left.pop(0)
        # The machine may be quicker by now, or slower; where it was killed is no measure of that.
        seconds |= dict(list(seconds_of(attempt.passed, attempt.seconds).items())[: None if all_passed else -1])
        if ended_sound(out, known):
            ended, out = ended + 1, next(outs)
    assert Attempt(values, out).ends()
    assert ended_sound(out, known), f"{out} is not there"
    assert trusted(run_folder(out)) == known["journal"], "the journal is not that of an undisturbed build"
    return {"killed": killed, "ended": ended + 1}


def known_build(values: dict[str, Any], folder: Path, modules: Path) -> dict[str, Any]:
    """What a build makes that nobody disturbs; and when another one, which traces nothing, passes which place."""
    out, timed = folder / KNOWN, folder / "timed"
    assert Attempt(values, out, modules).ends()
    import_all(json.loads(modules.read_text()))
    attempt = Attempt(values, timed)
    assert attempt.ends()
    assert contents(timed) == contents(out)
    report, journal = sorted(contents(report_folder(out))), trusted(run_folder(out))
    when = {"passed": attempt.passed, "seconds": attempt.seconds}
    return {**when, "files": contents(out), "report": report, "journal": journal}


def main() -> None:
    values, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(int(sys.argv[3]))
    traces, told, modules = folder / "traces", folder / f"{KNOWN}.json", folder / "modules.json"
    remember_traces(make_recipe(values, "test"), traces)
    if not sys.argv[4:]:
        told.write_text(json.dumps(known_build(values, folder, modules)))
        return
    import_all(json.loads(modules.read_text()))
    kills, seed = map(int, sys.argv[4:])
    print(json.dumps(live(values, folder / f"life{seed}", json.loads(told.read_text()), kills, seed)))


if __name__ == "__main__":
    main()
