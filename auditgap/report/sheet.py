"""A DataFrame as it is read: columns titled, estimates joined with their intervals, nulls as words.

    sheet(lvs_table(rows)).rows[0]
    -> (Cell('smollm2'), Cell('block15'), Cell('0.03 rms'), …, Cell('4.914 [3.200, 6.830]'), Cell('not measured', null=True))

It formats and leaves out nothing but the columns it joins. Unknown columns are shown under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from auditgap.report.text import NOT_MEASURED, UNSCORED, is_null, number, percent, plain, points, with_interval

#: Estimates whose limits are not named `<estimate>_lo` and `<estimate>_hi`.
_LIMITS: Mapping[str, tuple[str, str]] = {
    "lvs_rel_mean": ("lvs_rel_lo", "lvs_rel_hi"),
    "delta_vs_matched": ("delta_lo", "delta_hi"),
}
TITLES: Mapping[str, str] = {
    "subject": "Subject", "site": "Site", "budget": "ε", "eps": "ε", "attack": "Attack", "n": "n", "n_unscored": "Unscored",
    "n_broken": "Broken", "lvs_mean": "LVS, mean", "lvs_median": "LVS, median", "lvs_rel_mean": "LVS rel., mean", "asr": "ASR",
    "asr_envelope": "ASR envelope", "delta_vs_matched": "Attack − matched, points", "relative_norm_median": "‖δ‖/‖h‖, median",
    "flag": "Flags", "safety": "Behaviourally safe", "robustness": "Robust", "gap": "Audit gap, points", "worst_site": "Worst site",
    "label": "Verdict", "reason": "Reason", "count": "Count", "median": "Median ε", "n_censored": "Never harmful",
    "n_collapsed": "Turned harmful", "n_events": "Turned harmful", "n_prompts": "Prompts", "rate": "Share", "source": "Source",
}  # fmt: skip
_SHARES = ("asr", "asr_envelope", "safety", "robustness", "survival", "rate", "share", "compliance")
_SHARE_ENDS = ("_rate", "_share", "_asr")
_POINTS = ("gap", "delta_vs_matched")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell as text; `css` is a class for it (`num`, `null`, `word`)."""

    text: str
    css: str = "word"


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table ready to be set: titles and rows of cells."""

    titles: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def sheet(table: pd.DataFrame, titles: Mapping[str, str] | None = None, censored: str = NOT_MEASURED) -> Sheet:
    """`table` as text. `censored` is the word for a median that too few prompts reached."""
    titles = {**TITLES, **(titles or {})}
    limits = {c: _limits(c, table.columns) for c in table.columns}
    joined = {name for pair in limits.values() if pair for name in pair}
    shown = [c for c in table.columns if c not in joined and c not in ("layer_index", "unit")]
    if "unit" in table.columns and "eps" not in table.columns:
        shown.append("unit")
    rows = tuple(tuple(_cell(c, row, limits[c], censored) for c in shown) for row in table.to_dict("records"))
    return Sheet(tuple(titles.get(str(c), str(c).replace("_", " ")) for c in shown), rows)


def _limits(column: Any, columns: Any) -> tuple[str, str] | None:
    lo, hi = _LIMITS.get(column, (f"{column}_lo", f"{column}_hi"))
    return (lo, hi) if lo in columns and hi in columns else None


def _form(column: str) -> Any:
    if column in _POINTS:
        return lambda value: points(value, unit="")
    if column in _SHARES or column.endswith(_SHARE_ENDS):
        return percent
    return number


def _cell(column: str, row: Mapping[str, Any], limits: tuple[str, str] | None, censored: str) -> Cell:
    value = row[column]
    if is_null(value):
        if column == "site" and "attack" in row:
            return Cell("none (clean)", "null")
        if column == "delta_vs_matched" and row.get("attack") != "targeted":
            return Cell("does not apply", "null")
        if column in ("flag", "flags"):
            return Cell("")
        if column.startswith("median") and "n_censored" in row:
            return Cell(censored, "null")
        if column.startswith("lvs") and row.get("n_unscored") and not row.get("n", 1) - row["n_unscored"] > 0:
            return Cell(UNSCORED, "null")
        return Cell(NOT_MEASURED, "null")
    if column == "eps":
        unit = row.get("unit")
        return Cell(f"{float(value):g}" + ("" if is_null(unit) else f"\u00a0{unit}"), "num")
    if limits:
        return Cell(with_interval(value, row[limits[0]], row[limits[1]], _form(column)), "num")
    if isinstance(value, bool) or isinstance(value, str):
        return Cell(plain(value))
    if isinstance(value, (int, float)) or hasattr(value, "dtype"):
        whole = column.startswith("n_") or column in ("n", "count", "draw") or (isinstance(value, int))
        return Cell(f"{int(value)}" if whole else _form(column)(value), "num")
    return Cell(plain(value))
