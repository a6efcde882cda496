"""What depth profiles share: the axis of their values, and the attack on several subjects in one
drawing.

    value_axis(lvs, "lvs_mean", "LVS, mean").log      # where one site dwarfs the others
    together(lvs, "lvs_mean", name="lvs_of_models", title="LVS of the models", ylabel="LVS, mean")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from auditgap.report import svg
from auditgap.report.charts import Axis, Figure, Series, lines, numbers, points_of, shares, top_of
from auditgap.report.svg import SUBJECT_STYLES
from auditgap.report.text import number, percent, with_interval

#: The highest site is as many times the next one before the axis becomes logarithmic.
DWARFS = 8
#: A logarithmic axis spans no more than this: what lies lower stands at its foot.
_SPAN = 1e4
LOGARITHMIC = " The axis is logarithmic, as one site dwarfs the others; 0 stands at its foot."


def site_label(layer_index: float) -> str:
    return "emb." if layer_index < 0 else f"{int(layer_index)}"


def budget_label(eps: Any, unit: object) -> str:
    return f"ε = {float(eps):g} {unit}"


def depth_ticks(layers: Sequence[int]) -> list[tuple[float, str]]:
    """The embedding, the last site, and round block numbers between, none of them crowding
    another."""
    low, high = min(layers), max(layers)
    shown = [low]
    for tick in svg.ticks(max(low, 0), high, 5):
        if (
            tick == int(tick)
            and (tick - shown[-1]) >= (high - low) / 9
            and (high - tick) >= (high - low) / 9
        ):
            shown.append(int(tick))
    return [(v, site_label(v)) for v in dict.fromkeys([*shown, high])]


def budgets_of(table: pd.DataFrame) -> list[tuple[float, str]]:
    return sorted(
        {(float(e), str(u)) for e, u in zip(table["eps"], table["unit"], strict=True)},
        key=lambda b: (b[1], b[0]),
    )


def value_axis(measured: pd.DataFrame, column: str, ylabel: str) -> Axis:
    """The axis of values that are no shares, over every row that is drawn on it."""
    tops = measured.groupby("layer_index")[column].max().astype(float).nlargest(2).tolist()
    top = top_of(measured, [column, f"{column}_hi"])
    if len(tops) < 2 or not tops[0] > DWARFS * tops[1] > 0:
        return numbers(0.0, top, ylabel)
    least = min(v for v in measured[column].astype(float) if v > 0)
    low = max(least / 1.5, top / _SPAN)
    ticks = [(v, f"{v:g}") for v in svg.log_ticks(low, top)]
    return Axis(low, top, f"{ylabel}, log scale", ticks, log=True)


def together(
    table: pd.DataFrame, column: str, *, name: str, title: str, ylabel: str, rate: bool = False
) -> Figure | None:
    """The targeted attack on every subject in one drawing a budget; None where there is one
    subject, or more than have styles."""
    rows = table[(table["attack"] == "targeted") & table["layer_index"].notna()]
    subjects = list(dict.fromkeys(rows["subject"].astype(str)))
    measured = rows[rows[column].notna()]
    if not 1 < len(subjects) <= len(SUBJECT_STYLES) or measured["layer_index"].nunique() < 2:
        return None
    form: Callable[[Any], str] = percent if rate else number
    styles = dict(zip(subjects, SUBJECT_STYLES, strict=False))
    layers = [int(v) for v in measured["layer_index"].unique()]
    x = Axis(min(layers), max(layers), "block", depth_ticks(layers))
    y = shares(ylabel) if rate else value_axis(measured, column, ylabel)
    panels = []
    for b, (eps, unit) in enumerate(budgets_of(rows)):
        chosen = rows[(rows["eps"] == eps) & (rows["unit"] == unit)]
        each = {s: chosen[chosen["subject"].astype(str) == s] for s in subjects}
        panels.append(
            lines(
                [
                    Series(points_of(each[s], "layer_index", column, _tip(column, form)), styles[s])
                    for s in reversed(subjects)  # the first is drawn last, over the others
                ],
                x,
                y,
                title=f"{title}, {budget_label(eps, unit)}",
                desc="; ".join(
                    f"{s}: highest {form(part[column].max())}"
                    for s, part in each.items()
                    if len(part)
                ),
                key=f"{name}-{b}",
                heading=budget_label(eps, unit),
            )
        )
    caption = "The targeted attack with its 95\u00a0% band, a line a model." + LOGARITHMIC * y.log
    legend = svg.legend((styles[s], s) for s in subjects)
    return Figure(name, title, caption, (("", tuple(panels)),), legend, rows.reset_index(drop=True))


def _tip(column: str, form: Callable[[Any], str]) -> Callable[[Mapping[str, Any]], str]:
    def tip(row: Mapping[str, Any]) -> str:
        reading = with_interval(row[column], row[f"{column}_lo"], row[f"{column}_hi"], form)
        return f"{row['subject']}, {row['site']}: {reading}, n = {row['n']}"

    return tip
