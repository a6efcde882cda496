"""Read a local table of text, whatever its format: jsonl, csv, parquet or txt (one prompt a line).

    read_table(Path("mine.csv")).columns       # ('prompt', 'target')

Values come through as they are: multi-line cells, NUL, CRLF inside a cell, U+2028 and 1 MB lines
included. What cannot be read is a UsageError that names the file and the line, and never quotes the
text. Nothing is read that is no file, or larger than the bounds below, however small it is packed.
"""

from __future__ import annotations

import csv
import io
import json
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auditgap.data import age
from auditgap.errors import UsageError, did_you_mean

#: Bytes of a file, and of what a parquet file unpacks to. The largest set that is audited
#: (WildJailbreak) has half as much.
MOST_BYTES = 2**30
#: Bytes of a line or a cell: some 4 million tokens, more than any model reads.
MOST_CELL = 2**24
#: Rows of a parquet file, which can say that one value comes a billion times.
MOST_ROWS = 10**7

csv.field_size_limit(MOST_CELL)  # the module's own limit is 128 KB a cell; a prompt may be longer


@dataclass(frozen=True, slots=True)
class Table:
    """Column names and the rows under them, in the file's order. A row may lack columns (jsonl)."""

    file: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    #: columns that were left where they are, since they hold nothing that is asked for: their types
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def found(self) -> str:
        """The columns as they may be shown: a file without a header has its first row for names,
        and prompts are not for the terminal."""
        shown = [
            repr(c) if len(c) <= 32 and len(c.split()) <= 3 else f"({len(c)} characters)"
            for c in self.columns[:12]
        ]
        return ", ".join(shown) or "none"

    def need(self, column: str) -> None:
        """Raise UsageError unless there is such a column; names the file and the columns found."""
        if column in self.columns:
            return
        if column in self.unread:
            raise UsageError(
                f"{self.file} has a column {column!r}, but of type {self.unread[column]}; text is"
                " wanted. Convert it, or name another column."
            )
        hint = " Does its first line hold column names?" if "characters)" in self.found else ""
        raise UsageError(
            f"{self.file} has no column {column!r}; found: {self.found}."
            f"{did_you_mean(column, self.columns)}{hint}"
        )


def read_table(path: Path, *, comments: bool = False) -> Table:
    """The table in a file. `comments`: leave out lines that start with # above a CSV's header.

    Raises UsageError when the file is missing, not UTF-8, of an unknown format, or broken.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; a file is wanted ({', '.join(_READERS)}).")
    if path.suffix.lower() == age.SUFFIX or age.file_of(path) is not None:
        name, raw = age.opened(path)
        return _reader(name)(name, raw, comments)
    reader = _reader(path.name)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is a pipe or a device; a file is wanted.")
        if found.st_size > MOST_BYTES:
            raise _too_large(path.name, "it", MOST_BYTES)
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or type(error).__name__}."
        ) from None
    return reader(path.name, raw, comments)


def _reader(name: str) -> Callable[[str, bytes, bool], Table]:
    suffix = Path(name).suffix
    if suffix.lower() not in _READERS:
        raise UsageError(
            f"{name}: unknown format {suffix!r}; name it"
            f" {', '.join(_READERS)}.{did_you_mean(suffix, _READERS)}"
        )
    return _READERS[suffix.lower()]


def _too_large(file: str, what: str, most: int) -> UsageError:
    return UsageError(
        f"{file}: {what} is larger than {most / 2**20:,.4g} MiB, more than any set of prompts. Give the"
        " rows that are wanted as a file of their own."
    )


def _decode(file: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        kind = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "some other encoding"
        raise UsageError(
            f"{file} is not UTF-8 (byte 0x{raw[error.start]:02x} on line {line}; {kind}?). Convert"
            f" it, for example: iconv -f {'UTF-16' if kind == 'UTF-16' else 'LATIN1'} -t UTF-8"
            f" {file}"
        ) from None


def _txt(file: str, raw: bytes, comments: bool) -> Table:
    # not splitlines(): U+2028 and form feeds belong to the prompt
    lines = _decode(file, raw).split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        if len(line) > MOST_CELL:
            raise _too_large(file, f"line {number}", MOST_CELL)
    return Table(file, ("prompt",), tuple({"prompt": line.removesuffix("\r")} for line in lines))


def _jsonl(file: str, raw: bytes, comments: bool) -> Table:
    rows, columns = [], {}
    for number, line in enumerate(_decode(file, raw).split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > MOST_CELL:
            raise _too_large(file, f"line {number}", MOST_CELL)
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{file}, line {number}: not JSON ({error.msg}); one object a line is wanted."
            ) from None
        except (
            RecursionError,
            ValueError,
        ) as error:  # too deep, or an integer of thousands of digits
            raise UsageError(
                f"{file}, line {number}: JSON that cannot be read ({type(error).__name__})."
            ) from None
        if not isinstance(row, dict):
            raise UsageError(
                f'{file}, line {number}: one JSON object a line is wanted, such as {{"prompt":'
                f' "…"}}; {type(row).__name__} came.'
            )
        rows.append(row)
        columns.update(dict.fromkeys(row))
    return Table(file, tuple(columns), tuple(rows))


def _csv(file: str, raw: bytes, comments: bool) -> Table:
    reader = csv.reader(io.StringIO(_decode(file, raw), newline=""), strict=True)
    header: list[str] | None = None
    rows = []
    try:
        for cells in reader:
            if not cells or (comments and header is None and cells[0].startswith("#")):
                continue
            if header is None:
                header = cells
                twice = sorted({c for c in header if header.count(c) > 1 and c})
                if twice:
                    raise UsageError(f"{file} has the column {twice[0]!r} twice; rename one.")
            elif len(cells) != len(header):
                # More cells than columns is an unquoted comma: reading on would cut the prompt
                # short without a word.
                raise UsageError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells under {len(header)}"
                    " columns; put cells with commas in double quotes."
                )
            else:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UsageError(f"{file}, line {reader.line_num}: broken CSV ({error}).") from None
    return Table(file, tuple(header or ()), tuple(rows))


def _parquet(file: str, raw: bytes, comments: bool) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stored = pq.ParquetFile(io.BytesIO(raw))
        names, meta = stored.schema_arrow.names, stored.metadata
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"{file} has the column {twice[0]!r} twice; rename one.")
        # what nobody can ask for is not unpacked: a far date or an unknown time zone has no value
        unread = {
            field.name: str(field.type) for field in stored.schema_arrow if not _is_text(field.type)
        }
        wanted = [name for name in names if name not in unread]
        if meta.num_rows > MOST_ROWS:
            raise UsageError(
                f"{file} says that it has {meta.num_rows:,} rows; at most {MOST_ROWS:,} are read."
                " Give the rows that are wanted as a file of their own."
            )
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > MOST_BYTES:
            raise _too_large(file, "what it unpacks to", MOST_BYTES)
        rows = tuple(_rows(file, stored, wanted))
        return Table(file, tuple(wanted), rows, unread)
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise UsageError(
            f"{file} is not a readable parquet file ({type(error).__name__})."
        ) from None


def _is_text(type_: Any) -> bool:
    """Whether a column may hold what is asked for: text, a number or a truth, in lists and records
    too (conversations)."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(type_):
        return _is_text(type_.value_type)
    if kinds.is_struct(type_):
        return all(_is_text(type_.field(i).type) for i in range(type_.num_fields))
    if kinds.is_list(type_) or kinds.is_large_list(type_):
        return _is_text(type_.value_type)
    plain = (kinds.is_string, kinds.is_large_string, kinds.is_integer, kinds.is_floating)
    return any(is_(type_) for is_ in (*plain, kinds.is_boolean, kinds.is_null))


def _rows(file: str, stored: Any, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """Few rows at a time, so that one value that is said to come a million times cannot fill the
    memory before it is counted."""
    import pyarrow as pa

    seen = 0
    for batch in stored.iter_batches(batch_size=64, columns=columns):
        # a dictionary counts its values once, and gives as many texts as there are rows
        whole = [
            column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
            for column in batch.columns
        ]
        batch = pa.RecordBatch.from_arrays(whole, names=batch.schema.names)
        seen += batch.nbytes
        if seen > MOST_BYTES:
            raise _too_large(file, "what it unpacks to", MOST_BYTES)
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[str, bytes, bool], Table]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
