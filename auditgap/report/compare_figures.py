"""Models over one another by relative depth: the figures of a comparison."""

from __future__ import annotations

import pandas as pd

from auditgap.report import figures, svg, text
from auditgap.report.charts import Figure
from auditgap.report.compare_measures import Measure, Unit
from auditgap.report.figures import budget_label
from auditgap.report.svg import BOTTOM, LEFT, RIGHT, STYLES, TOP, Scale
from auditgap.store.tables import rows_of

#: More lines than this in one drawing cannot be told apart.
MOST = len(STYLES)


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
    styles = {model: STYLES[(1, 0, 3, 4, 5, 6, 7, 2)[i]] for i, model in enumerate(models[:MOST])}
    rate = measure.unit == Unit.SHARE
    form = text.percent if rate else text.number
    top = 1.0 if rate else figures._top(drawn, ["value", "hi"]) or 1.0
    x, y = Scale(0.0, 1.0, LEFT, RIGHT), Scale(0.0, top, BOTTOM, TOP)
    xticks = [(0.0, "emb."), (0.25, "¼"), (0.5, "½"), (0.75, "¾"), (1.0, "last")]
    yticks = [(v, text.percent(v) if rate else f"{v:g}") for v in svg.ticks(0, top, 4)]
    panels = []
    for b, (eps, unit) in enumerate(figures._budgets(drawn)):
        parts, marks, said = (
            [svg.axes(x, y, xticks, yticks, "relative depth", heading)],
            [],
            [],
        )
        for model, style in styles.items():
            part = drawn[
                (drawn["model"] == model) & (drawn["eps"] == eps) & (drawn["unit"] == unit)
            ].sort_values("depth")
            parts.append(
                svg.band(list(zip(part["depth"], part["lo"], part["hi"], strict=True)), x, y, style)
            )
            marks.append(
                svg.line(list(zip(part["depth"], part["value"], strict=True)), x, y, style)
            )
            for row in rows_of(part):
                tip = (
                    f"{model}, {row['where']}:"
                    f" {text.with_interval(row['value'], row['lo'], row['hi'], form)}, n ="
                    f" {row['n']}"
                )
                marks.append(
                    svg.marker(
                        x(row["depth"]),
                        y(row["value"]),
                        style,
                        tip,
                        3.0 if len(part) <= 16 else 1.8,
                    )
                )
            if len(part):
                peak = part.loc[part["value"].idxmax()]
                said.append(
                    f"{text.shorten(model, 40)}: highest at {peak['where']}, {form(peak['value'])}"
                )
        panels.append(
            svg.draw(
                [*parts, *marks],
                title=f"{title}, {budget_label(eps, unit)}",
                desc="; ".join(said),
                key=f"{name}-{b}",
                heading=budget_label(eps, unit),
            )
        )
    return Figure(
        name,
        title,
        caption,
        (("", tuple(panels)),),
        svg.legend((s, m) for m, s in styles.items()),
        data,
    )
