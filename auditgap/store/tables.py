"""Dataclasses and mappings to parquet and back, with null kept null and every text kept byte for
byte.

    schema_of(Row)                          # layer_index: int64, subject: string not null, …
    table = rows_to_table([Row(…), …]);     frame = to_frame(from_bytes(to_bytes(table)))

Parquet text is UTF-8, which has no lone surrogates; models emit them. A text column that holds one
is stored as bytes (UTF-8 with the surrogates passed through) and marked, and `to_frame` gives the
same text back.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import operator
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from auditgap.store import files
from auditgap.store.files import Damaged
from auditgap.types import Document

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_SEAL = b"auditgap.sha256"  #: in a table's own file: `content_sha256` of what it says
_PASSED = {b"text": b"utf-8, lone surrogates passed through"}
_SURROGATES = ("utf-8", "surrogatepass")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def missing(value: Any) -> bool:
    """None, NaN, pandas' NA or NaT."""
    return (
        value is None
        or value is pd.NA
        or value is pd.NaT
        or (isinstance(value, float) and value != value)
    )


def schema_of(row_type: type) -> pa.Schema:
    """The parquet schema of a row dataclass: its annotations, nullable where they say `| None`.

    Raises TypeError for an annotation that is not str, int, float, bool, an enum of str, or one of
    these `| None`.
    """
    hints = typing.get_type_hints(row_type)
    return pa.schema([_field(row_type, f.name, hints[f.name]) for f in fields(row_type)])


def _field(row_type: type, name: str, hint: Any) -> pa.Field:
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (types.UnionType, typing.Union)
        else (hint,)
    )
    inner = [
        str if isinstance(o, type) and issubclass(o, str) and issubclass(o, Enum) else o
        for o in options
    ]
    inner = [
        str if typing.get_origin(o) is typing.Literal else o
        for o in inner
        if o is not types.NoneType
    ]
    if len(inner) != 1 or inner[0] not in _TYPES:
        raise TypeError(
            f"{row_type.__name__}.{name}: a row holds str, int, float or bool (or | None), not"
            f" {hint}."
        )
    return pa.field(name, _TYPES[inner[0]], nullable=types.NoneType in options)


def rows_to_table(rows: Sequence[Any], row_type: type) -> pa.Table:
    """One table row a dataclass instance. NaN is stored as null.

    Raises ValueError for null in a column without `| None`, TypeError for a value of another type.
    """
    columns = []
    for field in schema_of(row_type):
        values = [getattr(row, field.name) for row in rows]
        if field.type == pa.float64():
            # a numpy NaN is a NaN from here on
            values = [None if v is None else float(v) for v in values]
            values = [None if missing(v) else v for v in values]
        if field.type == pa.int64():
            # a float would be cut off silently
            values: list[Any] = [None if v is None else operator.index(v) for v in values]
        if not field.nullable and any(v is None for v in values):
            raise ValueError(f"{row_type.__name__}.{field.name} may not be None (or NaN).")
        columns.append(_column(field.name, values, field.type, field.nullable))
    return _assemble(columns)


def mappings_to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One table row a mapping; columns are the keys in order of first use, a missing key is
    null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return _assemble([_column(name, [row.get(name) for row in rows], None, True) for name in names])


def frame_to_table(frame: pd.DataFrame) -> pa.Table:
    """A frame without its index, null where pandas has none."""
    columns = []
    for name, series in frame.items():
        try:
            array = pa.Array.from_pandas(series)
            columns.append((pa.field(str(name), array.type), array))
        except UnicodeEncodeError:
            columns.append(
                _column(str(name), [None if missing(v) else v for v in series], pa.string(), True)
            )
    return _assemble(columns)


def _column(
    name: str, values: list, type_: pa.DataType | None, nullable: bool
) -> tuple[pa.Field, pa.Array]:
    try:
        array = pa.array(values, type_)
        return pa.field(name, array.type, nullable), array
    except UnicodeEncodeError:
        encoded = [None if v is None else v.encode(*_SURROGATES) for v in values]
        return pa.field(name, pa.binary(), nullable, metadata=_PASSED), pa.array(
            encoded, pa.binary()
        )


def _assemble(columns: list[tuple[pa.Field, pa.Array]]) -> pa.Table:
    return pa.Table.from_arrays(
        [array for _, array in columns], schema=pa.schema([field for field, _ in columns])
    )


def to_bytes(
    table: pa.Table, compression: str = "zstd", footer: Mapping[str, str] | None = None
) -> bytes:
    """The parquet file: the same table gives the same bytes. `footer`: what to say beside it, in a
    file that is read whole and in a third less time without dictionaries and statistics."""
    sink, plain = pa.BufferOutputStream(), footer is None
    with pq.ParquetWriter(
        sink, table.schema, compression=compression, use_dictionary=plain, write_statistics=plain
    ) as writer:
        writer.write_table(table)
        if footer is not None:
            writer.add_key_value_metadata(dict(footer))
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a parquet file, or those of its `columns` that there are."""
    # read_table takes twice as long for small files
    file = pq.ParquetFile(pa.BufferReader(data))
    return file.read(columns=None if columns is None else list(columns), use_threads=False)


def seal(frame: pd.DataFrame) -> bytes:
    """The parquet file of a table, which carries the checksum of what it says."""
    return seal_table(frame_to_table(frame))


def seal_table(table: pa.Table) -> bytes:
    """The same of pyarrow's tables."""
    sealed = {**(table.schema.metadata or {}), _SEAL: content_sha256(table).encode("ascii")}
    return to_bytes(table.replace_schema_metadata(sealed))


def unseal(path: Path | str) -> pd.DataFrame:
    """The table in a file, checked; one that an earlier release wrote has no checksum and is taken
    as it is. Raises Damaged, FileNotFoundError."""
    data = files.read(path)
    _checked(data, path)
    return pd.read_parquet(io.BytesIO(data))


def unseal_table(path: Path | str) -> pa.Table:
    """The same as pyarrow has it."""
    return _checked(files.read(path), path)


def _checked(data: bytes, path: Path | str) -> pa.Table:
    try:
        table = from_bytes(data)
        stored = (table.schema.metadata or {}).get(_SEAL)
        if stored is None or stored.decode("ascii") == content_sha256(table):
            return table
        why = "its checksum is not that of its content"
    except (pa.ArrowException, OSError, ValueError):
        why = "it cannot be read as a table"
    raise Damaged(path, why, "Type: auditgap report DIR, with the folder that it lies in.")


def stored_sha256(path: Path | str) -> str:
    """`content_sha256` of the table in a file, as it is there. Raises what pyarrow raises."""
    return content_sha256(from_bytes(files.read(path)))


def to_base64(table: pa.Table | None) -> str | None:
    """A table as text, for a JSON document."""
    return None if table is None else base64.b64encode(to_bytes(table)).decode("ascii")


def from_base64(text: str | None) -> pa.Table | None:
    """The inverse. Raises ValueError, pyarrow's errors."""
    return None if text is None else from_bytes(base64.b64decode(text, validate=True))


def content_sha256(table: pa.Table) -> str:
    """SHA-256 of what a table says (columns, types, values), however it is encoded."""
    what = [(field.name, str(field.type)) for field in table.schema]
    values = json.dumps([what, table.to_pylist()], default=_text_of)
    return hashlib.sha256(values.encode("ascii")).hexdigest()


def _text_of(value: Any) -> str:
    return value.decode(*_SURROGATES) if isinstance(value, bytes) else str(value)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """A frame whose dtypes depend on the schema alone: nullable int → float64 with NaN, nullable
    bool → object with None."""
    columns = {}
    for field in table.schema:
        column = table.column(field.name)
        if (field.metadata or {}).get(b"text") == _PASSED[b"text"]:
            values = [None if v is None else v.decode(*_SURROGATES) for v in column.to_pylist()]
            columns[field.name] = pd.Series(values, dtype=object)
        elif pa.types.is_string(field.type):
            columns[field.name] = pd.Series(_shared(column), dtype=object)
        elif field.nullable and pa.types.is_boolean(field.type):
            columns[field.name] = pd.Series(column.to_pylist(), dtype=object)
        elif field.nullable and pa.types.is_integer(field.type):
            columns[field.name] = column.cast(pa.float64()).to_pandas()
        else:
            columns[field.name] = column.to_pandas()
    return pd.DataFrame(columns, columns=table.schema.names)


def _shared(column: pa.ChunkedArray) -> np.ndarray:
    """A text column's values, None for null, equal ones as one object: a table repeats few words in
    many rows."""
    parts = [np.empty(0, dtype=object)]
    for chunk in column.chunks:
        encoded = chunk.dictionary_encode()
        words = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
        parts.append(words[encoded.indices.fill_null(len(words) - 1).to_numpy()])
    return np.concatenate(parts)


def rows_of(frame: pd.DataFrame, *, plain: bool = False) -> list[Document]:
    """The rows, each a mapping by column. `plain`: what is null is None, whatever a column's own
    null is."""
    if plain:
        frame = frame.astype(object).where(frame.notna(), None)
    return frame.to_dict("records")  # pyright: ignore[reportReturnType] - a column of ours has a name, not just any hashable


def groups_of(
    frame: pd.DataFrame, by: Sequence[str], *, sort: bool = False
) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """(the values of `by`, the rows that have them), in the order of first appearance unless
    `sort`."""
    for values, rows in frame.groupby(list(by), sort=sort):
        yield tuple(values), rows


def to_csv(frame: pd.DataFrame) -> str:
    """CSV with full precision; text that a spreadsheet would run as a formula gets a leading
    apostrophe."""

    def inert(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

    texts = {
        str(name): column.map(inert)
        for name, column in frame.items()
        if not pd.api.types.is_numeric_dtype(column)
    }
    return frame.assign(**texts).to_csv(index=False, lineterminator="\n")


def to_markdown(frame: pd.DataFrame) -> str:
    """A pipe table, values as they are stored, nothing where there is none; no name draws a column,
    a tag or a link."""

    def cell(value: Any) -> str:
        text = (
            ""
            if missing(value)
            else re.sub(r"([\\|<>\[\]`])", r"\\\1", str(value).replace("\n", " "))
        )
        return "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
        )

    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1]]
    lines += [
        [cell(value) for value in row] for row in frame.astype(object).itertuples(index=False)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
