"""The figure of what subjects said when they were asked: a dot a subject, by kind and source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import svg
from auditgap.report.behaviour import ALL, KINDS
from auditgap.report.charts import Dot, DotRow, Figure, dots, shares
from auditgap.report.svg import SUBJECT_STYLES
from auditgap.report.text import is_null, percent, shorten, with_interval
from auditgap.store.tables import rows_of

#: What is drawn of each kind of prompt, each a drawing.
_ASKED = (
    ("harmful", "refusal"),
    ("jailbreak", "refusal"),
    ("over_refusal", "refusal"),
    ("over_refusal", "answered"),
    ("benign", "refusal"),
    ("benign", "answered"),
)
_VERB = {"refusal": "refuses", "answered": "answers"}


def by_source(table: pd.DataFrame) -> Figure:
    """Refusals (and answers to harmless requests) by kind and source: a dot a subject with its 95 %
    interval.

    Takes a `behaviour.behaviour_table`. One drawing a kind and share, its sources below one
    another, subjects in each.
    """
    name, title = "behaviour_by_source", "Refusals and answers by kind of request and source"
    caption = (
        "A dot a subject with its Wilson 95\u00a0% interval over prompts; the scale runs from none"
        " to all of the prompts."
    )
    data = _asked_shares(table)
    if data.empty or data["share"].isna().all():
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No refusal was measured, so there is nothing to draw by source.",
        )
    subjects = list(dict.fromkeys(data["subject"]))
    styles = {subject: SUBJECT_STYLES[i % 8] for i, subject in enumerate(subjects)}
    panels = []
    for kind, share in _ASKED:
        rows = data[(data["kind"] == kind) & (data["measure"] == share)]
        if len(rows):
            panels.append(
                _source_panel(
                    rows, styles, f"{_VERB[share]}: {KINDS[kind]}", f"{name}-{len(panels)}"
                )
            )
    legend = svg.legend((styles[s], s) for s in subjects) if len(subjects) > 1 else Markup("")
    return Figure(name, title, caption, (("", tuple(panels)),), legend, data)


def _asked_shares(table: pd.DataFrame) -> pd.DataFrame:
    """The table's shares that are drawn, a row each."""
    records = [
        {
            "subject": row["subject"],
            "kind": kind,
            "source": row["source"],
            "measure": share,
            "n": row["n"],
            "share": row[share],
            "share_lo": row[f"{share}_lo"],
            "share_hi": row[f"{share}_hi"],
        }
        for kind, share in _ASKED
        for row in rows_of(table)
        if row["kind"] == kind
    ]
    return pd.DataFrame(
        records,
        columns=["subject", "kind", "source", "measure", "n", "share", "share_lo", "share_hi"],
    )


def _source_panel(
    rows: pd.DataFrame, styles: Mapping[str, svg.Style], heading: str, key: str
) -> Markup:
    sources = sorted(dict.fromkeys(rows["source"]), key=lambda s: s != ALL)
    lines, said = [], []
    for source in sources:
        some = {row["subject"]: row for row in rows_of(rows[rows["source"] == source])}
        words = "all sources" if source == ALL else shorten(source, 40)
        n = max(int(row["n"]) for row in some.values())
        css = "heading" if source == ALL else "tick"
        lines.append(DotRow(f"{words}, n = {n}", height=23, css=css))
        lines += _subjects(some, styles)
        said += [f"{words}, {subject}: {percent(row['share'])}" for subject, row in some.items()]
    return dots(
        lines,
        shares("of prompts"),
        title=heading.capitalize(),
        desc="; ".join(said),
        key=key,
        heading=heading,
    )


def _subjects(
    some: Mapping[str, Mapping[str, Any]], styles: Mapping[str, svg.Style]
) -> Iterator[DotRow]:
    for subject, style in styles.items():
        row = some.get(subject)
        if row is None or is_null(row["share"]):
            yield DotRow("", null="not asked" if row is None else "could not tell", height=11)
            continue
        ends = (row["share"], row["share_lo"], row["share_hi"])
        tip = f"{subject}, {row['source']}: {with_interval(*ends, percent)}, n = {row['n']}"
        yield DotRow("", [Dot(*ends, style, tip, size=3.2)], height=11)
