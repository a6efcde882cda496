"""What is to be swept, and the books that both sweeps keep: which cells are open, finished, failed.

ledger = Ledger(groups, store)          # asks the store what is finished already
for group in ledger.groups:             # only groups with something left to do
    worker.run(group, tick);  ledger.close(group, "the worker came back without this cell")
ledger.outcome()                        # Outcome(done=12, failed={}, skipped=40)
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from auditgap.errors import Interrupted
from auditgap.store import RunFolder
from auditgap.sweep.progress import Progress
from auditgap.types import Cell


@dataclass(frozen=True)
class Group:
    """Cells that share a trunk (one subject, one site); one worker runs them together.

    `work` is what the group is expected to cost, in the units that the worker's `tick` counts; 0: not known.
    """

    name: str
    cells: tuple[Cell, ...]
    work: float = 0.0


class Worker(Protocol):
    """What a sweep drives. It is kept for many groups, so it can keep its model."""

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        """Compute and `store.write` every unfinished cell of the group; `tick(units)` after a piece of work."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to, in cells: `done` now, `failed` (key → cause; earlier failures too), `skipped` as finished."""

    done: int
    failed: dict[str, str]
    skipped: int


class Ledger:
    """What a sweep has to do and what became of it; local and ray both write their sums here.

    Cells that failed in an earlier run are left out (unless `retry_failed`), and so is a cell that an earlier group has.
    """

    def __init__(
        self, groups: Sequence[Group], store: RunFolder, progress: Progress | None = None, retry_failed: bool = False
    ) -> None:
        self.store = store
        self.progress = progress
        self._failed_before = store.failures()
        given_up = {} if retry_failed else {key: str(r.get("cause", "")) for key, r in self._failed_before.items()}
        self.finished: set[str] = set()
        self.groups: list[Group] = []  #: what is left to run
        planned: set[str] = set()
        for group in groups:
            cells = tuple({c.key: c for c in group.cells if c.key not in planned}.values())
            planned |= {c.key for c in cells}
            self.finished |= {c.key for c in cells if store.is_finished(c.key)}
            open_cells = tuple(c for c in cells if c.key not in given_up)
            if any(c.key not in self.finished for c in open_cells):
                self.groups.append(replace(group, cells=open_cells))
        self.failed = {key: cause for key, cause in given_up.items() if key in planned}
        self.skipped = len(self.finished)
        self._looked = 0.0
        if progress is not None:
            work = sum(group.work for group in self.groups)
            progress.begin(cells=len(planned), done=self.skipped, failed=len(self.failed), work=work)

    def look(self, group: Group, work: float, *, every: float = 0.0) -> None:
        """Count the group's finished cells (at most once in `every` seconds) and show it; `work`: units done in all."""
        if time.monotonic() - self._looked >= every:
            self._looked = time.monotonic()
            self.finished |= {c.key for c in group.cells if c.key not in self.finished and self.store.is_finished(c.key)}
        if self.progress is not None:
            self.progress.update(done=len(self.finished), failed=len(self.failed), work=work, doing=group.name)

    def open_cells(self, group: Group) -> list[Cell]:
        return [c for c in group.cells if c.key not in self.finished and not self.store.is_finished(c.key)]

    def close(self, group: Group, cause: str) -> None:
        """Settle a group that nobody works on any more: what it did not finish has failed, of `cause` or its own."""
        for cell in self.open_cells(group):
            if self.store.failure(cell.key) in (None, self._failed_before.get(cell.key)):  # else the worker said it itself
                self.store.fail(cell, cause)
            self.failed[cell.key] = str((self.store.failure(cell.key) or {}).get("cause", cause))

    def outcome(self) -> Outcome:
        return Outcome(done=len(self.finished) - self.skipped, failed=dict(self.failed), skipped=self.skipped)


def cause_of(error: BaseException) -> str:
    """Type and first line of an error: enough to find it, and no more text than that."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM (a scheduler's goodbye) leave the block as `Interrupted`."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # no Exception: a worker's own `except Exception` must not swallow it

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("Stopped. What was finished is kept; run the same command again to resume.") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
