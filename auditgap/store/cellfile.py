"""One file of cells: their rows as parquet, their records in its footer, named by its own checksum.

    data = encode([StoredCell(record, rows), …], texts="51f0….parquet")
    name = name_of(data)                        # 9c1e….parquet: the SHA-256 of the bytes
    file = read(Path("out/cells"), name)        # raises Damaged unless the bytes have that name
    file.records["3fa2…"]["status"];  file.rows(["3fa2…"])

The column `cell_key` says which cell a row belongs to; everything else is the row as it was
written. The footer is a line of JSON (the records), then a line a cell: its description as
canonical JSON, so that the key is the plain SHA-256 of a line; every reader checks it. What a cell's model has said stands in a second file of
the same form, in generations/, whose name, and so whose checksum, is part of this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from auditgap.store import files, tables
from auditgap.store.files import Damaged
from auditgap.types import Document, canonical

KEY = "cell_key"  #: the column that says whose row it is
ENDING = ".parquet"
STATES = ("retrying", "failed", "done")  #: of a record; a later one makes an earlier one obsolete
_FOOTER = b"auditgap.cells"
_KEY_DIGITS = 24  # as `auditgap.types.digest` makes them


@dataclass(frozen=True, slots=True)
class StoredCell:
    """A cell on its way into a file: its record, its rows and what its model said, if it is
    kept. A cell that failed has no rows."""

    record: Document
    rows: pa.Table | None = None
    texts: pa.Table | None = None

    @property
    def kind(self) -> tuple[bytes, bytes]:
        """Cells of one kind can share a file: their tables have the same columns."""
        return _schema(self.rows), _schema(self.texts)


class About(NamedTuple):
    """What a file says of its cells."""

    records: dict[str, Document]  #: by key; `description` is canonical JSON, as bytes
    texts: str | None  #: the name of the file in generations/
    texts_sha256: str | None  #: its checksum, or how that begins


@dataclass(frozen=True)
class CellFile:
    """A file that was read and found whole."""

    name: str
    data: bytes = field(repr=False)  #: parquet
    read_about: Callable[[], About] = field(repr=False)

    @cached_property
    def about(self) -> About:
        """Read when it is first asked for."""
        return self.read_about()

    @property
    def records(self) -> dict[str, Document]:
        """By key; `description` is canonical JSON, as bytes."""
        return self.about.records

    @property
    def texts(self) -> str | None:
        """The name of the file in generations/."""
        return self.about.texts

    @property
    def texts_sha256(self) -> str | None:
        """Its checksum, or how that begins."""
        return self.about.texts_sha256

    def rows(
        self, keys: Collection[str] | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The rows of these cells (None: of all), with the column `cell_key` at the end. `columns`:
        those of these names that there are, and no other is decoded."""
        wanted = None if columns is None else [*columns, KEY]
        return only(tables.from_bytes(self.data, wanted), self.name, keys)

    def attack(self, key: str) -> str:
        """What a cell is of: the `attack` of its description."""
        return json.loads(self.records[key]["description"])["attack"]

    def record(self, key: str) -> Document:
        """The record with its description as a mapping."""
        found = self.records[key]
        return {**found, "description": json.loads(found["description"])}


def name_of(data: bytes) -> str:
    """The name of a file with these bytes."""
    return f"{files.sha256(data)[:32]}{ENDING}"


def encode(cells: Sequence[StoredCell], texts: str | None) -> bytes:
    """The file of cells of one kind; `texts` is the name of the file of what their models said."""
    ordered = sorted(cells, key=lambda cell: cell.record["key"])
    records = [{k: v for k, v in c.record.items() if k != "description"} for c in ordered]
    rows = _joined([(cell.record["key"], cell.rows) for cell in ordered])
    about = files.to_json({"texts": texts, "cells": records}, indent=None).decode("ascii")
    footer = about + "\n".join(canonical(cell.record["description"]) for cell in ordered)
    return tables.to_bytes(rows, footer={_FOOTER.decode("ascii"): footer})


def encode_texts(cells: Sequence[StoredCell]) -> bytes:
    """The file of what the models of these cells said."""
    ordered = sorted(cells, key=lambda cell: cell.record["key"])
    return tables.to_bytes(_joined([(cell.record["key"], cell.texts) for cell in ordered]))


def read(folder: Path | str, name: str, *, known: bool = False) -> CellFile:
    """The file, checked: its bytes against its name, each key against its description. `known`: a
    file of this name was read before, so that its bytes alone have to be checked now.

    Raises Damaged, FileNotFoundError.
    """
    path = f"{folder}/{name}"
    data = files.read(path)
    if name_of(data) != name:
        raise Damaged(path, "its bytes do not have the checksum that is its name")
    file = CellFile(name, data, lambda: _about(path, data))
    if not known:
        file.about  # noqa: B018 - it raises Damaged
    return file


def _about(path: str, data: bytes) -> About:
    """What the footer says. Raises Damaged."""
    try:
        head, *descriptions = _footer(data).split(b"\n")
        about = json.loads(head.decode("ascii"))  # of bytes it would guess the encoding first
        records: dict[str, Document] = {}
        for record, description in zip(about["cells"], descriptions, strict=True):
            key = record["key"]
            described = hashlib.sha256(description).hexdigest()[:_KEY_DIGITS]
            if described != key or record["status"] not in STATES:
                raise Damaged(path, f"its cell {key} is described as another one")
            records[key] = {**record, "description": description}
    except (ValueError, KeyError, TypeError, IndexError):
        raise Damaged(path, "it is no file of cells") from None
    texts = about["texts"]
    return About(records, texts, texts and texts.removesuffix(ENDING))


def texts_bytes(folder: Path | str, name: str | None, sha256: str | None) -> bytes:
    """A file of generations/, checked. Raises Damaged."""
    path = f"{folder}/{name}"
    try:
        data = files.read(path)
    except FileNotFoundError:
        raise Damaged(path, "it is missing") from None
    if not sha256 or not files.sha256(data).startswith(sha256):
        raise Damaged(path, "its bytes do not have the checksum that its cells name")
    return data


def _schema(table: pa.Table | None) -> bytes:
    return b"" if table is None else table.schema.serialize().to_pybytes()


def _joined(parts: Sequence[tuple[str, pa.Table | None]]) -> pa.Table:
    """The tables below each other, and whose rows they are."""
    found = [(key, pa.table({}) if table is None else table) for key, table in parts]
    whose = pa.array([key for key, table in found for _ in range(len(table))], pa.string())
    rows = pa.concat_tables([table for _, table in found])
    return rows.append_column(pa.field(KEY, pa.string(), nullable=False), whose)


def only(table: pa.Table, name: str, keys: Collection[str] | None) -> pa.Table:
    """The rows of these cells of the file `name`, without what the footer says beside them."""
    table = table.replace_schema_metadata(None)
    if KEY not in table.column_names:  # the folder of one cell, of an earlier release
        whose = pa.array([name] * len(table), pa.string())
        return table.append_column(pa.field(KEY, pa.string(), nullable=False), whose)
    if keys is None or set(table[KEY].unique().to_pylist()) <= set(keys):
        return table
    return table.filter(pc.field(KEY).isin(list(keys)))


def _footer(data: bytes) -> bytes:
    """The records' JSON out of a parquet file's footer. Raises ValueError, IndexError.

    A resume reads 10,000 footers, and with pyarrow, which parses all of each, that takes three
    times as long. An entry of the footer is two strings, each a tag (0x18), its length as a varint
    and its bytes (Thrift's compact protocol); in ours no such tag can stand.
    """
    mark = b"\x18%c%b\x18" % (len(_FOOTER), _FOOTER)
    at = data.rindex(mark) + len(mark)
    length = shift = 0
    while True:
        length |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return data[at : at + length]
