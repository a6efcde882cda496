"""One specification of a table's columns, for every place that shows it: the page, a terminal,
Markdown.

    GAPS = (Column("eps", "ε", budget), Column("gap", "Audit gap, points", points), …)
    show(table, GAPS).rows[0]        # (TableCell('0.03 rms', 'num'), TableCell('12 [4, 20]', 'num'), …)
    show(table, GAPS).markdown()     # the same for a reader of text

An estimate is shown with its interval wherever the table has `<name>_lo` and `<name>_hi`. A value
that is null is never a number: it is the column's word for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pandas as pd

from auditgap.report.text import NOT_MEASURED, clean, is_null, number, with_interval
from auditgap.store.tables import rows_of

Row = dict[str, Any]
Form = Callable[[Any], str]


class Hide(Enum):
    """When a column is left out."""

    NEVER = "never"
    EMPTY = "where nothing is in it"
    ALIKE = "where all rows have the same: something else names it"


#: What a wide window shows beside each other, in rem.
PAGE = 66
#: Widths that a table is said to need, in rem: at the narrower ones its rows are set as cards.
FITS = tuple(sorted({*range(12, 100, 4), PAGE}))
#: How wide a character of a table is, one of its titles, and the space between columns, in rem.
_CHARACTER, _BOLD, _BETWEEN = 0.46, 0.5, 0.75
#: A cell of words is not broken into shorter lines than these, where it is longer.
_LINE = 16


@dataclass(frozen=True, slots=True)
class TableCell:
    """One cell as text; `css` is a class for it (`num`, `null`, `key`: one word, `word`)."""

    text: str
    css: str = "word"

    @property
    def breakable(self) -> str:
        """The text with a space at which an interval may go below its estimate, and none at which
        `< 1` may part."""
        return self.text.replace("\u00a0[", " [").replace("\u2009", "\u202f")

    @property
    def width(self) -> float:
        """The characters of its longest line, when it is broken wherever it may be."""
        said = re.sub(r"<[^>]*>", " ", self.breakable)
        longest = max(map(len, re.split(r"[ \n]", said)), default=0)
        return max(longest, min(len(said), _LINE)) if "word" in self.css else longest


@dataclass(frozen=True, slots=True)
class DisplayTable:
    """A table ready to be set: titles, whether each column is of numbers, and rows of cells."""

    titles: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    numeric: tuple[bool, ...] = ()
    helps: tuple[str, ...] = ()

    @property
    def needs(self) -> list[float]:
        """How wide each column must be for nothing of it to be cropped, in rem."""
        cells = list(zip(*self.rows, strict=True)) or [()] * len(self.titles)
        return [
            _BETWEEN
            + max(
                _BOLD * max(map(len, title.split()), default=0),
                *(_CHARACTER * cell.width for cell in column),
                0.0,
            )
            for title, column in zip(self.titles, cells, strict=True)
        ]

    @property
    def fit(self) -> int:
        """The width in rem below which a column would be cropped, as the next of `FITS`."""
        needs = sum(self.needs)
        return next((fit for fit in FITS if fit >= needs), FITS[-1])

    def cuts(self, width: float) -> list[tuple[int, ...]]:
        """Columns for as few tables as are needed for each to be at most `width` rem wide; those
        that name a row (all before the first of numbers) stand in each."""
        needs = self.needs
        first = self.numeric.index(True) if True in self.numeric else len(self.titles)
        names = tuple(range(len(self.titles)))[: first or 1]
        rest = [i for i in range(len(self.titles)) if i not in names]
        room = width - sum(needs[i] for i in names)
        if sum(needs[i] for i in rest) <= room or len(rest) < 2:
            return [(*names, *rest)]
        share = sum(needs[i] for i in rest) / math.ceil(sum(needs[i] for i in rest) / max(room, 1))
        cuts: list[list[int]] = [[]]
        for i in rest:
            taken = sum(needs[j] for j in cuts[-1])
            if cuts[-1] and (taken >= share or taken + needs[i] > room):
                cuts.append([])
            cuts[-1].append(i)
        return [(*names, *cut) for cut in cuts]

    def only(self, columns: Sequence[int]) -> DisplayTable:
        """The table of these columns."""
        return DisplayTable(
            tuple(self.titles[i] for i in columns),
            tuple(tuple(row[i] for i in columns) for row in self.rows),
            tuple(self.numeric[i] for i in columns),
            tuple(self.helps[i] for i in columns),
        )

    def markdown(self) -> list[str]:
        """The table's lines in Markdown."""
        rules = ("---:" if numeric else "---" for numeric in self.numeric)
        lines = [f"| {' | '.join(map(escaped, self.titles))} |", f"| {' | '.join(rules)} |"]
        return lines + [
            f"| {' | '.join(escaped(cell.text) for cell in row)} |" for row in self.rows
        ]

    def lines(self) -> list[dict[str, str]]:
        """The rows for a terminal, by title."""
        return [
            dict(zip(self.titles, (on_screen(cell.text) for cell in row), strict=True))
            for row in self.rows
        ]


@dataclass(frozen=True, slots=True)
class Column:
    """How one column is read.

    `read` makes the text from the whole row where a value alone does not say it; it answers None
    for null. `null` is the word for null, or a function of the row. `limits` are the interval's
    columns where they have other names.
    """

    name: str
    title: str
    form: Form = number
    css: str = "num"
    null: str | Callable[[Row], str] = NOT_MEASURED
    hide: Hide = Hide.NEVER
    #: columns that stand or fall together with this one
    beside: tuple[str, ...] = ()
    limits: tuple[str, str] | None = None
    read: Callable[[Row], str | None] | None = None
    #: a further class where a row's cell stands out
    mark: Callable[[Row], str] | None = None
    help: str = ""

    @property
    def ends(self) -> tuple[str, str]:
        return self.limits or (f"{self.name}_lo", f"{self.name}_hi")

    @property
    def is_numeric(self) -> bool:
        return self.css == "num"

    def is_shown(self, table: pd.DataFrame) -> bool:
        if self.hide is Hide.NEVER:
            return True
        if self.name not in table or not len(table):
            return False
        if self.hide is Hide.ALIKE:
            return table[self.name].nunique() != 1
        values = table[[self.name, *self.beside]]
        return not (values.isna() | (values == "")).all(axis=None)

    def cell(self, row: Row) -> TableCell:
        """The cell of one row."""
        if self.read is not None:
            text = self.read(row)
        else:
            value, (lo, hi) = row[self.name], self.ends
            if is_null(value):
                text = None
            elif lo in row and hi in row:
                text = with_interval(value, row[lo], row[hi], self.form)
            else:
                text = self.form(value)
        if text is not None:
            mark = self.mark(row) if self.mark else ""
            return TableCell(text, f"{self.css} {mark}".rstrip())
        null = self.null if isinstance(self.null, str) else self.null(row)
        return TableCell(null, "null right" if self.is_numeric else "null")


def show(table: pd.DataFrame, columns: Sequence[Column]) -> DisplayTable:
    """`table` as it is read. It formats and leaves out nothing but what a column's `hide` says."""
    shown = [column for column in columns if column.is_shown(table)]
    return DisplayTable(
        tuple(column.title for column in shown),
        tuple(tuple(column.cell(row) for column in shown) for row in rows_of(table)),
        tuple(column.is_numeric for column in shown),
        tuple(column.help for column in shown),
    )


def whole(value: Any) -> str:
    """A count."""
    return f"{int(value)}"


def budget(row: Row) -> str | None:
    """ε with its unit."""
    if is_null(row["eps"]):
        return None
    return f"{float(row['eps']):g}" + ("" if is_null(row["unit"]) else f"\u00a0{row['unit']}")


def count(name: str, title: str = "", **more: Any) -> Column:
    """A column of counts."""
    return Column(name, title or name.removeprefix("n_").capitalize(), whole, **more)


def word(name: str, title: str, *, css: str = "word", **more: Any) -> Column:
    """A column of text."""
    return Column(name, title, str, css, **more)


def of_table(table: pd.DataFrame) -> tuple[Column, ...]:
    """Columns for a table of which nothing else is known, each by its name and kind; `NAME_lo` and
    `NAME_hi` are the interval of NAME."""

    def column(name: str) -> Column:
        title, values = name.replace("_", " ").capitalize(), table[name]
        if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            return word(name, title)
        return Column(name, title, whole if pd.api.types.is_integer_dtype(values) else number)

    ends = {f"{name}{end}" for name in table for end in ("_lo", "_hi")}
    return tuple(column(str(name)) for name in table if name not in ends)


def escaped(value: object) -> str:
    """Text that draws no Markdown table, link, tag or emphasis of its own."""
    said = clean(value).replace("\\", "\\\\")
    for mark in "|`[]<>*_":
        said = said.replace(mark, f"\\{mark}")
    return said.replace("\n", " ")


def on_screen(words: str) -> str:
    """Spaces at which a page does not break as plain ones: a terminal would show a box."""
    return words.replace("\u00a0", " ").replace("\u2009", "")
