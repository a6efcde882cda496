"""What can be asked of a run's folder: its rows, records, failures, texts, plan and status. Nothing
here needs the lock, or changes anything but the name of what is damaged."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import safetensors
import safetensors.numpy

from auditgap.errors import UsageError
from auditgap.store import files, frames, plan, tables
from auditgap.store.cellfile import KEY, CellFile, StoredCell
from auditgap.store.cells import EDITS, CellFiles
from auditgap.store.files import Damaged
from auditgap.store.lock import holder
from auditgap.store.outputs import NAME, Outputs
from auditgap.store.session import OLDEST
from auditgap.store.status import CellState, RunStatus, status_of
from auditgap.types import Document, in_mode, parted


class RunReader(Outputs):
    """The reading half of a `RunFolder`."""

    run: Document  #: run.json
    _cells: CellFiles

    @property
    def info(self) -> Document:
        """run.json's info, its subjects by the names that they are shown by."""
        info = self.run.get("info", {})
        listed = info.get("subjects")
        if not info.get("names") or not isinstance(listed, list):
            return info
        renamed = [{**one, "name": self.shown(one.get("name"))} for one in listed]
        return {**info, "subjects": renamed}

    @property
    def unchecked(self) -> str:
        """What is to be said of a folder whose documents have no checksum, as auditgap 0.1 and 0.2
        wrote them; "" of every other."""
        if self.run.get("schema") != OLDEST:
            return ""
        return (
            f"{self.place} is unchecked: an earlier release wrote it without a checksum in its"
            " documents, so a change in them would not be seen."
        )

    def shown(self, subject: Any) -> Any:
        """What tables and reports call a subject: the name that it was given, or what was typed
        for it, and how it thinks."""
        names = self.run.get("info", {}).get("names", {})
        if subject in names or not isinstance(subject, str):
            return names.get(subject, subject)
        model, mode = parted(subject)
        return in_mode(names.get(model, model), mode)

    def planned(self) -> list[Document]:
        """The planned cells: {"key", "cell", "description"}, in the order they were planned.
        Raises Damaged."""
        return self._planned(sealed=self.run.get("schema") != OLDEST)

    def _planned(self, *, sealed: bool) -> list[Document]:
        if self.mirror is not None:
            self.mirror.pull_file(plan.NAME)
        return plan.read(self.path / plan.NAME, sealed=sealed)

    def keys(self) -> list[str]:
        """The keys of all cells that are on disk in any state, sorted."""
        self._cells.refresh()
        return list(self._cells.entries())

    def is_finished(self, key: str) -> bool:
        """Whether the cell is done and all of its files are whole. What is damaged is set aside
        (`*.corrupt`): False."""
        entry = self._cells.look(key)
        self._cells.set_aside()
        return entry is not None and entry.done

    def failures(self) -> dict[str, Document]:
        """The failed cells' records by key."""
        return {record["key"]: record for record in self._records("failed")}

    def failure(self, key: str) -> Document | None:
        """The cell's record when it failed, else None."""
        entry = self._cells.look(key)
        if entry is None or entry.status != "failed" or (file := self._cells.open(key)) is None:
            return None
        return file.record(key) if file.records[key]["status"] == "failed" else None

    def agrees(self, other: RunReader, key: str) -> bool:
        """Whether a cell that both have finished has the same numbers in both, however they were
        written."""
        mine, theirs = self.record(key), other.record(key)
        return mine["sha256"] == theirs["sha256"] or self.cell_rows(key).equals(
            other.cell_rows(key)
        )

    def rows(
        self,
        attacks: Collection[str] | None = None,
        *,
        keys: Collection[str] | None = None,
        typed: bool = False,
    ) -> pd.DataFrame:
        """All finished cells' rows (of these attacks, of these cells), sorted by subject, layer,
        unit, eps, attack, draw, prompt. They are held together: `subjects` says how to read them in
        parts.

        What is null in the store is null here (NaN in numbers, None in texts and booleans), never
        0. Integer columns that may be null are float64, so that dtypes do not depend on which cells
        are there. Subjects are called what they are shown by (`shown`), with `typed` as in the
        cells' own rows.
        """

        def read(file: CellFile, keys: list[str]) -> list[tuple[list[str], pa.Table]]:
            wanted = [key for key in keys if attacks is None or file.attack(key) in attacks]
            return [(wanted, file.rows(wanted))] if wanted else []

        found = frames.below_each_other(chain.from_iterable(self._cells.each(read, "done", keys)))
        if not typed and self.run.get("info", {}).get("names") and "subject" in found:
            found["subject"] = found["subject"].map(self.shown)
        return found

    def subjects(self, attacks: Collection[str] | None = None) -> dict[str, list[str]]:
        """The finished cells (of these attacks) that each subject has rows in, by the name that it
        is shown by, in the order of `rows`: what to ask `rows` for, one subject after another, so
        that no more than one subject's rows are in memory."""

        def read(file: CellFile, keys: list[str]) -> list[tuple[str, str]]:
            wanted = [key for key in keys if attacks is None or file.attack(key) in attacks]
            if not wanted:
                return []
            table = tables.to_frame(file.rows(wanted, ["subject"]))
            if "subject" not in table:
                return []
            return list(table.drop_duplicates().itertuples(index=False, name=None))

        found: dict[str, list[str]] = {}
        for subject, key in sorted(chain.from_iterable(self._cells.each(read, "done"))):
            found.setdefault(self.shown(subject), []).append(key)
        return found

    def record(self, key: str) -> Document:
        """A finished cell's record. Raises UsageError when it is not finished, or damaged."""
        return self._file(key).record(key)

    def _file(self, key: str) -> CellFile:
        file = self._cells.open(key)
        if file is None and self._cells.damaged:  # it may stand in there
            raise next(iter(self._cells.damaged.values()))
        if file is None or file.records[key]["status"] != "done":
            raise UsageError(
                f"Cell {key} is not finished in {self.place}; run the command that made the folder"
                " again."
            )
        return file

    def cell_rows(self, key: str) -> pd.DataFrame:
        """One finished cell's rows, as they were written. Raises UsageError when the cell is not
        finished, or damaged."""
        return tables.to_frame(self._file(key).rows([key]).drop_columns([KEY]))

    def records(self) -> list[Document]:
        """The finished cells' records, sorted by key."""
        return sorted(self._records("done"), key=lambda record: record["key"])

    def iter_records(self) -> Iterator[Document]:
        """The same, some at a time, in the order of their files."""
        return self._records("done")

    def _records(self, status: str, keys: Collection[str] | None = None) -> Iterator[Document]:
        def read(file: CellFile, keys: list[str]) -> list[Document]:
            return [file.record(key) for key in keys]

        return chain.from_iterable(self._cells.each(read, status, keys))

    def contents(self) -> Iterator[StoredCell]:
        """Every finished cell: record, rows and texts, in the order of their files. What is damaged
        is passed over, and stands in `damages`."""
        return chain.from_iterable(self._cells.each(self._cells.contents, "done"))

    def stored(self, key: str) -> StoredCell | None:
        """One cell as it was put in. Raises Damaged."""
        return self._cells.cell(key)

    def damages(self) -> list[Damaged]:
        """What was found damaged so far, a sentence each."""
        return list(self._cells.damaged.values())

    def edits(self, key: str) -> Path:
        """Where a cell's edits are, if its audit keeps them: what was put into the subject, for
        export. Not on object storage."""
        if not NAME.fullmatch(key):
            raise UsageError(f"A cell key is letters and digits such as 9c1e…; {key[:40]!r} came.")
        return self._cells.edits(key)

    def tensors(self, key: str, advice: str = "") -> dict[str, np.ndarray]:
        """The arrays of a cell's edits. Raises Damaged, which says what to do (`advice`)."""
        path = self.edits(key)
        try:
            data = files.read(path)
            found = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, OSError, ValueError):
            why = "it cannot be read, as it is missing or torn"
            raise Damaged(path, why, advice) from None
        file = self._cells.open(key)  # None: of a cell that is still at work
        stored = None if file is None else file.records[key].get(EDITS)
        if stored and files.sha256(data) != stored:
            raise Damaged(path, "its bytes do not have the checksum that its cell names", advice)
        return found

    def table(self, name: str) -> pd.DataFrame:
        """The table NAME.parquet as it was written. Raises Damaged, FileNotFoundError."""
        return tables.unseal(self.path / f"{name}.parquet")

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table in the folder, by name. Raises Damaged."""
        return {path.stem: self.table(path.stem) for path in sorted(self.path.glob("*.parquet"))}

    def generations(self, key: str) -> pd.DataFrame:
        """Prompts and completions of a finished cell. Raises UsageError when there are none, or
        they are damaged."""
        self.edits(key)  # a key
        file = self._cells.open(key)
        if file is None or not file.records[key].get("generations"):
            raise UsageError(f"Cell {key} has no stored generations in {self.place}.")
        return tables.to_frame(self._cells.texts(file, key).drop_columns([KEY]))

    def cell_states(self) -> dict[str, CellState]:
        """How each cell on disk stands, by key; safe to call beside a running writer."""
        self._cells.refresh(afresh=True)
        return {
            key: CellState(entry.state, entry.seconds, entry.written)
            for key, entry in self._cells.entries().items()
        }

    def status(self) -> RunStatus:
        """Counts and time left; safe to call beside a running writer."""
        return status_of(
            self.cell_states().values(),
            planned=len(self.planned()),
            running=self.holder(),
            corrupt=self.aside(),
        )

    def holder(self) -> Document | None:
        """Who writes the folder now: {"pid", "host", "command", "since"}; None when nobody does, as
        far as can be seen here."""
        return holder(self.path, self.mirror)

    def aside(self) -> int:
        """How many files and cells are damaged, as far as was looked, or were set aside."""
        folders = ("", "cells", "generations", "scratch")
        aside = sum(1 for folder in folders for _ in (self.path / folder).glob("*.corrupt"))
        return aside + self._cells.n_damaged
