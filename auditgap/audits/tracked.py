"""A sweep's numbers in an experiment tracker while it runs: `--report-to tensorboard`.

    with tracked(Progress(), store, ("tensorboard",)) as progress:
        progress.begin(cells=120, done=40, failed=0)

Whenever cells have finished: how many are done and failed, cells a minute, and what the finished
ones come to so far (`Audit.numbers`). The process that hands out groups reads the folder for it, so
a sweep on Ray is logged as one in this process is. The step is the number of finished cells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

from auditgap.audits.table import audit_of
from auditgap.errors import Interrupted
from auditgap.store import RunFolder
from auditgap.sweep import Progress
from auditgap.sweep.state import Cells, Follower, cause_of
from auditgap.training.tracking import Tracker

#: Of a sweep's time, what its numbers may take: a table is read again after 20 times its time.
PATIENCE = 20

log = logging.getLogger(__name__)


class SeveralFolders(Cells, Protocol):
    """What stands for the run folders of a grid's cases."""

    stores: Mapping[str, RunFolder]


def tracked(
    shown: Progress | None, store: RunFolder | SeveralFolders, names: tuple[str, ...]
) -> Follower:
    """What follows a sweep into `store`: `shown`, and the trackers of these names."""
    return _Tracked(shown, store, names)


class _Tracked:
    def __init__(
        self, shown: Progress | None, store: RunFolder | SeveralFolders, names: tuple[str, ...]
    ) -> None:
        self.shown, self.store = shown, store
        self.folders = {"": store} if isinstance(store, RunFolder) else store.stores
        configs = {name or "config": one.run["config"] for name, one in self.folders.items()}
        self.tracker = Tracker(names, folder=store.path, name=store.path.name, config=configs)
        self._before = self._done_before = self._cells = 0
        self._now = self._said = (0, 0)  # cells done and failed
        self._began = self._looked = time.monotonic()
        self._took = 0.0
        self._inside = ExitStack()

    def __enter__(self) -> _Tracked:
        self._inside.enter_context(self.tracker)
        if self.shown is not None:
            self._inside.enter_context(self.shown)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._inside:
            if kind is None and self._now != self._said:
                self._say()

    def begin(self, *, cells: int, done: int, failed: int, work: float = 0.0) -> None:
        if self.shown is not None:
            self.shown.begin(cells=cells, done=done, failed=failed, work=work)
        # a pass before this one, or another stage of a study, has finished cells of its own
        planned = {one["key"] for folder in self.folders.values() for one in folder.planned()}
        self._before = len(self.store.scan(planned)[0]) - done
        self._done_before, self._cells = done, self._before + cells
        self._now = self._said = (done, failed)
        self._began = time.monotonic()
        self.tracker.rewind(self._before + done + 1)  # what was said at this step stays true

    def update(self, *, done: int, failed: int, work: float, doing: str = "") -> None:
        if self.shown is not None:
            self.shown.update(done=done, failed=failed, work=work, doing=doing)
        self._now = (done, failed)
        if self._now != self._said and time.monotonic() - self._looked >= PATIENCE * self._took:
            self._say()

    def _say(self) -> None:
        started = time.monotonic()
        done, failed = self._said = self._now
        minutes = (started - self._began) / 60
        numbers: dict[str, object] = {
            "cells/done": self._before + done,
            "cells/failed": failed,
            "cells/planned": self._cells,
            "cells/a_minute": (done - self._done_before) / minutes if minutes > 0 else None,
        }
        for case, folder in self.folders.items():
            numbers |= {f"{case}/{name}" if case else name: v for name, v in _found(folder)}
        self.tracker.log(self._before + done, numbers)
        self._looked = time.monotonic()
        self._took = self._looked - started


def _found(folder: RunFolder) -> list[tuple[str, float]]:
    """What the audit says of its finished cells; nothing, with a warning, where that fails: no run
    ends over what is shown of it."""
    try:
        return list(audit_of(folder).numbers(folder).items())
    except Interrupted:
        raise
    except Exception as error:
        log.warning("%s: no figures for the trackers (%s).", folder.path.name, cause_of(error))
        return []
