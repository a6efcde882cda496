"""The cells of a run folder: the union of its files, key by key.

    cells = CellFiles(Path("out"))
    cells.put([StoredCell(record, rows, texts)])     # the moment that a cell is done: a file of its own
    cells.settle(keys)                               # its group is done: one file for all of them
    cells.look("9c1e…").status                       # as the disk has it now

    cells/<checksum>.parquet         rows and records of some cells; immutable
    generations/<checksum>.parquet   what the models of the same cells said

A worker writes each cell of its group when it is done or has failed, as a small file that a kill
cannot take back. When nobody works on the group any more, whoever drives the sweep joins these into
one file and deletes them, in this order: at every moment each cell stands in one file at least. A
retry of cells that had failed writes, and joins, another file of the group. Where files disagree
about a cell, done counts more than failed, and a later attempt more than an earlier one; a file of
which nothing counts any more is deleted.

Files never change, and a file's name is its checksum: to know a folder is to list it, and to load
what is new. A cell is whole only with all of its files, its texts and edits too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from os import listdir
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa

from auditgap.store import cellfile, files, legacy, tables
from auditgap.store.cellfile import ENDING, STATES, CellFile, StoredCell
from auditgap.store.files import Damaged
from auditgap.store.many import in_turn, on_threads
from auditgap.store.remote import Mirror, is_key

CELLS, TEXTS, EDITS = "cells", "generations", "edits"

_T = TypeVar("_T")


class Entry(NamedTuple):
    """What one file says about one cell."""

    status: str
    attempts: int
    n_cells: int  #: in the file: of equal entries the one in the joined file counts
    file: str
    whole: bool  #: its texts and edits are there
    seconds: float
    written: str

    @property
    def done(self) -> bool:
        return self.whole and self.status == STATES[-1]

    @property
    def state(self) -> str:
        """Its status, or `torn` where a file of a finished cell is not whole."""
        return self.status if self.whole else "torn"

    @property
    def is_legacy(self) -> bool:
        """Whether it is a folder that an earlier release wrote."""
        return not self.file.endswith(ENDING)

    @property
    def rank(self) -> tuple[int, int, int, str]:
        return STATES.index(self.status), self.attempts, self.n_cells, self.file


class CellFiles:
    """The files below one run folder, and what they say together. Not to be pickled: each process
    looks for itself."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path, self.mirror = path, mirror
        self.damaged: dict[str, Damaged] = {}  #: files that were found damaged, by name
        self._torn: set[str] = set()  # texts that were found damaged
        self._stored: set[str] = set()  # texts that are on object storage
        self._files: dict[str, tuple[str | None, list[str]]] = {}  # texts, keys
        self._entries: dict[str, list[Entry]] = {}  # by key

    # ------------------------------------------------------------------ look

    def refresh(self, *, afresh: bool = False) -> None:
        """Know what is there now. `afresh`: read and check every byte again."""
        if afresh:
            self._files, self._entries, self.damaged, self._torn = {}, {}, {}, set()
        gone: set[str] = set()
        while True:
            names = self._list()
            new = names - self._files.keys() - self.damaged.keys()
            missing = self._files.keys() - names
            # A listing beside a writer can miss the joined file and what it was joined from. One
            # that starts after a file was seen to be gone has what came in its place.
            if not new and missing == gone:
                break
            gone = missing
            if new and self.mirror is not None:
                self._stored = {name.rpartition("/")[2] for name in self.mirror.names(TEXTS)}
            self._take(sorted(new))
        for name in gone:
            self._forget(name)
        self.damaged = {name: why for name, why in self.damaged.items() if name in names}

    def entry(self, key: str) -> Entry | None:
        """What counts of a cell, as far as it is known."""
        found = self._entries.get(key)
        return None if found is None else _counting(found)

    def entries(self) -> dict[str, Entry]:
        """The same of all cells, by key, sorted."""
        return {key: _counting(found) for key, found in sorted(self._entries.items())}

    def look(self, key: str) -> Entry | None:
        """What counts of a cell, as the disk has it now: a finished one is read and checked."""
        known = self.entry(key)
        if known is not None and known.status == STATES[-1]:
            self._forget(known.file)
            self._take([known.file])
            known = self.entry(key)
            if known is not None and known.done:
                return known
        self.refresh()
        return self.entry(key)

    def open(self, key: str) -> CellFile | None:
        """The file that counts for a cell; None when there is none. Raises Damaged."""
        for again in (True, True, False):
            found = self.entry(key)
            if found is None and again:
                self.refresh()
                found = self.entry(key)
            if found is None:
                return None
            try:
                return self._read(found.file)
            except FileNotFoundError:  # it was joined with others meanwhile
                self.refresh()
        return None

    def each(
        self,
        work: Callable[[CellFile, list[str]], _T],
        status: str,
        keys: Collection[str] | None = None,
    ) -> Iterator[_T]:
        """`work` of every file and of its cells that count and have this status (of these, unless
        `keys` is None), several read at a time. A damaged file is noted and passed over."""
        self.refresh()
        wanted: dict[str, list[str]] = {}
        for key in sorted(self._entries if keys is None else keys):
            if (entry := self.entry(key)) is not None and entry.status == status:
                wanted.setdefault(entry.file, []).append(key)
        moved: list[str] = []

        def read(some: Sequence[str]) -> list[_T]:
            found: list[_T] = []
            for name in some:
                try:
                    found.append(work(self._read(name, known=True), wanted[name]))
                except FileNotFoundError:
                    moved.extend(wanted[name])
                except Damaged as damage:
                    self.damaged[name] = damage
            return found

        yield from on_threads(read, sorted(wanted))
        for key in moved:  # joined with others while we read
            if (file := self.open(key)) is not None:
                yield work(file, [key])

    def texts(self, file: CellFile, key: str) -> pa.Table:
        """What the model of a cell said, with the column `cell_key`. Raises Damaged."""
        return cellfile.only(tables.from_bytes(self._texts(file)), file.name, [key])

    def contents(self, file: CellFile, keys: Sequence[str]) -> list[StoredCell]:
        """These cells of a file, as they were put in. Raises Damaged."""
        rows = file.rows(keys)
        named = [key for key in keys if file.records[key].get(TEXTS)]
        said = tables.from_bytes(self._texts(file)) if named else None

        def own(table: pa.Table, key: str) -> pa.Table:
            return cellfile.only(table, file.name, [key]).drop_columns([cellfile.KEY])

        return [
            StoredCell(
                file.record(key),
                own(rows, key),
                own(said, key) if said is not None and key in named else None,
            )
            for key in keys
        ]

    def cell(self, key: str) -> StoredCell | None:
        """A cell as it was put in. Raises Damaged."""
        file = self.open(key)
        if file is None:
            return None
        record, rows, texts = file.record(key), None, None
        if record["status"] == STATES[-1]:
            rows = file.rows([key]).drop_columns([cellfile.KEY])
        if record.get(TEXTS):
            texts = self.texts(file, key).drop_columns([cellfile.KEY])
        return StoredCell(record, rows, texts)

    # ----------------------------------------------------------------- write

    def put(self, cells: Sequence[StoredCell]) -> None:
        """Write cells of one kind as one file, and delete files of which nothing counts any more.
        Raises DiskError."""
        texts = None
        if cells[0].texts is not None:
            texts = self._write(TEXTS, cellfile.encode_texts(cells), files.PRIVATE)
        self._take([self._write(CELLS, cellfile.encode(cells, texts))])
        self._drop_obsolete(
            entry.file for cell in cells for entry in self._entries.get(cell.record["key"], ())
        )

    def copy(self, other: CellFiles, name: str) -> None:
        """Take over a file of another folder as it is. Raises Damaged, DiskError."""
        if name in self._files:
            return
        file = other._read(name)
        if all((entry := self.entry(key)) and entry.done for key in file.records):
            return
        if file.texts is not None:
            self._write(TEXTS, other._texts(file), files.PRIVATE)
        self._write(CELLS, file.data)
        self._take([name])

    def settle(self, keys: Iterable[str]) -> None:
        """Join the files of single cells among these into one a kind. Raises DiskError."""
        entries = {key: entry for key in keys if (entry := self.entry(key)) is not None}
        alone = [key for key, e in entries.items() if e.n_cells == 1 and not e.is_legacy]
        kinds: dict[tuple[bytes, bytes], list[StoredCell]] = {}
        for key in alone if len(alone) > 1 else ():
            with suppress(Damaged):  # it stays as it is, for `scan` to find
                if (cell := self.cell(key)) is not None:
                    kinds.setdefault(cell.kind, []).append(cell)
        for cells in kinds.values():
            if len(cells) > 1:
                self.put(cells)

    def set_aside(self) -> None:
        """Rename what was found damaged to `*.corrupt`. Raises DiskError."""
        for folder, names in ((CELLS, set(self.damaged)), (TEXTS, self._torn)):
            for name in sorted(names):
                if (self.path / folder / name).exists():
                    files.set_aside(self.path / folder / name)
                if self.mirror is not None:
                    self.mirror.delete(f"{folder}/{name}")
                    self._stored.discard(name)
        self.damaged, self._torn = {}, set()

    def tidy(self) -> None:
        """Delete what a kill has left: files of which nothing counts, texts of no cell. For the
        one writer."""
        self._drop_obsolete(self._files)
        if not any((self.path / CELLS).glob("*.corrupt")):
            known = {texts for texts, _ in self._files.values()}
            for name in set(self._names(TEXTS)) - known:
                self._delete(f"{TEXTS}/{name}")

    @property
    def n_damaged(self) -> int:
        """How many files were found damaged and not set aside."""
        aside = (self.path / TEXTS / f"{name}.1.corrupt" for name in self._torn)
        return len(self.damaged) + sum(not path.exists() for path in aside)

    def names(self) -> list[str]:
        """The files that are known, in the form that this release writes."""
        return sorted(name for name in self._files if name.endswith(ENDING))

    # ---------------------------------------------------------------- within

    def _names(self, folder: str) -> list[str]:
        try:
            return [name for name in listdir(self.path / folder) if is_key(name)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _list(self) -> set[str]:
        if self.mirror is not None:
            self.mirror.pull(CELLS)
        return set(self._names(CELLS))

    def _read(self, name: str, *, known: bool = False) -> CellFile:
        read = cellfile.read if name.endswith(ENDING) else legacy.read
        try:
            return read(f"{self.path}/{CELLS}", name, known=known)
        except Damaged:
            if self.mirror is None or self.mirror.fetch(f"{CELLS}/{name}") is None:
                raise
            return read(f"{self.path}/{CELLS}", name)

    def _texts(self, file: CellFile) -> bytes:
        folder, name = f"{self.path}/{TEXTS}", file.texts
        try:
            return cellfile.texts_bytes(folder, name, file.texts_sha256)
        except Damaged:
            if self.mirror is None or self.mirror.fetch(f"{TEXTS}/{name}", files.PRIVATE) is None:
                raise
            return cellfile.texts_bytes(folder, name, file.texts_sha256)

    def _take(self, names: Sequence[str]) -> None:
        """Load files and note what they say."""

        def note(some: Sequence[str]) -> list[tuple[str, str | None, dict[str, Entry]]]:
            found: list[tuple[str, str | None, dict[str, Entry]]] = []
            for name in some:
                with suppress(FileNotFoundError):
                    try:
                        file = self._read(name)
                        found.append((name, file.texts, self._said(file)))
                    except Damaged as damage:
                        self.damaged[name] = damage
            return found

        for name, said, entries in in_turn(note, names):
            self._files[name] = said, list(entries)
            for key, entry in entries.items():
                self._entries.setdefault(key, []).append(entry)

    def _said(self, file: CellFile) -> dict[str, Entry]:
        """What a file says of its cells. Texts on object storage are checked when they come."""
        afar = self.mirror is not None
        whole = not afar or file.texts is None or file.texts in self._stored
        if whole and file.texts and (not afar or (self.path / TEXTS / file.texts).exists()):
            try:
                self._texts(file)
            except Damaged:
                whole = False
                self._torn.add(file.texts)
        n_cells = len(file.records)
        return {
            key: Entry(
                record["status"],
                record["attempts"],
                n_cells,
                file.name,
                whole and (not (edits := record.get(EDITS)) or self._has_edits(key, edits)),
                record.get("seconds", 0.0),
                record["written"],
            )
            for key, record in file.records.items()
        }

    def _has_edits(self, key: str, sha256: str) -> bool:
        """Whether a cell's edits are as they were written."""
        try:
            return files.sha256(self.edits(key).read_bytes()) == sha256
        except FileNotFoundError:
            return False

    def edits(self, key: str) -> Path:
        """Where a cell's edits are; 0.2 kept the directions of `em` in a folder of their own."""
        path = self.path / EDITS / f"{key}.safetensors"
        old = self.path / "directions" / path.name
        return old if not path.exists() and old.is_file() else path

    def _forget(self, name: str) -> None:
        _, keys = self._files.pop(name, (None, ()))
        for key in keys:
            left = [entry for entry in self._entries[key] if entry.file != name]
            if left:
                self._entries[key] = left
            else:
                del self._entries[key]

    def _write(self, folder: str, data: bytes, mode: int = 0o666) -> str:
        name = cellfile.name_of(data)
        if self.mirror is not None:
            self.mirror.write(f"{folder}/{name}", data)
            self._stored |= {name} if folder == TEXTS else set()
        files.write_bytes(self.path / folder / name, data, mode)
        return name

    def _delete(self, name: str) -> None:
        if self.mirror is not None:
            self.mirror.delete(name)
        files.remove(self.path / name)

    def _drop_obsolete(self, names: Iterable[str]) -> None:
        for name in sorted(set(names)):
            texts, keys = self._files.get(name, (None, ()))
            counts = any((e := self.entry(key)) and e.file == name for key in keys)
            if counts or not name.endswith(ENDING):
                continue
            self._delete(f"{CELLS}/{name}")
            self._forget(name)
            if texts is not None and texts not in {other for other, _ in self._files.values()}:
                self._delete(f"{TEXTS}/{texts}")


def _counting(entries: Sequence[Entry]) -> Entry:
    """Of what files say about one cell, what counts."""
    return entries[0] if len(entries) == 1 else max(entries, key=lambda entry: entry.rank)
