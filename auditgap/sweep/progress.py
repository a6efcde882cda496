"""How far a sweep is: a bar with the time left on a terminal, plain lines now and then where there
is none.

    with Progress() as progress:
        progress.begin(cells=120, done=40, failed=0, work=2400.0)
        progress.update(done=41, failed=0, work=31.0, doing="smollm2 · block15")

    57 of 120 cells done, 35 % of the work, about 12 min left (smollm2 · block15)

It writes to stderr, and a closed or odd stream never stops a sweep.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

# rich exits the program at a broken pipe; a sweep goes on without a reader
_NOBODY_READS = (OSError, ValueError, SystemExit)
#: Of an estimate, what was measured here and now: seconds in all, and at the least to start and to
#: judge.
MEASURED_HERE = ("seconds", "starting", "judging")
#: Share of the work that may be shown as done while a cell is left.
MOST = 0.99


class Progress:
    """Counts cells and work units and estimates the time left; `run` of either sweep enters and
    leaves it."""

    def __init__(
        self, *, console: Console | None = None, every: float = 30.0, noun: str = "cells"
    ) -> None:
        self.console = console or Console(stderr=True)
        self.noun = noun  #: what is counted
        #: seconds between plain lines; the first come sooner (a quarter of it, then doubling)
        self.every = every
        self.cells = self.done = self.failed = 0
        self.work = self.total_work = 0.0
        self.doing = ""
        self._started = self._printed = time.monotonic()
        self._interval = every / 4
        self._done_before = 0
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            columns = [
                BarColumn(bar_width=max(4, min(24, self.console.width // 6))),
                TextColumn("{task.fields[note]}", markup=False),
            ]
            # on a narrow terminal the time left is worth more than the name
            if self.console.width >= 100:
                columns.append(TextColumn("{task.fields[doing]}", markup=False))
            self._bar = Bar(*columns, console=self.console, refresh_per_second=2)
            self._task = self._bar.add_task("", total=None, note="", doing="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(*_NOBODY_READS):
            if self._bar is not None:
                self._show()
                self._bar.stop()
                self._bar = None
            elif self.cells:
                self._print()

    def begin(self, *, cells: int, done: int, failed: int, work: float = 0.0) -> None:
        """`cells` in all, `done` and `failed` of them before this run; `work`: units that this run
        will take, 0: unknown."""
        self.cells, self.done, self.failed, self.total_work = cells, done, failed, work
        self._done_before = done
        self._started = self._printed = time.monotonic()
        self._show()

    def update(self, *, done: int, failed: int, work: float, doing: str = "") -> None:
        """The sums so far: cells `done` and `failed` in all, `work` units done in this run, and the
        group at hand."""
        self.done, self.failed, self.work, self.doing = done, failed, work, doing
        self._show()

    @property
    def seconds(self) -> float:
        """Since `begin`."""
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """Whether no cell is left. Cells are counted and work is estimated, so cells decide."""
        return self.done + self.failed >= self.cells

    @property
    def share(self) -> float | None:
        """Share of this run's work that is done: by work units where the total is known, else by
        cells; None: no idea. Below 1 as long as a cell is left, however little was estimated."""
        if self.is_over:
            return 1.0
        to_do = self.cells - self._done_before
        if self.total_work > 0:
            return min(MOST, self.work / self.total_work)
        return min(MOST, (self.done - self._done_before) / to_do) if to_do > 0 else None

    @property
    def eta_seconds(self) -> float | None:
        """Time left at this run's own pace (what was finished before it says nothing of it); None
        before anything is done, and once more was done than was estimated."""
        if self.is_over:
            return 0.0
        share = self.share
        return self.seconds * (1 - share) / share if share and share < MOST else None

    def note(self) -> str:
        """What stands beside the bar: "57/120 cells, 12 min left"."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done}/{self.cells} {self.noun}{failed}, {self._time('{} left', 'took {}')}"

    def line(self) -> str:
        """Everything in one line, as it is printed where there is no terminal."""
        parts = [f"{self.done} of {self.cells} {self.noun} done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.total_work > 0 and not self.is_over:
            parts.append(f"{100 * (self.share or 0.0):.0f} % of the work")
        doing = f" ({self.doing})" if self.doing and not self.is_over else ""
        return ", ".join(parts) + f", {self._time('about {} left', 'took {}')}{doing}"

    def _time(self, left: str, took: str) -> str:
        if self.is_over:
            return took.format(duration(self.seconds))
        eta = self.eta_seconds
        return "time left not known yet" if eta is None else left.format(duration(eta))

    def _show(self) -> None:
        with suppress(*_NOBODY_READS):
            if self._bar is not None:
                done = self.share
                self._bar.update(
                    self._task,
                    total=1.0,
                    completed=1.0 if done is None else done,
                    note=self.note(),
                    doing=self.doing,
                )
            elif time.monotonic() - self._printed >= self._interval:
                self._interval = min(self.every, 2 * self._interval)
                self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True)


def computing(expected: Mapping[str, Any]) -> str:
    """The time of an estimate made before a run: "Up to about 3 min …, of which at least 6 s to start
    and 20 s to judge". No run takes 0 s."""
    seconds, start, judge = (expected.get(k, 0.0) for k in MEASURED_HERE)
    about = "a minute" if seconds < 60 else duration(seconds)
    parts = [
        f"{duration(part)} {what}"
        for part, what in ((start, "to start"), (judge, "to judge"))
        if part >= 1
    ]
    least = f", of which at least {' and '.join(parts)}" if parts and seconds >= 60 else ""
    return f"Up to about {about} on one worker like this machine{least}"


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"; two units at most."""
    seconds = round(seconds)
    for size, unit, smaller_size, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            rest = seconds % size // smaller_size
            return f"{seconds // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"
