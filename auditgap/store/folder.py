"""`RunFolder`, the one door to a run's results (layout and an example: `auditgap.store`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.rows import Row
from auditgap.store import files, plan, tables
from auditgap.store.cellfile import StoredCell
from auditgap.store.cells import CellFiles
from auditgap.store.files import Damaged
from auditgap.store.lock import hold
from auditgap.store.reader import RunReader
from auditgap.store.remote import Place, mirror_of, within
from auditgap.store.session import (
    OLDEST,
    SCHEMA,
    check_config,
    joined_info,
    new_session,
    read_run,
)
from auditgap.types import Cell, Document


class RunFolder(RunReader):
    """A run's folder, on a disk or on object storage. Picklable, so a worker process can be handed
    one; only the process that drives takes `lock`."""

    def __init__(
        self,
        place: Place,
        run: Document,
        warnings: Sequence[str] = (),
        break_lock: bool = False,
    ) -> None:
        #: None on a disk; else what joins `path`, the working copy, and the storage
        self.mirror = mirror_of(place)
        # a Ray worker may stand elsewhere
        self.path = Path(place).absolute() if self.mirror is None else self.mirror.path
        #: how others name it, and open it
        self.place: str | Path = self.path if self.mirror is None else self.mirror.url
        self.run = run
        self.warnings = list(warnings)  #: sentences about drift against the session before
        self._break_lock = break_lock
        self._locked = False
        self._cells = CellFiles(self.path, self.mirror)

    def __getstate__(self) -> Document:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cells", "_locked")}

    def __setstate__(self, state: Document) -> None:
        self.__dict__.update(state)
        if self.mirror is not None:
            self.path = self.mirror.path  # another machine keeps its working copy elsewhere
        self._locked = False
        self._cells = CellFiles(self.path, self.mirror)

    # ------------------------------------------------------------------ open

    @classmethod
    def open(
        cls, path: Place, *, config: Mapping, info: Mapping, break_lock: bool = False
    ) -> RunFolder:
        """Create the folder, or resume the one that is there.

        `config` is what affects numbers: on a folder made with another one this raises UsageError
        with the difference field by field, and changes nothing. `info` (versions, command, seeds,
        warnings) is refreshed, never compared; versions that differ from the session before become
        `.warnings`. Leavings of dead processes are cleaned. Raises UsageError (another writer, no
        folder, another schema) and DiskError.
        """
        folder = cls(path, {}, break_lock=break_lock)
        files.check_writable(folder.path)
        files.make_folder(folder.path)
        folder._resume_from(config)  # a refusal comes before anything is touched
        with folder.lock():
            old = folder._resume_from(config)
            if folder.mirror is not None and not old:
                folder.mirror.clear()
            session, folder.warnings = new_session(old.get("sessions", []), info)
            folder.run = {
                "schema": SCHEMA,
                "config": old.get("config") or check_config({}, config),
                "info": joined_info(old.get("info", {}), info),
                "sessions": [*old.get("sessions", []), session],
            }
            if old.get("schema") == OLDEST:  # from here on it has to have its checksum
                folder._write(plan.NAME, plan.encode(folder._planned(sealed=False)))
            folder._write("run.json", files.seal(folder.run))
            for name, mode in (
                ("cells", 0o777),
                ("generations", files.PRIVATE_FOLDER),
                ("scratch", files.PRIVATE_FOLDER),
            ):
                with files.disk_errors(folder.path / name):
                    (folder.path / name).mkdir(mode=mode, exist_ok=True)
                files.clean_stale(folder.path / name)
            files.clean_stale(folder.path)
        return folder

    @classmethod
    def load(cls, path: Place, *, break_lock: bool = False) -> RunFolder:
        """Open what is there. Raises UsageError when it is no run folder, or one of another schema;
        DiskError."""
        folder = cls(path, {}, break_lock=break_lock)
        if folder.mirror is not None:
            folder.mirror.pull_file("run.json")
        if not (folder.path / "run.json").is_file():
            raise UsageError(f"{path} is no run folder ({_instead(folder.path, path)}.")
        folder.run = read_run(folder.path / "run.json", folder.place)
        return folder

    def _resume_from(self, config: Mapping) -> Document:
        """What run.json holds ({} in a new folder), once `config` is seen to agree with it."""
        if self.mirror is not None:
            self.mirror.pull_file("run.json")
        if (self.path / "run.json").exists():
            run = read_run(self.path / "run.json", self.place)
            check_config(run["config"], config, self.place)
            return run
        there = (
            [p.name for p in self.path.iterdir()] if self.mirror is None else self.mirror.entries()
        )
        strangers = [name for name in there if name != "lock.json" and not name.startswith(".")]
        if strangers:
            raise UsageError(
                f"{self.place} holds other files ({sorted(strangers)[0]}, {len(strangers)} in all)"
                " and no run.json. Choose a new or an empty folder."
            )
        return {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer: a second one raises UsageError that names the holder. `open` first, then
        `lock`."""
        with hold(self.path, break_lock=self._break_lock, mirror=self.mirror):
            self._locked = True
            try:
                yield
            finally:
                self._locked = False
            self.publish()  # what an audit has put beside its cells and tables

    # ------------------------------------------------------------------ plan

    def plan(self, cells: Iterable[Cell]) -> None:
        """Add cells to plan.json; a cell that is there already (by key) is not added twice."""
        self.plan_entries(
            # the very settings, not a copy: cells of a group share one
            {"key": c.key, "cell": str(c), "description": {**c.describe(), "settings": c.settings}}
            for c in cells
        )

    def plan_entries(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """The same, of entries such as `planned` gives. A damaged plan.json is set aside."""
        try:
            known = {entry["key"]: entry for entry in self.planned()}
        except Damaged:
            files.set_aside(self.path / plan.NAME)
            known = {}
        before = len(known)
        for entry in entries:
            known.setdefault(entry["key"], dict(entry))
        if len(known) != before or not before:
            self._write(plan.NAME, plan.encode(known.values()))

    # ----------------------------------------------------------------- cells

    def scan(self, keys: Iterable[str]) -> tuple[set[str], dict[str, Document]]:
        """Which of `keys` are finished, and the records of those that failed: `is_finished` and
        `failure` of all, in one pass that reads and checks every byte. What is damaged is set
        aside (`*.corrupt`)."""
        self._cells.refresh(afresh=True)
        self._cells.set_aside()
        if self._locked:
            self._cells.tidy()
        found = {key: entry for key in keys if (entry := self._cells.entry(key)) is not None}
        failed = {key for key, entry in found.items() if entry.status == "failed"}
        some = self._records("failed", failed) if failed else ()
        records = {record["key"]: record for record in some}
        return (
            {key for key, entry in found.items() if entry.done},
            {key: records[key] for key in found if key in records},
        )

    def write(
        self,
        cell: Cell,
        rows: Sequence[Any],
        *,
        generations: Sequence[Mapping[str, Any]] = (),
        seconds: float,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Store a finished cell: all of it or nothing. A cell that is finished already stays as it
        is.

        `rows` are instances of one flat dataclass (`Row` or an audit's own), `generations` mappings
        that may hold text, `seconds` what the cell took, `info` anything JSON for its record.
        Raises DiskError, ValueError.
        """
        if self.is_finished(cell.key):
            return
        row_type = type(rows[0]) if rows else Row
        table = tables.rows_to_table(rows, row_type)
        texts = tables.mappings_to_table(generations) if generations else None
        edits = self.edits(cell.key)
        record = self._record(cell, "done") | {
            "sha256": tables.content_sha256(table),
            "n_rows": len(rows),
            "row_type": row_type.__name__,
            "seconds": float(seconds),
            "generations": None
            if texts is None
            else {"sha256": tables.content_sha256(texts), "n": len(generations)},
            "edits": files.sha256(edits.read_bytes()) if edits.is_file() else None,
            "info": dict(info or {}),
        }
        self._cells.put([StoredCell(record, table, texts)])

    def settle(self, keys: Iterable[str]) -> None:
        """Join the files of these cells, a group that nobody works on any more, into one. For the
        one writer; raises DiskError."""
        self._cells.settle(keys)

    def fail(self, cell: Cell, cause: str, *, retry: bool = False) -> None:
        """Record an attempt that did not finish: the cause in one line, never text of a prompt.

        `retry`: it will be tried again by whoever calls, so it is no entry of `failures()` yet. A
        finished cell stays.
        """
        if self.is_finished(cell.key):
            return
        status = "retrying" if retry else "failed"
        record = self._record(cell, status) | {"cause": _one_line(cause)}
        self._cells.put([StoredCell(record)])

    def _record(self, cell: Cell, status: str) -> Document:
        before = self._cells.entry(cell.key)
        return {
            "schema": SCHEMA,
            "status": status,
            "key": cell.key,
            "cell": str(cell),
            "description": cell.describe(),
            "attempts": (0 if before is None else before.attempts) + 1,
            "session": len(self.run.get("sessions", [])) - 1,
            "written": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }

    def adopt(self, other: RunFolder, key: str) -> bool:
        """Take over a cell that another folder has finished, its generations too, or given up; True
        when it is finished.

        A cell that is finished here stays. Raises UsageError when both folders have finished it
        with other numbers, or its generations are torn.
        """
        self._cells.refresh()
        mine, theirs = self._cells.entry(key), other._cells.look(key)
        done = mine is not None and mine.done
        if done and theirs is not None and theirs.done and not self.agrees(other, key):
            raise UsageError(
                f"{other.record(key)['cell']} has other numbers in {other.place} than in"
                f" {self.place}, under the same description (cell {key}). Leave one of the folders"
                " out."
            )
        if done or theirs is None or theirs.status == "retrying":
            return done
        if theirs.status == "failed" and mine is not None:
            return False
        cell = other._cells.cell(key)
        if cell is not None:
            self._adopt_edits(other, key)
            self._cells.put([cell])
        return theirs.done

    def _adopt_edits(self, other: RunFolder, key: str) -> None:
        if other.edits(key).is_file() and self.mirror is None:
            self.edits(key).parent.mkdir(exist_ok=True)
            files.write_bytes(self.edits(key), other.edits(key).read_bytes())

    def adopt_all(self, other: RunFolder) -> None:
        """Take over every cell of another folder, whole files as they are; where both have a cell,
        they agree (`agrees`). Raises Damaged, DiskError."""
        other._cells.refresh()
        for name in other._cells.names():
            self._cells.copy(other._cells, name)
        for key, entry in other._cells.entries().items():
            if entry.is_legacy:
                self.adopt(other, key)
            elif entry.done:
                self._adopt_edits(other, key)


def _one_line(cause: str) -> str:
    line = next((part.strip() for part in cause.splitlines() if part.strip()), "no cause given")
    return "".join(c if c.isprintable() else "?" for c in line)[:300]


def _instead(folder: Path, typed: Place) -> str:
    """Why a folder is no run's, and what to give in its place."""
    if not folder.exists():
        return "nothing is there, or not yet). Give the folder that an audit wrote"
    runs = sorted(str(within(typed, run.parent.name)) for run in folder.glob("*/run.json"))
    if runs:
        return f"it has no run.json), but holds some. Give one of them: {', '.join(runs[:5])}"
    return "it has no run.json). Give the folder that an audit wrote"
