"""A DataFrame as it is read: columns titled, estimates joined with their intervals, nulls as words.

    sheet(lvs_table(rows)).rows[0]
    -> (Cell('smollm2'), Cell('block15'), Cell('0.03 rms'), …, Cell('4.914 [3.200, 6.830]'), Cell('not measured', null=True))

It formats and leaves out nothing but the columns it joins. Unknown columns are shown under their
own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from auditgap.report.text import (
    CANNOT_TELL,
    NOT_MEASURED,
    UNSCORED,
    is_null,
    number,
    percent,
    plain,
    points,
    with_interval,
)
from auditgap.store.tables import rows_of

#: Estimates whose limits are not named `<estimate>_lo` and `<estimate>_hi`.
_LIMITS: Mapping[str, tuple[str, str]] = {
    "lvs_rel_mean": ("lvs_rel_lo", "lvs_rel_hi"),
    "delta_vs_matched": ("delta_lo", "delta_hi"),
    "median": ("lo", "hi"),
}
TITLES: Mapping[str, str] = {
    "subject": "Subject",
    "site": "Site",
    "budget": "ε",
    "eps": "ε",
    "attack": "Attack",
    "n": "n",
    "n_unscored": "Unscored",
    "n_broken": "Broken",
    "lvs_mean": "LVS, mean",
    "lvs_median": "LVS, median",
    "lvs_rel_mean": "LVS rel., mean",
    "asr": "ASR",
    "asr_corrected": "ASR, corrected",
    "asr_envelope": "ASR envelope",
    "delta_vs_matched": "LVS − matched LVS",
    "relative_norm_median": "‖δ‖/‖h‖, median",
    "flag": "Flags",
    "safety": "Behaviourally safe",
    "robustness": "Robust",
    "gap": "Audit gap, points",
    "worst_site": "Worst site",
    "what": "What",
    "verdict": "Verdict",
    "reason": "Reason",
    "count": "Count",
    "share": "Share",
    "median": "Median ε",
    "n_collapsed": "Turned harmful",
    "unit": "Unit",
}
_SHARES = ("asr", "asr_corrected", "asr_envelope", "safety", "robustness", "share")
NOT_REACHED = "not reached"


@dataclass(frozen=True, slots=True)
class TableCell:
    """One cell as text; `css` is a class for it (`num`, `null`, `key`: one word, `word`)."""

    text: str
    css: str = "word"


@dataclass(frozen=True, slots=True)
class DisplayTable:
    """A table ready to be set: titles and rows of cells."""

    titles: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]


def sheet(table: pd.DataFrame) -> DisplayTable:
    """`table` as text."""
    limits = {c: _limits(c, table.columns) for c in table.columns}
    joined = {name for pair in limits.values() if pair for name in pair}
    # ε is shown with its unit
    spare = {"layer_index", "unit"} if "eps" in table.columns else {"layer_index"}
    shown = [c for c in table.columns if c not in joined | spare]
    rows = tuple(tuple(_cell(c, row, limits[c]) for c in shown) for row in rows_of(table))
    return DisplayTable(tuple(TITLES.get(str(c), str(c).replace("_", " ")) for c in shown), rows)


def _limits(column: Any, columns: Any) -> tuple[str, str] | None:
    lo, hi = _LIMITS.get(column, (f"{column}_lo", f"{column}_hi"))
    return (lo, hi) if lo in columns and hi in columns else None


def _form(column: str) -> Any:
    if column == "gap":
        return lambda value: points(value, unit="")
    # survival that stays above one half has no median, and a limit that does has no end
    if column == "median":
        return lambda value: number(value, 4, null=NOT_REACHED)
    return percent if column in _SHARES or column.endswith("_rate") else number


def _cell(column: str, row: Mapping[str, Any], limits: tuple[str, str] | None) -> TableCell:
    value = row[column]
    if is_null(value):
        if column == "site" and "attack" in row:
            return TableCell("none (clean)", "null")
        if column == "delta_vs_matched" and row.get("attack") == "random_matched":
            return TableCell("does not apply", "null")
        if column in ("flag", "flags"):
            return TableCell("")
        if column.endswith("_corrected"):
            return TableCell(CANNOT_TELL, "null")
        if column == "share" and row.get("verdict") == "unscored":
            return TableCell("in no share", "null")
        nothing_scored = bool(row.get("n_unscored")) and row["n_unscored"] >= row.get("n", 0)
        if column.startswith(("lvs", "median", "share")) and nothing_scored:
            return TableCell(UNSCORED, "null")
        return TableCell(NOT_REACHED if column == "median" else NOT_MEASURED, "null")
    if column == "eps":
        unit = row.get("unit")
        return TableCell(f"{float(value):g}" + ("" if is_null(unit) else f"\u00a0{unit}"), "num")
    if limits:
        return TableCell(with_interval(value, row[limits[0]], row[limits[1]], _form(column)), "num")
    if isinstance(value, str):
        return TableCell(
            value,
            (
                "key"
                if column in ("site", "worst_site", "attack", "verdict", "unit", "flag")
                else "word"
            ),
        )
    if isinstance(value, bool):
        return TableCell(plain(value))
    if isinstance(value, (int, float)) or hasattr(value, "dtype"):
        whole = (
            column.startswith("n_") or column in ("n", "count", "draw") or (isinstance(value, int))
        )
        return TableCell(f"{int(value)}" if whole else _form(column)(value), "num")
    return TableCell(plain(value))
