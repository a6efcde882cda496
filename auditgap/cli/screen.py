"""The two streams and what is written on them: tables, JSON, lines; everything shown is data, so no
markup is read.

    print_table([{"site": "mid", "LVS": "1.20"}])
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import category

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from auditgap.config import overrides
from auditgap.errors import PartlyFailed, UsageError


class Screen(Console):
    """A console on which text is only text: whatever name it holds, nothing that a terminal would
    obey goes through."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(
            *(Text(inert_lines(o.plain)) if isinstance(o, Text) else o for o in objects), **options
        )

    def on_broken_pipe(self) -> None:
        """The reader has left, as `head` does: the command goes on unheard and its exit code is its
        own. rich would end it with 1, which is a verdict here."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


out = Screen(highlight=False, soft_wrap=False)
err = Screen(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line, or several, of the answer."""
    out.print(Text(text))


def note(text: str) -> None:
    """A line beside the answer, on stderr."""
    err.print(Text(text))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the first one's columns. On a terminal that is too narrow for the words of all
    columns, what all rows agree in stands above them; on one that still is, each row is a list."""
    if not rows:
        out.print("Nothing to list.")
        return
    columns = {inert(name): [inert(str(row[name])) for row in rows] for name in rows[0]}
    shared = [name for name, values in columns.items() if len(set(values)) == 1]
    if _width(_least(columns)) > out.width and len(rows) > 1 and len(shared) < len(columns):
        for name in shared:
            _pair(name, columns.pop(name)[0])
    records = list(zip(*columns.values(), strict=True))
    if _width(_least(columns)) <= out.width:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, width in _widths(columns, out.width).items():
            table.add_column(Text(name), width=width, overflow="fold")
        for record in records:
            table.add_row(*map(Text, record))
        out.print(table)
        return
    for i, record in enumerate(records):
        if i:
            out.print()
        for name, value in zip(columns, record, strict=True):
            _pair(name, value)


def _pair(name: str, value: str) -> None:
    out.print(Text.assemble((f"{name}: ", "bold"), value))


def _least(columns: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Each column's longest word in characters. One that takes more than a quarter of the terminal,
    such as a path, may be broken: it would turn a long table into lists."""
    most = max(12, out.width // 4)
    return {
        name: min(max(map(cell_len, f"{name} {' '.join(values)}".split()), default=0), most)
        for name, values in columns.items()
    }


def _width(widths: Mapping[str, int]) -> int:
    """A table's characters in a line: two between columns."""
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _widths(columns: Mapping[str, Sequence[str]], room: int) -> dict[str, int]:
    """Characters for each column: its longest word at least, and of what is left its longest value,
    those first that lack least of it."""
    widths = _least(columns)
    lacks = {
        name: max(map(cell_len, [name, *values])) - widths[name] for name, values in columns.items()
    }
    left = room - _width(widths)
    for name, lack in sorted(lacks.items(), key=lambda pair: pair[1]):
        widths[name] += min(lack, left)
        left -= min(lack, left)
    return widths


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str, ensure_ascii=True))


def answer(as_json: bool, text: str, **document: Any) -> None:
    """The last word of a command: a text, or what it says as JSON."""
    print_json(document) if as_json else say(text)


def interval(value: Any, lo: Any, hi: Any, form: str = ".2f") -> str:
    """An estimate with its interval, as far as there is one; `form`: of each number."""
    import pandas as pd

    if pd.isna(value):
        return "could not tell"
    if pd.isna(lo) or pd.isna(hi):
        return f"{value:{form}}"
    return f"{value:{form}} [{lo:{form}}, {hi:{form}}]"


def inert(text: str) -> str:
    """Without what a terminal would obey; the page's spaces that do not break are plain ones."""
    return "".join(c if c.isprintable() else " " if category(c) == "Zs" else "\ufffd" for c in text)


def inert_lines(text: str) -> str:
    return "\n".join(map(inert, text.splitlines()))


def given(pairs: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """What was typed: `--set KEY=VALUE` pairs, and over them the options that have a value. Raises
    UsageError for no pair."""
    return {
        **overrides(pairs or []),
        **{name: value for name, value in options.items() if value not in (None, ())},
    }


def quiet() -> None:
    """No bars and advice of transformers between our own lines."""
    from auditgap.models import quiet as quiet_transformers

    quiet_transformers()


def confirm(question: str, yes: bool) -> None:
    """Go on only if the answer is yes. Raises UsageError where nobody can be asked, typer.Exit
    after a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to ask on; add --yes to do it.")
    if not typer.confirm(question):
        raise typer.Exit(0)


def raise_failed(failed: Mapping[str, str], where: object, planned: int | None = None) -> None:
    """Raises PartlyFailed with the first causes when cells failed."""
    if failed:
        lines = "\n".join(f"  {key}: {cause}" for key, cause in sorted(failed.items())[:10])
        of = "" if planned is None else f" of {planned}"
        raise PartlyFailed(
            f"{len(failed)}{of} cells failed, the others are in {where}; --retry-failed runs them"
            f" again:\n{lines}"
        )
