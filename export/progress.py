# SPDX-License-Identifier: Apache-2.0
"""Tells a waiting person what is being done and how long it will still take. Talks on stderr only."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

Advance = Callable[[], None]
WHOLE = "all"


@dataclass
class _Running:
    """A stage under way: `total` steps, None where it has no steps, and when the last one was done (seconds)."""

    name: str
    total: int | None
    clock: Callable[[], float]
    done: int = 0
    start: float = field(init=False)
    last_step: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.last_step = self.clock()

    def step(self) -> None:
        self.done += 1
        self.last_step = self.clock()

    def seconds_left(self, expected: float | None) -> float | None:
        """Steps still to come at the mean pace of all so far, less what the current one has had; before the first step
        what was expected, if anything was. A window of the last half minute, which bars commonly keep, says nothing
        where a step takes longer."""
        if self.total and self.done:
            pace = (self.last_step - self.start) / self.done
            return max(0.0, pace * (self.total - self.done) - (self.clock() - self.last_step))
        return None if expected is None else max(0.0, expected - (self.clock() - self.start))


class StageProgress:
    """Shows each stage: on a terminal a live bar with time left, elsewhere a line every `interval` seconds.

    With `expect` there is a second bar for all stages together. `clock` gives seconds.
    """

    def __init__(
        self, quiet: bool = False, interval: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stage_seconds: dict[str, float] = {}
        self._console = Console(stderr=True, quiet=quiet, markup=False)
        self._live = sys.stderr.isatty() and not quiet
        self._quiet, self._interval, self._clock = quiet, interval, clock
        self._expected: dict[str, float] = {}

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Tells which stages are to come and how long each should take; those that are done count as they went."""
        self._expected = dict(seconds)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Runs one stage of `total` steps; calling the value it yields marks one step done."""
        running = _Running(name, total, self._clock)
        with self._bars(running) if self._live else self._lines(running) as shown:

            def advance() -> None:
                running.step()
                shown()

            yield advance
        self.stage_seconds[name] = self._clock() - running.start
        if not self._live:
            self._console.print(f"{name:<12} {self.stage_seconds[name]:6.1f} s")

    @contextmanager
    def _bars(self, running: _Running) -> Iterator[Advance]:
        columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        left = _Left(lambda task: self._left(running, whole=task.description == WHOLE))
        with Progress(*columns, TextColumn("left"), left, console=self._console) as bar:
            task = bar.add_task(running.name, total=running.total)
            whole = (
                bar.add_task(WHOLE, total=len(self._expected), completed=self._stages_done())
                if self._expected
                else None
            )
            yield lambda: bar.advance(task)
            bar.update(task, total=running.total or 1, completed=running.total or 1)
            if whole is not None:
                bar.remove_task(whole)  # or a copy of it would stay behind for each stage

    @contextmanager
    def _lines(self, running: _Running) -> Iterator[Advance]:
        finished = threading.Event()

        def talk() -> None:
            while not finished.wait(self._interval):
                self._console.print(self._line(running), highlight=False, soft_wrap=True)

        talker = threading.Thread(target=talk, daemon=True)
        if not self._quiet:
            talker.start()
        try:
            yield lambda: None
        finally:
            finished.set()
            if not self._quiet:
                talker.join()

    def _line(self, running: _Running) -> str:
        steps = f" {running.done}/{running.total}" if running.total else ""
        parts = [f"{running.name}{steps} after {clock_text(self._clock() - running.start)}"]
        for what, whole in (("left", False), ("left in all", True)):
            if (left := self._left(running, whole)) is not None:
                parts.append(f"about {clock_text(left)} {what}")
        return ", ".join(parts)

    def _left(self, running: _Running, whole: bool) -> float | None:
        """Seconds of this stage, or of all. Stages to come are expected to be off as those before them were."""
        own = running.seconds_left(self._expected.get(running.name))
        if not whole:
            return own
        if running.name not in self._expected or own is None:
            return None
        names = list(self._expected)
        to_come = sum(self._expected[name] for name in names[names.index(running.name) + 1 :])
        took = sum(self.stage_seconds[name] for name in names if name in self.stage_seconds)
        took += self._clock() - running.start + own
        expected = sum(self._expected[name] for name in names if name in self.stage_seconds or name == running.name)
        return own + to_come * (took / expected if expected else 1.0)

    def _stages_done(self) -> int:
        return sum(name in self.stage_seconds for name in self._expected)

    def remark(self, text: str) -> None:
        """Prints one line at once, above a live bar if there is one."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Prints one line where no live bar says how far the stage is: into a log file."""
        if not self._live:
            self._console.print(text, highlight=False, soft_wrap=True)


class _Left(ProgressColumn):
    """Time left as `seconds_of` says it, dashes where nobody knows."""

    max_refresh = 0.5

    def __init__(self, seconds_of: Callable[[Task], float | None]) -> None:
        super().__init__()
        self._seconds_of = seconds_of

    def render(self, task: Task) -> Text:
        seconds = 0.0 if task.finished else self._seconds_of(task)
        return Text("-:--:--" if seconds is None else clock_text(seconds), style="progress.remaining")


def clock_text(seconds: float) -> str:
    """Returns seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
