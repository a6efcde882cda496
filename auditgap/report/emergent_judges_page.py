"""Where two judges part, on the page: a section of a study that several judges rated.

judges(view)     # () where one judge rated, else one section
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from auditgap.report import svg
from auditgap.report.charts import Dot, DotRow, Figure, dots, numbers
from auditgap.report.emergent_columns import (
    ARM,
    REASON,
    count,
    domain_name,
    estimate,
    given,
    score,
    two_digits,
)
from auditgap.report.emergent_values import groups
from auditgap.report.emergent_view import StudyView
from auditgap.report.section import Section
from auditgap.report.svg import RIGHT
from auditgap.report.text import is_null, percent, shorten, with_interval
from auditgap.store.tables import rows_of

JUDGES = (
    given("judge", "Judge"),
    given("other", "Beside"),
    ARM,
    given("domain", "Domain", domain_name),
    estimate("apart", "Part over below 50", percent),
    estimate("kappa", "κ", two_digits),
    estimate("difference", "Alignment, judge − other", score),
    count("n_rated", "Rated by both"),
    count("n_one", "… by one alone"),
    count("n", "Answers"),
    REASON,
)
_NOTE = (
    "Share of the answers rated by both of which one says an alignment below 50 and the other does"
    " not; κ: their agreement beyond chance. One judge’s rates differ from the other’s by no more than"
    " this share."
)


def judges(view: StudyView) -> Iterator[Section]:
    """The section; none where one judge rated."""
    table = view.data["judges"]
    if len(table):
        yield Section(
            id="em-judges",
            title="Where two judges part",
            contents="Judges",
            blocks=(
                disagreement(table),
                view.table("judges", JUDGES, "Two judges on the same answers", _NOTE),
            ),
        )


def disagreement(table: pd.DataFrame) -> Figure:
    """Share of answers over which two judges part: a line a domain, a drawing a pair and arm."""
    name, title = "em_judges", "Answers over which two judges part"
    caption = (
        "Share of answers rated by both judges of which one says an alignment below 50 and the other"
        " does not, with 95\u00a0% intervals."
    )
    data = table.reset_index(drop=True)
    if data.empty or data["apart"].isna().all():
        return Figure(name, title, caption, data=data, missing="No answer was rated by two judges.")
    top = min(1.0, max(0.1, *(float(v) for v in data["apart_hi"].dropna())))
    drawn = []
    for k, (who, rows) in enumerate(groups(data, ("judge", "other", "arm"))):
        found = rows_of(rows)
        panel = dots(
            [_line(row) for row in found],
            numbers(0.0, top, "answers over which they part", percent),
            title=f"{title}, {who['judge']} and {who['other']}",
            desc="; ".join(f"{r['domain'] or 'the base'}: {percent(r['apart'])}" for r in found),
            key=f"{name}-{k}",
            heading=f"{who['arm']} arm" if who["arm"] else "the base",
            left=118,
            right=RIGHT - 66,
        )
        drawn.append((f"{shorten(who['judge'], 40)} and {shorten(who['other'], 40)}", (panel,)))
    return Figure(name, title, caption, tuple(drawn), "", data)


def _line(row: Mapping[str, Any]) -> DotRow:
    label = shorten(row["domain"], 18) or "not fine-tuned"
    if is_null(row["apart"]):
        return DotRow(label, null="could not tell", height=26)
    lo, hi = row["apart_lo"], row["apart_hi"]
    tip = f"{label}: {with_interval(row['apart'], lo, hi, percent)}"
    dot = Dot(row["apart"], lo, hi, svg.Style("k0", "", "square"), tip)
    return DotRow(label, [dot], percent(row["apart"]), height=26)
