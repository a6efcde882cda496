"""Models over one another by relative depth: the figures of a comparison."""

from __future__ import annotations

from typing import Any

import pandas as pd

from auditgap.report import svg, text
from auditgap.report.charts import Axis, Figure, Point, Series, lines, numbers, shares, top_of
from auditgap.report.compare_measures import Measure, Unit
from auditgap.report.figures import budget_label, budgets_of
from auditgap.report.svg import SUBJECT_STYLES
from auditgap.store.tables import rows_of

#: More lines than this in one drawing cannot be told apart.
MOST = len(SUBJECT_STYLES)


def profile(table: pd.DataFrame, measure: Measure) -> Figure:
    """Models over one another by relative depth: one drawing a budget, one line with its 95 % band
    a model."""
    name, title = f"compare_{measure.name}", measure.title.removesuffix(", mean")
    keep = ["model", "where", "layer_index", "depth", "unit", "eps", "n", "value", "lo", "hi"]
    data = table.loc[
        (table["measure"] == measure.name) & table["layer_index"].notna() & table["value"].notna(),
        keep,
    ]
    data = data.reset_index(drop=True)
    drawn = data[data["depth"].notna()]
    models = list(dict.fromkeys(drawn["model"]))
    caption = (
        "Targeted attack with 95\u00a0% intervals over prompts; 0 is the embedding, 1 the last"
        " block."
    )
    heading, title = title, f"{title} by relative depth"
    if drawn["depth"].nunique() < 2:
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing=f"No profile of {title}: fewer than two sites were measured.",
        )
    if len(models) > MOST:
        caption += (
            f" {MOST} models are drawn, {len(models) - MOST} are in the table and in the CSV file"
            " only."
        )
    styles = {model: SUBJECT_STYLES[i] for i, model in enumerate(models[:MOST])}
    ticks = [(0.0, "emb."), (0.25, "¼"), (0.5, "½"), (0.75, "¾"), (1.0, "last")]
    x = Axis(0.0, 1.0, "relative depth", ticks)
    rate = measure.unit == Unit.SHARE
    y = shares(heading) if rate else numbers(0.0, top_of(drawn, ["value", "hi"]), heading)
    panels = []
    for b, (eps, unit) in enumerate(budgets_of(drawn)):
        here = drawn[(drawn["eps"] == eps) & (drawn["unit"] == unit)].sort_values("depth")
        parts = {model: here[here["model"] == model] for model in styles}
        panels.append(
            lines(
                [_series(measure, model, parts[model], styles[model]) for model in styles],
                x,
                y,
                title=f"{title}, {budget_label(eps, unit)}",
                desc="; ".join(_peak(measure, m, part) for m, part in parts.items() if len(part)),
                key=f"{name}-{b}",
                heading=budget_label(eps, unit),
            )
        )
    legend = svg.legend((s, m) for m, s in styles.items())
    return Figure(name, title, caption, (("", tuple(panels)),), legend, data)


def _series(measure: Measure, model: str, rows: pd.DataFrame, style: svg.Style) -> Series:
    def point(row: dict[str, Any]) -> Point:
        ends = (row["value"], row["lo"], row["hi"])
        reading = text.with_interval(*ends, measure.value)
        return Point(row["depth"], *ends, f"{model}, {row['where']}: {reading}, n = {row['n']}")

    size = 3.0 if len(rows) <= 16 else 1.8
    return Series([point(row) for row in rows_of(rows)], style, size=size)


def _peak(measure: Measure, model: str, rows: pd.DataFrame) -> str:
    peak = rows_of(rows)[int(rows["value"].argmax())]
    most = measure.value(peak["value"])
    return f"{text.shorten(model, 40)}: highest at {peak['where']}, {most}"
