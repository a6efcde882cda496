"""Phases of an audit: each is planned from what those before it found, and begins, ends and fails in
its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from auditgap.audits.options import AuditOptions
from auditgap.audits.sweeps import Phase, run_phases
from auditgap.errors import UsageError
from auditgap.store import RunFolder
from auditgap.sweep import Group, Worker
from auditgap.types import Cell, Subject


@dataclass(frozen=True)
class Found:
    """What a cell of these phases finds: a number."""

    subject: str
    number: int


class Counting:
    """Writes a cell's number; a cell without one fails."""

    def __init__(self, folder: str) -> None:
        self.store = RunFolder.load(folder)

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        for cell in group.cells:
            if not self.store.is_finished(cell.key):
                number = cell.settings["number"]
                self.store.write(cell, [Found(cell.subject.name, 10 // number)], seconds=0.0)


class Numbers(Phase[AuditOptions]):
    """The numbers that it is given, or those that the phase named `after` found."""

    def __init__(self, name: str, numbers: Sequence[int] = (), after: str = "") -> None:
        self.name, self.numbers, self.before = name, numbers, after
        self.finished: list[str] = []

    def passes(self, store: RunFolder, options: AuditOptions) -> list[list[Group]]:
        numbers = self.numbers
        if self.before:
            rows = store.rows([self.before])
            if not len(rows):
                raise UsageError(f"nothing from {self.before} yet")
            numbers = sorted(rows["number"])
        cells = [
            Cell(Subject(f"s{n}", f"f{n}"), None, None, self.name, "p", {"number": int(n)})
            for n in numbers
        ]
        return [[Group(str(cell), (cell,), 1.0) for cell in cells]]

    def worker(self, store: RunFolder, options: AuditOptions) -> Callable[[], Worker]:
        return partial(Counting, str(store.path))

    def finish(self, store: RunFolder, cells: Sequence[Cell]) -> None:
        self.finished += [cell.key for cell in cells if store.is_finished(cell.key)]


@pytest.fixture
def store(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "run", config={"audit": "numbers"}, info={})


def test_a_phase_is_planned_from_what_the_one_before_found(store):
    first, second = Numbers("first", (1, 5)), Numbers("second", after="first")
    told: list[str] = []
    outcome = run_phases(
        [first, second],
        store,
        AuditOptions(),
        begin=lambda: told.append("begin"),
        end=lambda outcome: told.append(f"end {outcome.done}"),
        after=lambda name, folder: told.append(f"{name} {len(folder.rows([name]))}"),
    )
    assert told == ["begin", "first 2", "end 4", "second 2"]
    assert (outcome.done, outcome.failed, outcome.skipped) == (4, {}, 0)
    assert sorted(store.rows(["second"])["number"]) == [1, 5]
    assert len(first.finished) == len(second.finished) == 2
    again = run_phases([first, second], store, AuditOptions())
    assert (again.done, again.skipped) == (0, 4)


def test_what_fails_in_a_phase_leaves_the_next_what_was_found(store):
    phases = [Numbers("first", (0, 5)), Numbers("second", after="first")]
    outcome = run_phases(phases, store, AuditOptions())
    assert outcome.done == 2 and len(outcome.failed) == 1
    assert "ZeroDivisionError" in next(iter(outcome.failed.values()))
    assert list(store.rows(["second"])["number"]) == [5]


def test_a_phase_that_cannot_begin_stops_and_keeps_what_was_found(store):
    phases = [Numbers("first", (2,)), Numbers("third", after="second")]
    ended: list[object] = []
    with pytest.raises(UsageError, match="nothing from second"):
        run_phases(phases, store, AuditOptions(), end=ended.append)
    assert list(store.rows(["first"])["number"]) == [5] and not ended
    with store.lock():
        pass  # the folder is free
