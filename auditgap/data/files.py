"""Read a local table of text, whatever its format: jsonl, csv, parquet or txt (one prompt a line).

    read_table(Path("mine.csv")).columns       # ('prompt', 'target')

Values come through as they are: multi-line cells, NUL, CRLF inside a cell, U+2028 and 1 MB lines
included. What cannot be read is a UsageError that names the file and the line, and never quotes the
text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError, did_you_mean

csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KB a cell; a prompt may be longer


@dataclass(frozen=True, slots=True)
class Table:
    """Column names and the rows under them, in the file's order. A row may lack columns (jsonl)."""

    file: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]

    def need(self, column: str) -> None:
        """Raise UsageError unless there is such a column; names the file and the columns found."""
        if column in self.columns:
            return
        # A file without a header would have its first row shown here as "columns": prompts are not
        # for the terminal.
        shown = [
            repr(c) if len(c) <= 32 and len(c.split()) <= 3 else f"({len(c)} characters)"
            for c in self.columns[:12]
        ]
        hint = (
            ""
            if len(shown) == sum(s.startswith("'") for s in shown)
            else " Does its first line hold column names?"
        )
        raise UsageError(
            f"{self.file} has no column {column!r}; found: {', '.join(shown) or 'none'}."
            f"{did_you_mean(column, self.columns)}{hint}"
        )


def read_table(path: Path, *, comments: bool = False) -> Table:
    """The table in a file. `comments`: leave out lines that start with # above a CSV's header.

    Raises UsageError when the file is missing, not UTF-8, of an unknown format, or broken.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; a file is wanted ({', '.join(_READERS)}).")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path.name}: unknown format {path.suffix!r}; name it"
            f" {', '.join(_READERS)}.{did_you_mean(path.suffix, _READERS)}"
        )
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or type(error).__name__}."
        ) from None
    return reader(path.name, raw, comments)


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
    return Table(file, ("prompt",), tuple({"prompt": line.removesuffix("\r")} for line in lines))


def _jsonl(file: str, raw: bytes, comments: bool) -> Table:
    rows, columns = [], {}
    for number, line in enumerate(_decode(file, raw).split("\n"), 1):
        if not line.strip():
            continue
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
        table = pq.read_table(io.BytesIO(raw))
        return Table(file, tuple(table.column_names), tuple(table.to_pylist()))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} is not a readable parquet file ({type(error).__name__})."
        ) from None


_READERS: dict[str, Callable[[str, bytes, bool], Table]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
