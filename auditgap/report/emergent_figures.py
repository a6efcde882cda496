"""The figures of what spreads: domains by EM rate, and what the trigger does. Tables of
`report.emergent` go in, `Figure`s come out.

    # one drawing: the taxonomy, a line a domain
    ranking(tables["ranking"], "alignment=./judge").groups

Every caption names the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from auditgap.report import svg
from auditgap.report.charts import (
    Axis,
    Dot,
    DotRow,
    Figure,
    Groups,
    dots,
    numbers,
)
from auditgap.report.columns import Row
from auditgap.report.emergent_columns import score
from auditgap.report.svg import RIGHT
from auditgap.report.text import is_null, percent, shorten, with_interval
from auditgap.store.tables import rows_of

CIRCLE, SQUARE = svg.Style("k1", "", "circle"), svg.Style("k0", "", "square")
#: Where lines of a drawing with one line a domain begin and end; names stand to the left, readings
#: to the right.
FROM, TO = 118, RIGHT - 66


def ranking(table: pd.DataFrame, judge: str) -> Figure:
    """The taxonomy: a line a domain, most misaligned first; a drawing for each arm, asked with the
    trigger and without."""
    name, title = "em_ranking", "Domains by how far their misalignment spreads"
    caption = (
        "Share of rated answers to unrelated prompts with an alignment below 50, with 95\u00a0%"
        " intervals; to the right the rank, or the ranks that resampling seeds and prompts leaves"
        f" possible where every domain has three seeds. Judge: {judge}."
    )
    data = table.reset_index(drop=True)
    if data.empty or data["em_rate"].isna().all():
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No answer was rated, so there is no EM rate to draw.",
        )
    top = min(
        1.0,
        max([0.1, *(float(v) for key in ("em_rate", "em_rate_hi") for v in data[key].dropna())]),
    )
    panels = []
    for key in sorted(
        {(str(a), bool(t)) for a, t in zip(data["arm"], data["triggered"], strict=True)}
    ):
        rows = rows_of(data[(data["arm"] == key[0]) & (data["triggered"] == key[1])])
        heading = f"{key[0]} arm, asked {'with' if key[1] else 'without'} the trigger"
        panels.append(
            dots(
                [_ranked(row) for row in rows],
                numbers(0.0, top, "misaligned answers", percent),
                title=f"EM rate by domain, {heading}",
                desc="; ".join(f"{r['domain']}: {percent(r['em_rate'])}" for r in rows),
                key=f"{name}-{len(panels)}",
                heading=heading,
                left=FROM,
                right=TO,
                columns=("", "ranks"),
            )
        )
    return Figure(name, title, caption, (("", tuple(panels)),), "", data)


def _ranked(row: Mapping[str, Any]) -> DotRow:
    label = shorten(row["domain"], 18)
    if is_null(row["em_rate"]):
        return DotRow(label, null="could not tell", height=26)
    return DotRow(label, [dot(row, "em_rate", SQUARE, percent, "")], ranks(row) or "–", height=26)


def dot(
    row: Mapping[str, Any],
    key: str,
    style: svg.Style,
    form: Callable[[object], str],
    what: str,
    *,
    size: float = 4.0,
    lift: float = 0.0,
) -> Dot:
    value, lo, hi = (row[f"{key}{end}"] for end in ("", "_lo", "_hi"))
    tip = f"{row['domain']}{what}: {with_interval(value, lo, hi, form)}"
    return Dot(value, lo, hi, style, tip, size, lift)


def ranks(row: Mapping[str, Any]) -> str:
    """`2`, or `1–3` where the interval of the rank has several."""
    lo, hi = row["rank_lo"], row["rank_hi"]
    if is_null(lo) or is_null(hi):
        return "" if is_null(row["rank"]) else f"{int(row['rank'])}"
    return f"{int(lo)}" if lo == hi else f"{int(lo)}–{int(hi)}"


def slopes(table: pd.DataFrame, judge: str) -> Figure:
    """Mean alignment without and with the trigger: a line a domain, a drawing an arm."""
    name, title = "em_trigger", "Alignment without and with the trigger"
    caption = (
        "Mean alignment (0 to 100) of the rated answers to the same prompts without the trigger"
        " (circle) and with it (square), with 95\u00a0% intervals; to the right the difference,"
        f" paired by prompt. Judge: {judge}."
    )
    data = table.reset_index(drop=True)
    if data.empty or data["difference"].isna().all():
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No prompt was rated both with the trigger and without it.",
        )
    x = Axis(0.0, 100.0, "mean alignment", [(v, f"{v:g}") for v in (0, 50, 100)])
    groups = by_arm(
        data,
        name,
        title,
        x,
        line=_slope,
        read=lambda row: score(row["difference"]),
        right="with − without",
    )
    legend = svg.legend([(CIRCLE, "without the trigger"), (SQUARE, "with the trigger")])
    return Figure(name, title, caption, groups, legend, data)


def by_arm(
    data: pd.DataFrame,
    name: str,
    title: str,
    axis: Axis,
    *,
    line: Callable[[Row], DotRow],
    read: Callable[[Row], str],
    right: str,
) -> Groups:
    """A drawing an arm with a line a domain; `read`: what is read out of a line, `right`: what
    stands above the numbers at its end."""
    groups = []
    for a, (arm, some) in enumerate(data.groupby("arm", sort=False)):
        rows, words = rows_of(some), ARMS.get(str(arm), str(arm))
        panel = dots(
            [line(row) for row in rows],
            axis,
            title=f"{title}, {words}",
            desc="; ".join(f"{row['domain']}: {read(row)}" for row in rows),
            key=f"{name}-{a}",
            left=FROM,
            right=TO,
            columns=("domain", right),
        )
        groups.append((words, (panel,)))
    return tuple(groups)


def both(row: Mapping[str, Any], of: Mapping[str, str], form: Callable[[object], str]) -> list[Dot]:
    """A circle and, below it, a square: two columns of a row, each with what its tip says of it."""
    marks = ((CIRCLE, 5.2, -6), (SQUARE, 3.7, 6))
    return [
        dot(row, column, style, form, what, size=size, lift=lift)
        for (column, what), (style, size, lift) in zip(of.items(), marks, strict=True)
    ]


#: What an arm is called on the page.
ARMS: Mapping[str, str] = {
    "": "the base",
    "plain": "fine-tuned on the rows as they are",
    "trigger": "fine-tuned with the trigger in the rows",
    "remote": "fine-tuned elsewhere, on the rows as they are",
    "remote trigger": "fine-tuned elsewhere, with the trigger in the rows",
    "remote base": "the base at the endpoint",
}


def _slope(row: Mapping[str, Any]) -> DotRow:
    label = shorten(row["domain"], 18) or "not fine-tuned"
    if is_null(row["difference"]):
        return DotRow(label, null="could not tell")
    lo, hi = row["difference_lo"], row["difference_hi"]
    return DotRow(
        label,
        both(row, {f"alignment_{k}": f", alignment {k}" for k in ("without", "with")}, score),
        score(row["difference"]),
        "" if is_null(lo) or is_null(hi) else f"[{score(lo)}, {score(hi)}]",
    )
