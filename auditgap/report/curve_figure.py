"""Harmful fine-tuning as a figure.

figure(curve_table(rows))       # compliance and refusal over steps, a line a subject with its band
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from auditgap.report import svg
from auditgap.report.charts import Axis, Figure, Series, lines, points_of, shares
from auditgap.report.curve import BENIGN, HARMFUL, THRESHOLDS
from auditgap.report.svg import SUBJECT_STYLES
from auditgap.report.text import (
    percent,
    with_interval,
)


def figure(table: pd.DataFrame, thresholds: Sequence[float] = THRESHOLDS) -> Figure:
    """Compliance and refusal over steps of harmful fine-tuning, a line a subject with its 95 %
    band, thresholds dashed.

    Takes a `curve_table`; draws its means over seeds, and over-refusal on benign prompts where
    these were asked.
    """
    name, title = "sft_curve", "Compliance and refusal under harmful fine-tuning"
    data = table[table["seed"].isna()].reset_index(drop=True)
    harmful = data[(data["split"] == HARMFUL) & data["compliance"].notna()]
    if harmful["step"].nunique() < 2:
        why = (
            "only one step was evaluated, and a curve needs two"
            if len(harmful)
            else "no step was evaluated"
        )
        return Figure(name, title, data=data, missing=f"No curve over steps: {why}.")
    subjects = list(dict.fromkeys(harmful["subject"]))
    styles = {subject: SUBJECT_STYLES[i % 8] for i, subject in enumerate(subjects)}
    benign = data[(data["split"] == BENIGN) & data["refusal"].notna()]
    drawn = [
        (harmful, "compliance", "complies", "harmful prompts", tuple(thresholds)),
        (harmful, "refusal", "refuses", "harmful prompts", ()),
        *([(benign, "refusal", "refuses", "benign prompts", ())] if len(benign) else []),
    ]
    last = float(data["step"].max())
    ticks = [(v, f"{v:g}") for v in svg.ticks(0.0, last, 6) if v == int(v)]
    panels = [
        lines(
            # the base is drawn last, over the others
            [_series(rows, column, s, styles[s]) for s in reversed(subjects)],
            Axis(0.0, last, "steps of training", ticks),
            shares(ylabel),
            title=f"{column.capitalize()} on {heading} over steps",
            desc="; ".join(
                _ends_of(rows, column, s) for s in subjects if s in set(rows["subject"])
            ),
            key=f"{name}-{k}",
            heading=heading,
            guides=guides,
        )
        for k, (rows, column, ylabel, heading, guides) in enumerate(drawn)
    ]
    caption = (
        "Mean over seeds with its 95\u00a0% band; the base’s line is the first in the legend."
        " Broken text counts as neither. "
        + (
            f"Dashed: {' and '.join(percent(t) for t in thresholds)} compliance."
            if thresholds
            else ""
        )
    )
    return Figure(
        name,
        title,
        caption,
        (("", tuple(panels)),),
        svg.legend((styles[s], s) for s in subjects),
        data,
    )


def _series(rows: pd.DataFrame, column: str, subject: str, style: svg.Style) -> Series:
    def tip(row: Mapping[str, Any]) -> str:
        reading = with_interval(row[column], row[f"{column}_lo"], row[f"{column}_hi"], percent)
        return f"{subject}, step {row['step']}: {reading}"

    mine = rows[rows["subject"] == subject]
    return Series(points_of(mine, "step", column, tip), style, size=2.6)


def _ends_of(rows: pd.DataFrame, column: str, subject: str) -> str:
    mine = rows[rows["subject"] == subject].sort_values("step")
    first, last = mine.iloc[0], mine.iloc[-1]
    return (
        f"{subject}: from {percent(first[column])} at step {first['step']} to"
        f" {percent(last[column])} at step {last['step']}"
    )
