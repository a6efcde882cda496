"""A sweep that is followed while it runs: its report is written anew now and then, and its numbers go
into the experiment trackers that `--report-to` names.

    with followed(Progress(), store, options) as progress:
        progress.begin(cells=120, done=40, failed=0)

A tracker hears, whenever cells have finished, how many are done and failed, cells a minute, and what
the finished ones come to so far (`Audit.numbers`). The process that hands out groups reads the folder
for it, so a sweep on Ray is followed as one in this process is. The step is the number of finished
cells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Protocol, TypeVar

from auditgap.audits.options import AuditOptions
from auditgap.audits.table import audit_of
from auditgap.errors import Interrupted
from auditgap.store import DiskError, RunFolder
from auditgap.sweep import Progress
from auditgap.sweep.state import Cells, Follower, cause_of
from auditgap.training.tracking import Tracker

#: A table is read, and a report written, again after this many times what it took.
PATIENCE = 20
#: Seconds between two reports, at the least.
REPORT_EVERY = 300.0

T = TypeVar("T")

log = logging.getLogger(__name__)


class SeveralFolders(Cells, Protocol):
    """What stands for the run folders of a grid's cases."""

    stores: Mapping[str, RunFolder]


def followed(
    shown: Progress | None, store: RunFolder | SeveralFolders, options: AuditOptions
) -> Follower:
    """What follows a sweep into `store`: `shown`, its report, and the options' trackers."""
    return _Followed(shown, store, options)


class _Followed:
    def __init__(
        self, shown: Progress | None, store: RunFolder | SeveralFolders, options: AuditOptions
    ) -> None:
        self.shown, self.store, self.allow_raw = shown, store, options.allow_raw
        self.folders = {"": store} if isinstance(store, RunFolder) else store.stores
        self.tracker: Tracker | None = None
        if options.trackers:
            configs = {name or "config": one.run["config"] for name, one in self.folders.items()}
            self.tracker = Tracker(
                options.trackers, folder=store.path, name=store.path.name, config=configs
            )
        self._before = self._done_before = self._cells = 0
        self._now = self._said = self._reported = (0, 0)  # cells done and failed
        self._began = time.monotonic()
        self._say_again = 0.0
        self._report_again = self._began + REPORT_EVERY
        self._inside = ExitStack()

    def __enter__(self) -> _Followed:
        for one in (self.tracker, self.shown):
            if one is not None:
                self._inside.enter_context(one)
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
        self._now = self._said = self._reported = (done, failed)
        if self.tracker is None:
            return
        # a pass before this one, or another stage of a study, has finished cells of its own
        planned = {one["key"] for folder in self.folders.values() for one in folder.planned()}
        self._before = len(self.store.scan(planned)[0]) - done
        self._done_before, self._cells = done, self._before + cells
        self._began = time.monotonic()
        self.tracker.rewind(self._before + done + 1)  # what was said at this step stays true

    def update(self, *, done: int, failed: int, work: float, doing: str = "") -> None:
        if self.shown is not None:
            self.shown.update(done=done, failed=failed, work=work, doing=doing)
        self._now = (done, failed)
        if self._now != self._said and time.monotonic() >= self._say_again:
            self._say()
        if self._now != self._reported and time.monotonic() >= self._report_again:
            self._report()

    def _say(self) -> None:
        self._said = self._now
        if self.tracker is None:
            return
        started, (done, failed) = time.monotonic(), self._now
        minutes = (started - self._began) / 60
        numbers: dict[str, object] = {
            "cells/done": self._before + done,
            "cells/failed": failed,
            "cells/planned": self._cells,
            "cells/a_minute": (done - self._done_before) / minutes if minutes > 0 else None,
        }
        for case, folder in self.folders.items():
            found = _tried(folder, "figures for the trackers", audit_of(folder).numbers, {})
            numbers |= {f"{case}/{name}" if case else name: v for name, v in found.items()}
        self.tracker.log(self._before + done, numbers)
        self._say_again = time.monotonic() + PATIENCE * (time.monotonic() - started)

    def _report(self) -> None:
        self._reported = self._now
        started = time.monotonic()
        for folder in self.folders.values():
            write = partial(audit_of(folder).reduce, allow_raw=self.allow_raw)
            _tried(folder, "report meanwhile", write, None)
        took = time.monotonic() - started
        self._report_again = time.monotonic() + max(REPORT_EVERY, PATIENCE * took)


def _tried(folder: RunFolder, what: str, make: Callable[[RunFolder], T], instead: T) -> T:
    """What is made of a folder's finished cells; `instead`, with a warning, where that fails: no
    run ends over what is shown of it on its way."""
    try:
        return make(folder)
    except (Interrupted, DiskError):
        raise
    except Exception as error:
        log.warning("%s: no %s (%s).", folder.path.name, what, cause_of(error))
        return instead
