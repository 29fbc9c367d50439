# SPDX-License-Identifier: Apache-2.0
"""Tells a waiting person what is being done and how long it will still take. Talks on stderr only."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[], None]


class StageProgress:
    """Shows one line a stage: a live bar with time left on a terminal, one finished line otherwise."""

    def __init__(self, quiet: bool = False) -> None:
        self.stage_seconds: dict[str, float] = {}
        self._console = Console(stderr=True, quiet=quiet, markup=False)
        self._live = sys.stderr.isatty() and not quiet

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Runs one stage of `total` steps; calling the value it yields marks one step done."""
        start = time.monotonic()
        if self._live:
            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self._console) as bar:
                task = bar.add_task(name, total=total)
                yield lambda: bar.advance(task)
                bar.update(task, total=total or 1, completed=total or 1)
        else:
            yield lambda: None
        self.stage_seconds[name] = time.monotonic() - start
        if not self._live:
            self._console.print(f"{name:<12} {self.stage_seconds[name]:6.1f} s")

    def remark(self, text: str) -> None:
        """Prints one line at once, above a live bar if there is one."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Prints one line where no live bar says how far the stage is: into a log file."""
        if not self._live:
            self._console.print(text, highlight=False, soft_wrap=True)
