# SPDX-License-Identifier: Apache-2.0
"""Tells a waiting person what is being done and how long it will still take. Talks on stderr only."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..ground.errors import TurbopocketError
from ..ground.heap import give_back_freed
from ..ground.memory import PeakBytes
from .units import format_bytes

Advance = Callable[[], None]
WHOLE = "all"


NOT_DONE = 0.02
"""Of what a step should have taken: one that took less was found done, and says nothing of how quick the others are."""


@dataclass
class _Running:
    """A stage under way: `total` steps, None where it has no steps, the seconds that each should take, if anything is
    expected, and when steps were done (seconds)."""

    name: str
    total: int | None
    clock: Callable[[], float]
    expected: Sequence[float] = ()
    done: int = 0
    start: float = field(init=False)
    last_step: float = field(init=False)
    took: float = 0.0
    should_have_taken: float = 0.0

    def __post_init__(self) -> None:
        self.start = self.last_step = self.clock()
        if self.total and len(self.expected) != self.total:  # as much for each step
            self.expected = (sum(self.expected) / self.total,) * self.total if self.expected else ()

    def step(self) -> None:
        now = self.clock()
        if self.done < len(self.expected) and now - self.last_step > NOT_DONE * self.expected[self.done]:
            self.took += now - self.last_step
            self.should_have_taken += self.expected[self.done]
        self.done += 1
        self.last_step = now

    def seconds_left(self) -> float | None:
        """What the steps to come should take, as much off as those so far were; where nothing is expected, at the mean
        pace of those so far. Less what the current one has had. A window of the last half minute, which bars commonly
        keep, says nothing where a step takes longer."""
        now = self.clock() - self.last_step
        if self.expected:
            off = self.took / self.should_have_taken if self.should_have_taken else 1.0
            return max(0.0, off * sum(self.expected[self.done :]) - now)
        if self.total and self.done:
            return max(0.0, (self.last_step - self.start) / self.done * (self.total - self.done) - now)
        return None


class StageProgress:
    """Shows each stage: on a terminal a live bar with time left, elsewhere a line every `interval` seconds.

    With `expect` there is a second bar for all stages together. `clock` gives seconds, `peak` the most memory that was
    seen. Afterwards `stage_seconds` and `stage_peak_bytes` say what each stage took.
    """

    def __init__(
        self,
        quiet: bool = False,
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        peak: PeakBytes | None = None,
    ) -> None:
        self.stage_seconds: dict[str, float] = {}
        self.stage_peak_bytes: dict[str, int] = {}
        self._console = Console(stderr=True, quiet=quiet, markup=False)
        self._live = sys.stderr.isatty() and not quiet
        self._quiet, self._interval, self._clock = quiet, interval, clock
        self._expected: dict[str, tuple[float, ...]] = {}
        self._peak = peak or PeakBytes()
        self._max_ram: int | None = None

    def expect(self, seconds: Mapping[str, Sequence[float]]) -> None:
        """Tells which stages are to come and how long each step of each should take; those that are done count as they
        went."""
        self._expected = {name: tuple(each) for name, each in seconds.items()}

    def hold_to(self, max_ram: int | None) -> None:
        """From now on a stage raises TurbopocketError after a step in which more memory was seen than so many bytes."""
        self._max_ram = max_ram

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Runs one stage of `total` steps; calling the value it yields marks one step done.

        What was freed before it is given back first, so that its peak is its own.
        """
        give_back_freed()
        running = _Running(name, total, self._clock, self._expected.get(name, ()))
        self._peak.restart()
        with self._peak.watched(), self._bars(running) if self._live else self._lines(running) as shown:

            def advance() -> None:
                running.step()
                shown()
                self._require_held(name)

            yield advance
        self.stage_seconds[name] = self._clock() - running.start
        self.stage_peak_bytes[name] = self._peak.bytes
        self._require_held(name)
        if not self._live:
            self._console.print(f"{name:<12} {self.stage_seconds[name]:6.1f} s")

    def _require_held(self, name: str) -> None:
        if self._max_ram is not None and self._peak.bytes > self._max_ram:
            raise TurbopocketError(
                f"{name} took {format_bytes(self._peak.bytes)} of memory, and max_ram allows "
                f"{format_bytes(self._max_ram)}: it was foreseen to take less",
                hint="what is done is kept; the same command with more memory, or none given, goes on there",
            )

    @contextmanager
    def _bars(self, running: _Running) -> Iterator[Advance]:
        columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        left = _Left(lambda task: self._left(running, whole=task.description == WHOLE))
        with Progress(*columns, TextColumn("left"), left, console=self._console) as bar:
            task = bar.add_task(running.name, total=running.total)
            whole = bar.add_task(WHOLE, total=100, completed=self._percent(running)) if self._expected else None

            def advance() -> None:
                bar.advance(task)
                if whole is not None:
                    bar.update(whole, completed=self._percent(running))

            yield advance
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
        own = running.seconds_left()
        if not whole:
            return own
        if running.name not in self._expected or own is None:
            return None
        totals = {name: sum(each) for name, each in self._expected.items()}
        names = list(totals)
        to_come = sum(totals[name] for name in names[names.index(running.name) + 1 :])
        # Those that were found done say nothing of how quick this machine is.
        past = [
            name
            for name in names
            if name != running.name and self.stage_seconds.get(name, 0.0) > NOT_DONE * totals[name]
        ]
        took = sum(self.stage_seconds[name] for name in past) + self._clock() - running.start + own
        expected = sum(totals[name] for name in (*past, running.name))
        return own + to_come * (took / expected if expected else 1.0)

    def _percent(self, running: _Running) -> int:
        """Of what all stages should take, what is done."""
        done = sum(sum(each) for name, each in self._expected.items() if name in self.stage_seconds)
        done += sum(running.expected[: running.done])
        return round(100 * done / (sum(map(sum, self._expected.values())) or 1.0))

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
