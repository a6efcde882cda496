"""`RunFolder`, the one door to a run's results (layout and an example: `auditgap.store`)."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from auditgap.errors import UsageError
from auditgap.store import files, packs, scratch, tables
from auditgap.store.lock import hold, holder
from auditgap.store.remote import Place, mirror_of, within
from auditgap.store.seen import Mark, Seen
from auditgap.store.session import check_config, joined_info, new_session
from auditgap.store.status import CellState, RunStatus, status_of
from auditgap.types import Cell, Row, digest

SCHEMA = 1
SCANNERS = 8  #: threads that read cells
_PIECE = 256  # cells that one of them reads at a time
_SORT = ("subject", "layer_index", "unit", "eps", "attack", "draw", "prompt_id")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class RunFolder:
    """A run's folder, on a disk or on object storage. Picklable, so a worker process can be handed
    one; only the process that drives takes `lock`."""

    def __init__(
        self,
        place: Place,
        run: dict[str, Any],
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
        self._seen = Seen(self.path / "index")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.mirror is not None:
            self.path = self.mirror.path  # another machine keeps its working copy elsewhere
            self._seen = Seen(self.path / "index")

    def at(self, *names: str) -> str | Path:
        """What stands in the folder, by the name that others find it under:
        s3://bucket/run/report.html."""
        return within(self.place, *names)

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
        if folder.path.exists() and not folder.path.is_dir():
            raise UsageError(
                f"{folder.path} is a file; a run needs a folder of its own. Choose another name."
            )
        with files.disk_errors(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
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
            folder._write("run.json", files.to_json(folder.run))
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
            raise UsageError(
                f"{path} is no run folder (it has no run.json). Give the folder that an audit"
                " wrote."
            )
        folder.run = _read_run(folder)
        return folder

    def _resume_from(self, config: Mapping) -> dict[str, Any]:
        """What run.json holds ({} in a new folder), once `config` is seen to agree with it."""
        if self.mirror is not None:
            self.mirror.pull_file("run.json")
        if (self.path / "run.json").exists():
            run = _read_run(self)
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
            yield
            self.publish()  # what an audit has put beside its cells and tables

    def publish(self) -> None:
        """Upload what has changed at the top and in figures/, for a folder on object storage; else
        there is nothing to do."""
        if self.mirror is not None:
            self.mirror.publish()

    # ------------------------------------------------------------------ plan

    def plan(self, cells: Iterable[Cell]) -> None:
        """Add cells to plan.json; a cell that is there already (by key) is not added twice."""
        self.plan_entries(
            # the very settings, not a copy: cells of a group share one
            {"key": c.key, "cell": str(c), "description": {**c.describe(), "settings": c.settings}}
            for c in cells
        )

    def plan_entries(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """The same, of entries such as `planned` gives."""
        plan = {entry["key"]: entry for entry in self.planned()}
        before = len(plan)
        for entry in entries:
            plan.setdefault(entry["key"], dict(entry))
        if len(plan) == before and before:
            return
        path = self.path / "plan.json"
        if path.exists() and files.read_json(path) is None:
            files.set_aside(path)
        # Cells differ in little and share long settings, so each settings stands once: 100,000
        # cells take 30 MB, not 300.
        settings: dict[str, Any] = {}
        names: dict[int, str] = {}
        cells = []
        for entry in plan.values():
            shared = entry["description"]["settings"]
            if id(shared) not in names:
                names[id(shared)] = digest(shared, 16)
                settings.setdefault(names[id(shared)], shared)
            cells.append(
                {**entry, "description": {**entry["description"], "settings": names[id(shared)]}}
            )
        self._write("plan.json", files.to_json({"settings": settings, "cells": cells}, indent=None))

    def planned(self) -> list[dict[str, Any]]:
        """The planned cells: {"key", "cell", "description"}, in the order they were planned."""
        if self.mirror is not None:
            self.mirror.pull_file("plan.json")
        plan = files.read_json(self.path / "plan.json") or []
        if isinstance(plan, list):  # as it was written at first, each cell with its own settings
            return plan
        for entry in plan["cells"]:
            entry["description"]["settings"] = plan["settings"][entry["description"]["settings"]]
        return plan["cells"]

    # ----------------------------------------------------------------- cells

    def _cell(self, key: str) -> Path:
        if not _NAME.fullmatch(key):
            raise UsageError(f"A cell key is letters and digits such as 9c1e…; {key[:40]!r} came.")
        return self.path.joinpath("cells", key)

    def _look(self, key: str) -> tuple[str, dict[str, Any], bytes]:
        """("absent" | "torn" | "failed" | "retrying" | "done", record, bytes of rows.parquet); changes nothing but a working
        copy that is torn."""
        found = self._look_here(key)
        if found[0] == "torn" and self.mirror is not None:
            self.mirror.pull_cell(key, afresh=True)
            found = self._look_here(key)
        return found

    def _look_here(self, key: str) -> tuple[str, dict[str, Any], bytes]:
        found = self._read(str(self._cell(key)))
        if found[0] == "torn":
            self._seen.drop(key)
        return found

    @staticmethod
    def _read(folder: str) -> tuple[str, dict[str, Any], bytes]:
        record = files.read_json(f"{folder}/record.json")
        if not _is_record(record):
            if not os.path.exists(folder):
                return "absent", {}, b""
            # again: somebody may have put a whole one there just now
            record = files.read_json(f"{folder}/record.json")
            if not _is_record(record):
                return "torn", {}, b""
        if record["status"] != "done":
            return record["status"], record, b""
        try:
            data = files.read(f"{folder}/rows.parquet")
        except OSError:
            return "torn", record, b""
        return (
            ("done", record, data)
            if files.sha256(data) == record.get("sha256")
            else ("torn", record, b"")
        )

    def scan(self, keys: Iterable[str]) -> tuple[set[str], dict[str, dict[str, Any]]]:
        """Which of `keys` are finished, and the records of those that failed: `is_finished` and
        `failure` of all, in one pass.

        It reads and checks every byte that they would, several cells at a time, as on network
        storage it is the waiting that takes long; but not of cells whose files look as they did
        when they were last found whole (`seen`). A torn cell is set aside (`*.corrupt`).
        """
        there = set(self.keys())
        finished: set[str] = set()
        failed: dict[str, dict[str, Any]] = {}
        new: dict[str, Mark] = {}

        def look(some: Sequence[str]) -> list[tuple[str, str, dict[str, Any], Mark | None]]:
            found: list[tuple[str, str, dict[str, Any], Mark | None]] = []
            for key in some:
                # before the look: what changes meanwhile looks otherwise next time
                mark = self._seen.mark(str(self._cell(key)))
                if self._seen.holds(key, mark):
                    found.append((key, "done", {}, None))
                else:
                    found.append((key, *self._look(key)[:2], mark))
            return found

        wanted = _pieces(key for key in dict.fromkeys(keys) if key in there)
        for key, state, record, mark in chain.from_iterable(_ahead(look, wanted)):
            if state == "torn":
                files.set_aside(self._cell(key))
            elif state == "done":
                finished.add(key)
                if mark is not None:
                    new[key] = mark
            elif state == "failed":
                failed[key] = record
        self._seen.add(new)
        return finished, failed

    def _looks(
        self, keys: Iterable[str] | None = None
    ) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(key, state, record) of these cells, or of all on disk by key, several looked at a time;
        changes nothing."""

        def look(some: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
            return [(key, *self._look(key)[:2]) for key in some]

        return chain.from_iterable(_ahead(look, _pieces(self.keys() if keys is None else keys)))

    def is_finished(self, key: str) -> bool:
        """Whether the record says done and the rows' checksum agrees. A torn cell is set aside
        (`*.corrupt`): False."""
        self._pull(key)
        return self._is_whole(key)

    def _is_whole(self, key: str) -> bool:
        state, _, _ = self._look(key)
        if state == "torn":
            files.set_aside(self._cell(key))
        return state == "done"

    def _pull(self, key: str) -> None:
        """Have the cell in the working copy as object storage has it, for a folder that lives
        there."""
        if self.mirror is not None:
            self.mirror.pull_cell(key)

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
        # as it is: of a cell's few rows zstd saves little, and undoing it is two thirds of the time
        # that reading them takes
        data = tables.to_bytes(tables.rows_to_table(rows, row_type), compression="none")
        texts = None
        if generations:
            text_bytes = tables.to_bytes(tables.mappings_to_table(generations))
            self._write_generations(cell.key, text_bytes)
            texts = {"sha256": files.sha256(text_bytes), "n": len(generations)}
        record = self._record(cell, "done") | {
            "sha256": files.sha256(data),
            "n_rows": len(rows),
            "row_type": row_type.__name__,
            "seconds": float(seconds),
            "generations": texts,
            "info": dict(info or {}),
        }
        self._place(cell.key, {"rows.parquet": data, "record.json": files.to_json(record)})

    def fail(self, cell: Cell, cause: str, *, retry: bool = False) -> None:
        """Record an attempt that did not finish: the cause in one line, never text of a prompt.

        `retry`: it will be tried again by whoever calls, so it is no entry of `failures()` yet. A
        finished cell stays.
        """
        if self.is_finished(cell.key):
            return
        record = self._record(cell, "retrying" if retry else "failed") | {"cause": _one_line(cause)}
        self._place(cell.key, {"record.json": files.to_json(record)})

    def failures(self) -> dict[str, dict[str, Any]]:
        """The failed cells' records by key."""

        def look(some: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
            return [
                (key, record) for key in some if (record := self._failure_here(key)) is not None
            ]

        return dict(chain.from_iterable(_ahead(look, _pieces(self.keys()))))

    def failure(self, key: str) -> dict[str, Any] | None:
        """The cell's record when it failed, else None."""
        self._pull(key)
        return self._failure_here(key)

    def _failure_here(self, key: str) -> dict[str, Any] | None:
        record = files.read_json(f"{self._cell(key)}/record.json")
        return record if isinstance(record, dict) and record.get("status") == "failed" else None

    def _record(self, cell: Cell, status: str) -> dict[str, Any]:
        _, before, _ = self._look(cell.key)
        return {
            "schema": SCHEMA,
            "status": status,
            "key": cell.key,
            "cell": str(cell),
            "description": cell.describe(),
            "attempts": int(before.get("attempts", 0)) + 1,
            "session": len(self.run.get("sessions", [])) - 1,
            "written": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }

    def _place(self, key: str, contents: Mapping[str, bytes]) -> None:
        """Rename a whole new folder into cells/<key>; what a failure left there makes way."""
        if self.mirror is not None:
            self.mirror.push_cell(key, contents)
        # where another worker has finished the cell first theirs stays: the same numbers
        files.place_folder(self._cell(key), contents, stays=lambda: self._is_whole(key))

    def keys(self) -> list[str]:
        """The keys of all cells that are on disk in any state, sorted."""
        if self.mirror is not None:
            self.mirror.pull_cells()
        try:
            names = os.listdir(self.path / "cells")
        except FileNotFoundError:
            return []
        return sorted(
            name for name in names if _NAME.fullmatch(name) and not name.endswith(".corrupt")
        )

    def adopt(self, other: RunFolder, key: str) -> bool:
        """Take over a cell that another folder has finished, its generations too, or given up; True
        when it is finished.

        A cell that is finished here stays. Raises UsageError when both folders have finished it
        with other numbers, or its generations are torn.
        """
        other._pull(key)
        self._pull(key)
        state, record, data = other._look(key)
        mine, _, my_data = self._look(key)
        if state == mine == "done" and not tables.alike(my_data, data):
            raise UsageError(
                f"{record.get('cell', key)} has other numbers in {other.place} than in"
                f" {self.place}, under the same description (cell {key}). Leave one of the folders"
                f" out, or delete its cells/{key} and run it again."
            )
        if (
            mine == "done"
            or state not in ("done", "failed")
            or (state == "failed" and mine != "absent")
        ):
            return mine == "done"
        if record.get("generations"):
            other.generations(key)  # whole, or this says so
            self._write_generations(key, other._generations(key).read_bytes())
        if other.edits(key).is_file() and self.mirror is None:
            self.edits(key).parent.mkdir(exist_ok=True)
            files.write_bytes(self.edits(key), other.edits(key).read_bytes())
        rows = {"rows.parquet": data} if state == "done" else {}
        self._place(key, {**rows, "record.json": files.to_json(record)})
        return state == "done"

    # ------------------------------------------------------------------ read

    def rows(self, attacks: Collection[str] | None = None) -> pd.DataFrame:
        """All finished cells' rows (of these attacks), sorted by subject, layer, unit, eps, attack,
        draw, prompt.

        What is null in the store is null here (NaN in numbers, None in texts and booleans), never
        0. Integer columns that may be null are float64, so that dtypes do not depend on which cells
        are there.
        """
        index = packs.Index(self.path / "index")

        def read(keys: Sequence[str]) -> list[packs.Pack]:
            cells = {}
            for key in keys:
                state, record, data = self._look(key)
                if state == "done" and (
                    attacks is None or record["description"]["attack"] in attacks
                ):
                    cells[key] = (record["sha256"], data)
            return index.read(cells)

        keys = self.keys()
        places = {key: place for place, key in enumerate(keys)}
        # a frame a cell would take most of the time: one a schema
        by_schema: dict[bytes, list[packs.Pack]] = {}
        for pack in chain.from_iterable(_ahead(read, packs.buckets(keys))):
            by_schema.setdefault(pack.rows.schema.serialize().to_pybytes(), []).append(pack)
        framed = []
        for found in by_schema.values():
            frame = tables.to_frame(pa.concat_tables([pack.rows for pack in found]))
            cells = [cell for pack in found for cell in pack.cells]
            frame.index = np.repeat([places[key] for key, _, _ in cells], [n for _, _, n in cells])
            framed.append((min(places[key] for key, _, _ in cells), frame))
        # by the first cell that has the schema
        frames = [frame for _, frame in sorted(framed, key=lambda pair: pair[0])]
        frames = (
            [f for f in frames if len(f)]
            or frames[:1]
            or [tables.to_frame(tables.schema_of(Row).empty_table())]
        )
        table = pd.concat(frames).sort_index(kind="stable").reset_index(drop=True)
        by = [name for name in _SORT if name in table.columns]
        return (
            table.sort_values(by, kind="stable", na_position="first", ignore_index=True)
            if by
            else table
        )

    def cell_rows(self, key: str) -> pd.DataFrame:
        """One finished cell's rows, as they were written. Raises UsageError when the cell is not
        finished."""
        self._pull(key)
        state, _, data = self._look(key)
        if state != "done":
            raise UsageError(
                f"Cell {key} is not finished in {self.place}; run the command that made the folder"
                " again."
            )
        return tables.to_frame(tables.from_bytes(data))

    def records(self) -> list[dict[str, Any]]:
        """The finished cells' records, sorted by key."""
        return list(self.iter_records())

    def iter_records(self) -> Iterator[dict[str, Any]]:
        """The same, one at a time."""
        return (record for _, state, record in self._looks() if state == "done")

    def edits(self, key: str) -> Path:
        """Where a cell's edits are, if its audit keeps them: what was put into the subject, for
        export. Not on object storage."""
        return self.path / "edits" / f"{self._cell(key).name}.safetensors"

    def _generations(self, key: str) -> Path:
        return self.path / "generations" / f"{self._cell(key).name}.parquet"

    def _write_generations(self, key: str, data: bytes) -> None:
        path = self._generations(key)
        if self.mirror is not None:
            self.mirror.write(f"generations/{path.name}", data)
        files.write_bytes(path, data, files.PRIVATE)

    def generations(self, key: str) -> pd.DataFrame:
        """Prompts and completions of a finished cell. Raises UsageError when there are none, or
        they are torn."""
        path = self._generations(key)
        self._pull(key)
        state, record, _ = self._look(key)
        if state != "done" or not record.get("generations"):
            raise UsageError(f"Cell {key} has no stored generations in {self.place}.")
        data = path.read_bytes() if path.exists() else b""
        if self.mirror is not None and files.sha256(data) != record["generations"]["sha256"]:
            data = self.mirror.pull_file(f"generations/{path.name}", files.PRIVATE) or b""
        if files.sha256(data) != record["generations"]["sha256"]:
            raise UsageError(
                f"{self.at('generations', path.name)} is missing or torn. Delete"
                f" {self.at('cells', key)} and run the same command again to make it anew."
            )
        return tables.to_frame(tables.from_bytes(data))

    def cell_states(self) -> dict[str, CellState]:
        """How each cell on disk stands, by key; safe to call beside a running writer."""
        return {key: CellState.of(state, record) for key, state, record in self._looks()}

    def status(self) -> RunStatus:
        """Counts and time left; safe to call beside a running writer."""
        return status_of(
            self.cell_states().values(),
            planned=len(self.planned()),
            running=self.holder(),
            aside=self.aside(),
        )

    def holder(self) -> dict[str, Any] | None:
        """Who writes the folder now: {"pid", "host", "command", "since"}; None when nobody does, as
        far as can be seen here."""
        return holder(self.path, self.mirror)

    def aside(self) -> int:
        """How many torn files and cells were set aside."""
        folders = (self.path, self.path / "cells", self.path / "scratch")
        return sum(1 for folder in folders for _ in folder.glob("*.corrupt"))

    # --------------------------------------------------------------- scratch

    def _scratch(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"A scratch name is a hash (letters, digits, . _ -); {name[:40]!r} came."
            )
        return self.path / "scratch" / f"{name}.safetensors"

    def remember(
        self, name: str, compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The arrays stored under `name`, or what `compute` gives, stored first: how work inside a
        cell survives a kill.

        Name it by a hash of everything that the arrays depend on; more in `auditgap.store.scratch`.
        Raises DiskError.
        """
        return scratch.remember(self._scratch(name), compute)

    def remembers(self, name: str) -> bool:
        """Whether arrays are stored under `name` (`remember` still looks whether they are
        whole)."""
        return self._scratch(name).exists()

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Delete scratch arrays whose cells are written, or all of them; unknown names are no
        error."""
        if names is None:
            names = [path.stem for path in (self.path / "scratch").glob("*.safetensors")]
        for name in names:
            files.remove(self._scratch(name))

    # --------------------------------------------------------------- outputs

    def _output(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name in ("run.json", "plan.json", "lock.json"):
            raise UsageError(
                f"An output is a plain file name in the run folder; {name[:80]!r} came."
            )
        return self.path / name

    def _write(self, name: str, data: bytes) -> Path:
        path = self.path / name
        files.write_bytes(path, data)
        self.publish()
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write DIR/<name> atomically as UTF-8; a lone surrogate becomes its escape. Returns the
        path."""
        return self._write(self._output(name).name, text.encode("utf-8", "backslashreplace"))

    def write_table(self, name: str, frame: pd.DataFrame) -> Path:
        """Write DIR/<name> (.parquet, .csv with formulas made inert, or .md) atomically, nothing
        rounded."""
        path = self._output(name)
        if path.suffix == ".parquet":
            return self._write(name, tables.to_bytes(tables.frame_to_table(frame)))
        if path.suffix not in (".csv", ".md"):
            raise UsageError(f"A table is written as .parquet, .csv or .md; {name!r} came.")
        return self.write_text(
            name, tables.to_csv(frame) if path.suffix == ".csv" else tables.to_markdown(frame)
        )


def _read_run(folder: RunFolder) -> dict[str, Any]:
    run = files.read_json(folder.path / "run.json")
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("config"), dict)
        or not isinstance(run.get("schema"), int)
    ):
        raise UsageError(
            f"{folder.at('run.json')} cannot be read as a run's description. Use a new folder."
        )
    if run["schema"] > SCHEMA:
        raise UsageError(
            f"{folder.place} was written by a newer auditgap (schema {run['schema']}; this one"
            f" reads up to {SCHEMA}). Upgrade: pip install -U auditgap"
        )
    if run["schema"] < SCHEMA:
        raise UsageError(
            f"{folder.place} was written by an older auditgap (schema {run['schema']}; this one"
            f" reads {SCHEMA}). Use the version that its run.json names, or a new folder."
        )
    return run


def _is_record(record: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(record, dict) and record.get("status") in ("done", "failed", "retrying")


_T = TypeVar("_T")


def _pieces(keys: Iterable[str]) -> Iterator[list[str]]:
    keys = iter(keys)
    while piece := list(islice(keys, _PIECE)):
        yield piece


def _ahead(work: Callable[[list[str]], _T], pieces: Iterable[list[str]]) -> Iterator[_T]:
    """`work` of each piece, in order: several at a time, as on network storage it is the waiting
    that takes long, and never far ahead of whoever asks, so that memory does not grow with the
    number of cells."""
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(SCANNERS) as pool:
        for piece in pieces:
            waiting.append(pool.submit(work, piece))
            if len(waiting) > 2 * SCANNERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _one_line(cause: str) -> str:
    line = next((part.strip() for part in cause.splitlines() if part.strip()), "no cause given")
    return "".join(c if c.isprintable() else "?" for c in line)[:300]
