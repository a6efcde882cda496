"""What is to be swept, and the books that both sweeps keep: which cells are open, finished, failed.

state = SweepState(groups, store)  # asks the store what is finished already
for group in state.groups:  # only groups with something left to do
    worker.run(group, tick);  state.close(group, "the worker came back without this cell")
state.outcome()                        # Outcome(done=12, failed={}, skipped=40)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from auditgap.types import Cell, Document


@dataclass(frozen=True)
class Group:
    """Cells that share a trunk (one subject, one site); one worker runs them together.

    `work` is what the group is expected to cost, in the units that the worker's `tick` counts; 0:
    not known. `gpus` is what its worker needs on a cluster, a share of one too; None: what the
    sweep gives every worker.
    """

    name: str
    cells: tuple[Cell, ...]
    work: float = 0.0
    gpus: float | None = None

    @property
    def subject(self) -> str:
        """The fingerprint of the subject, which a worker would rather keep than load another."""
        return self.cells[0].subject.fingerprint


class Worker(Protocol):
    """What a sweep drives. It is kept for many groups, so it can keep its model; if it has a
    `close()`, a sweep in this process calls it at the end, and on Ray its process ends."""

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        """Compute and `store.write` every unfinished cell of the group; `tick(units)` after a piece
        of work."""
        ...


class Cells(Protocol):
    """What a sweep asks of the folder that holds its cells: a `RunFolder`, or what stands for
    several."""

    path: Path

    def scan(self, keys: Iterable[str]) -> tuple[set[str], dict[str, Document]]: ...

    def is_finished(self, key: str) -> bool: ...

    def failure(self, key: str) -> Document | None: ...

    def fail(self, cell: Cell, cause: str, *, retry: bool = False) -> None: ...

    def settle(self, keys: Iterable[str]) -> None: ...


class Follower(Protocol):
    """What a sweep tells how far it is, as `Progress` is told: on a screen, or in a tracker."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> object: ...

    def begin(self, *, cells: int, done: int, failed: int, work: float = 0.0) -> None: ...

    def update(self, *, done: int, failed: int, work: float, doing: str = "") -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to, in cells: `done` now, `failed` (key → cause; earlier failures too),
    `skipped` as finished."""

    done: int
    failed: dict[str, str]
    skipped: int

    @classmethod
    def total(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """What several sweeps came to."""
        failed = {key: cause for one in outcomes for key, cause in one.failed.items()}
        return cls(sum(o.done for o in outcomes), failed, sum(o.skipped for o in outcomes))


class SweepState:
    """What a sweep has to do and what became of it; local and ray both write their sums here.

    Cells that failed in an earlier run are left out (unless `retry_failed`), and so is a cell that
    an earlier group has.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        store: Cells,
        progress: Follower | None = None,
        retry_failed: bool = False,
    ) -> None:
        self.store = store
        self.progress = progress
        by_key = [(group, {cell.key: cell for cell in group.cells}) for group in groups]
        keys = dict.fromkeys(key for _, cells in by_key for key in cells)
        self.finished, self._failed_before = store.scan(keys)
        given_up = (
            {}
            if retry_failed
            else {key: str(r.get("cause", "")) for key, r in self._failed_before.items()}
        )
        self.groups: list[Group] = []  #: what is left to run
        planned: set[str] = set()
        for group, cells in by_key:
            left = {key: cell for key, cell in cells.items() if key not in planned}
            planned.update(left)  # `|=` with a dict's keys would copy the set every time
            open_cells = tuple(cell for key, cell in left.items() if key not in given_up)
            if any(cell.key not in self.finished for cell in open_cells):
                self.groups.append(replace(group, cells=open_cells))
            else:  # of a run that was killed before it could
                store.settle(left)
        self.failed = given_up
        self.skipped = len(self.finished)
        self._looked = self._took = 0.0
        if progress is not None:
            work = sum(group.work for group in self.groups)
            progress.begin(
                cells=len(planned), done=self.skipped, failed=len(self.failed), work=work
            )

    def look(self, groups: Sequence[Group], work: float, *, every: float = 0.0) -> None:
        """Count these groups' finished cells (at most once in `every` seconds) and show it; `work`:
        units done in all."""
        started = time.monotonic()
        # on object storage a look may take seconds
        if not every or started - self._looked >= max(every, 20 * self._took):
            for group in groups:
                self.open_cells(group)
            self._looked = time.monotonic()
            self._took = self._looked - started
        if self.progress is not None:
            doing = groups[0].name if groups else ""
            self.progress.update(
                done=len(self.finished), failed=len(self.failed), work=work, doing=doing
            )

    def open_cells(self, group: Group) -> list[Cell]:
        """Its cells that are not finished; those that are, as the store says now, are counted."""
        left = []
        for cell in group.cells:
            if cell.key not in self.finished:
                if self.store.is_finished(cell.key):
                    self.finished.add(cell.key)
                else:
                    left.append(cell)
        return left

    def close(self, group: Group, cause: str) -> None:
        """Settle a group that nobody works on any more: what it did not finish has failed, of
        `cause` or its own."""
        for cell in self.open_cells(group):
            # else the worker said it itself
            if self.store.failure(cell.key) in (None, self._failed_before.get(cell.key)):
                self.store.fail(cell, cause)
            self.failed[cell.key] = str((self.store.failure(cell.key) or {}).get("cause", cause))
        self.store.settle(cell.key for cell in group.cells)

    def outcome(self) -> Outcome:
        return Outcome(
            done=len(self.finished) - self.skipped, failed=dict(self.failed), skipped=self.skipped
        )


def cause_of(error: BaseException) -> str:
    """Type and first line of an error: enough to find it, and no more text than that."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
