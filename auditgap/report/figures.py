"""The report's figures: a table goes in, a `Figure` comes out, with its drawings and the very
numbers they show.

    figure = by_depth(lvs_table(rows), "lvs_mean", name="lvs_by_depth", title="LVS by depth", ylabel="LVS, mean")
    figure.groups   # ((subject, (svg, svg, …)), …), one drawing a budget
    figure.data     # what is drawn; written beside the report as figures/lvs_by_depth.csv
    figure.missing  # or: why there is nothing to draw, in a sentence

Pure functions of DataFrames in the shape of `report.tables`. Shares are 0–1. Nulls break a line and
are never drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from auditgap.report import svg
from auditgap.report.charts import (
    Axis,
    Bar,
    Dot,
    DotRow,
    Figure,
    Point,
    Series,
    Spread,
    bars,
    dots,
    lines,
    numbers,
    points_of,
    shares,
    top_of,
)
from auditgap.report.depth import (
    LOGARITHMIC,
    budget_label,
    budgets_of,
    depth_ticks,
    value_axis,
)
from auditgap.report.svg import RIGHT, STYLES
from auditgap.report.text import is_null, number, percent, points, with_interval
from auditgap.store.tables import rows_of
from auditgap.types import ATTACKS

Form = Callable[[Any], str]
ATTACK_NAMES: Mapping[str, str] = {
    "targeted": "targeted attack",
    "random_matched": "control: matched random signs",
    "random": "control: random in the ball",
    "shuffled": "control: another prompt’s edit",
    "untargeted": "untargeted attack",
    "benign": "control: harmless opening",
}
ATTACK_STYLES = {attack: STYLES[i] for i, attack in enumerate(ATTACK_NAMES)}

_SAFE, _ROBUST = svg.Style("k1", "", "circle"), svg.Style("k0", "", "square")

#: More survival curves than this in one drawing cannot be told apart.
MOST_CURVES = 6


#: How many prompts a figure's row is of.
_COUNTS = ("n", "n_unscored")


def by_depth(
    table: pd.DataFrame,
    column: str,
    *,
    name: str,
    title: str,
    ylabel: str,
    rate: bool = False,
    caption: str = "",
) -> Figure:
    """`column` against depth: one drawing a subject and budget, targeted against its controls, with
    95 % bands.

    All drawings share their axes, so that budgets and subjects can be compared by eye. With more
    than two series only the attack and its matched control carry a band; every interval is in the
    data.
    """
    lo, hi = f"{column}_lo", f"{column}_hi"
    data = table.loc[
        table["attack"].isin(ATTACKS) & table["layer_index"].notna(),
        ["subject", "site", "layer_index", "unit", "eps", "attack", *_COUNTS, column, lo, hi],
    ].reset_index(drop=True)
    measured = data[data[column].notna()]
    if measured["layer_index"].nunique() < 2:
        sites = ", ".join(dict.fromkeys(measured["site"].astype(str)))
        why = (
            f"only one site was measured ({sites}), and a profile needs two"
            if sites
            else "no site was measured"
        )
        return Figure(name, title, caption, data=data, missing=f"{title}: not drawn, as {why}.")
    form = percent if rate else number
    layers = [int(v) for v in measured["layer_index"].unique()]
    attacks = [a for a in ATTACK_STYLES if a in set(data["attack"])]
    x = Axis(min(layers), max(layers), "block", depth_ticks(layers))
    y = shares(ylabel) if rate else value_axis(measured, column, ylabel)
    caption += LOGARITHMIC * y.log
    size = 3.0 if len(layers) <= 16 else 1.8
    groups = []
    for s, (subject, rows) in enumerate(data.groupby("subject", sort=False)):
        panels = []
        for b, (eps, unit) in enumerate(budgets_of(rows)):
            chosen = rows[(rows["eps"] == eps) & (rows["unit"] == unit)]
            panels.append(
                lines(
                    # the attack is drawn last, over its controls
                    [
                        _attack_series(
                            chosen, column, attack, form, size, _is_banded(attack, attacks)
                        )
                        for attack in reversed(attacks)
                    ],
                    x,
                    y,
                    title=f"{title}, {subject}, {budget_label(eps, unit)}",
                    desc=_describe(chosen, column, form),
                    key=f"{name}-{s}-{b}",
                    heading=budget_label(eps, unit),
                )
            )
        groups.append((str(subject), tuple(panels)))
    legend = svg.legend((ATTACK_STYLES[a], ATTACK_NAMES[a]) for a in attacks)
    return Figure(name, title, caption, tuple(groups), legend, data)


def _is_banded(attack: str, attacks: Sequence[str]) -> bool:
    return len(attacks) <= 2 or attack in ("targeted", "random_matched")


def _attack_series(
    rows: pd.DataFrame, column: str, attack: str, form: Form, size: float, is_banded: bool
) -> Series:
    """One attack's line by depth."""

    def tip(row: Mapping[str, Any]) -> str:
        reading = with_interval(row[column], row[f"{column}_lo"], row[f"{column}_hi"], form)
        return f"{row['site']}, {ATTACK_NAMES[attack]}: {reading}, n = {row['n']}"

    return Series(
        points_of(rows[rows["attack"] == attack], "layer_index", column, tip),
        ATTACK_STYLES[attack],
        Spread.BAND if is_banded else Spread.NONE,
        size=size,
    )


def _describe(rows: pd.DataFrame, column: str, form: Form) -> str:
    """A drawing in words: the highest value of each attack and where it is."""
    said = []
    for attack, part in rows[rows[column].notna()].groupby("attack", sort=False):
        peak = part.iloc[int(part[column].astype(float).argmax())]
        said.append(
            f"{ATTACK_NAMES.get(str(attack), attack)}: highest at {peak['site']},"
            f" {form(peak[column])}"
        )
    return "; ".join(said) or "nothing was measured"


def gap_by_budget(gaps: pd.DataFrame) -> Figure:
    """Behavioural safety and robustness a budget, the audit gap the bar between them; one drawing a
    subject."""
    name, title = "gap_by_budget", "Audit gap by budget"
    caption = (
        "Circle: share of prompts answered safely with no edit. Square: share that stays safe under"
        " every bounded edit tried up to that budget, at the worst site. The bar between them is"
        " the audit gap; whiskers are 95\u00a0% intervals."
    )
    data = gaps.reset_index(drop=True)
    if data.empty or data["gap"].isna().all():
        return Figure(name, title, caption, data=data, missing="No audit gap was measured.")
    groups = []
    for s, (subject, rows) in enumerate(data.groupby("subject", sort=False)):
        found = rows_of(rows.sort_values(["unit", "eps"]))
        panel = dots(
            [_gap_row(row) for row in found],
            shares("answered safely"),
            title=f"{title}, {subject}",
            desc="; ".join(
                f"{budget_label(r['eps'], r['unit'])}: gap {points(r['gap'])}" for r in found
            ),
            key=f"{name}-{s}",
            left=66,
            right=RIGHT - 68,
            columns=("budget", "gap, points"),
        )
        groups.append((str(subject), (panel,)))
    legend = svg.legend(
        [(_SAFE, "behaviourally safe, no edit"), (_ROBUST, "robust under bounded edits")]
    )
    return Figure(name, title, caption, tuple(groups), legend, data)


def _gap_row(row: Mapping[str, Any]) -> DotRow:
    label = f"{float(row['eps']):g} {row['unit']}"
    if is_null(row["gap"]):
        return DotRow(label, null="not measured")

    def dot(key: str, style: svg.Style, lift: float, size: float) -> Dot:
        value, lo, hi = (row[f"{key}{end}"] for end in ("", "_lo", "_hi"))
        tip = f"{key}: {with_interval(value, lo, hi, percent)}"
        return Dot(value, lo, hi, style, tip, size, lift)

    gap, lo, hi = (points(row[k], unit="", null="") for k in ("gap", "gap_lo", "gap_hi"))
    return DotRow(
        label,
        [dot("safety", _SAFE, -6, 5.6), dot("robustness", _ROBUST, 6, 3.9)],
        gap,
        f"[{lo}, {hi}]" if lo and hi else "",
    )


def lvs_bars(table: pd.DataFrame, roles: Mapping[str, Mapping[str, int]]) -> Figure:
    """Mean LVS of the targeted attack at embedding, mid and last: one drawing a budget, one bar a
    subject.

    `roles` says, subject by subject, which layer index is `emb`, `mid` and `last`.
    """
    name, title = "lvs_bars", "LVS at the embedding, the middle and the last block"
    caption = "Mean LVS of the targeted attack with its 95\u00a0% bootstrap interval over prompts."
    keys = ("subject", "site", "layer_index", "unit", "eps", *_COUNTS)
    means = ("lvs_mean", "lvs_mean_lo", "lvs_mean_hi")
    data = pd.DataFrame(
        {"role": role, **{key: row[key] for key in (*keys, *means)}}
        for row in rows_of(table[table["attack"] == "targeted"])
        for role, layer in roles.get(row["subject"], {}).items()
        if row["layer_index"] == layer
    )
    if data.empty or data["lvs_mean"].isna().all():
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No LVS was measured at the embedding, the middle or the last block.",
        )
    subjects = list(dict.fromkeys(data["subject"]))
    # Colours say which subject here, so the first ones are not those of the attack and its control
    # elsewhere.
    styles = {
        subject: STYLES[(3, 4, 5, 6, 7, 2, 1, 0)[i % 8]] for i, subject in enumerate(subjects)
    }
    y = numbers(0.0, top_of(data, ["lvs_mean", "lvs_mean_hi"]), "LVS, mean")
    x = Axis(0, 3, "", [(0.5, "embedding"), (1.5, "mid"), (2.5, "last")])
    panels = []
    for b, (eps, unit) in enumerate(budgets_of(data)):
        rows = data[(data["eps"] == eps) & (data["unit"] == unit)]
        told = {(r["role"], r["subject"]): r for r in rows_of(rows)}
        said = [f"{s} {role}: {number(r['lvs_mean'])}" for (role, s), r in told.items()]
        panels.append(
            bars(
                [
                    _bar(told.get((role, subject)), g, i, styles)
                    for g, role in enumerate(("emb", "mid", "last"))
                    for i, subject in enumerate(subjects)
                ],
                x,
                y,
                title=f"{title}, {budget_label(eps, unit)}",
                desc="; ".join(said),
                key=f"{name}-{b}",
                heading=budget_label(eps, unit),
            )
        )
    legend = svg.legend(((styles[s], s) for s in subjects), filled=True)
    return Figure(name, title, caption, (("", tuple(panels)),), legend, data)


def _bar(row: Mapping[str, Any] | None, group: int, i: int, styles: Mapping[str, svg.Style]) -> Bar:
    """One subject's bar in a group: side by side around its middle."""
    subject, width = list(styles)[i], min(0.35, 0.8 / len(styles))
    left = group + 0.5 + width * (i - len(styles) / 2)
    if row is None:
        return Bar(left, left + width, None)
    value, lo, hi = (row[c] for c in ("lvs_mean", "lvs_mean_lo", "lvs_mean_hi"))
    tip = f"{subject}, {row['site']}: {with_interval(value, lo, hi)}"
    return Bar(left, left + width, value, lo, hi, styles[subject], tip)


def spread_out(layers: Sequence[int], most: int) -> list[int]:
    """At most `most` of `layers`, first and last among them, evenly spaced between."""
    layers = sorted(layers)
    if len(layers) <= most:
        return layers
    return sorted({layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)})


def survival(curves: pd.DataFrame) -> Figure:
    """Aalen–Johansen curves of the minimum distance to collapse: one drawing a subject and unit, one
    step curve a site."""
    name, title = "distance_curves", "Minimum distance to collapse"
    caption = (
        "Share of prompts not yet turned harmful by an edit of that size (Aalen–Johansen, 95\u00a0%"
        " band)."
    )
    data = curves.reset_index(drop=True)
    if len(data) and not (data["eps"] > 0).any():
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="Every prompt was harmful with no edit: there is no distance to draw.",
        )
    if data.empty:
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No minimum distances were measured in this run.",
        )
    chosen = spread_out(sorted({int(v) for v in data["layer_index"]}), MOST_CURVES)
    styles = {layer: STYLES[i] for i, layer in enumerate(chosen)}
    names = {int(r["layer_index"]): str(r["site"]) for r in reversed(rows_of(data))}
    groups, left_out, used = [], 0, set()
    for s, ((subject, unit), rows) in enumerate(data.groupby(["subject", "unit"], sort=False)):
        here = sorted({int(v) for v in rows["layer_index"]})
        drawn = [layer for layer in here if layer in styles]
        left_out, used = max(left_out, len(here) - len(drawn)), used | set(drawn)
        sizes = [float(v) for v in data.loc[data["unit"] == unit, "eps"] if v > 0] or [1.0]
        lo, hi = min(sizes) / 1.25, max(sizes) * 1.02
        ticks = [(v, f"{v:g}") for v in svg.log_ticks(lo, hi)]
        by_layer = {n: _survival(rows[rows["layer_index"] == n], lo) for n in drawn}
        panel = lines(
            [
                Series(curve, styles[layer], size=2.8, stepped=True)
                for layer, curve in by_layer.items()
            ],
            Axis(lo, hi, f"ε, {unit}", ticks, log=True),
            shares("not yet harmful"),
            title=f"{title}, {subject}",
            desc="; ".join(
                f"{names[layer]}: {percent(curve[-1].y)} not harmful at ε = {curve[-1].x:g}"
                for layer, curve in by_layer.items()
                if curve
            ),
            key=f"{name}-{s}",
        )
        groups.append((str(subject), (panel,)))
    if left_out:
        caption += (
            f" {len(used)} sites are drawn, {left_out} are in the table and in the CSV file only."
        )
    legend = svg.legend((styles[layer], names[layer]) for layer in chosen if layer in used)
    return Figure(name, title, caption, tuple(groups), legend, data)


def _survival(rows: pd.DataFrame, least: float) -> list[Point]:
    """A curve whose end alone is marked; ε = 0 has no place on a logarithmic axis, so it stands at
    its left edge."""
    found = [
        Point(max(float(r["eps"]), least), float(r["survival"]), r["lo"], r["hi"])
        for r in rows_of(rows[rows["survival"].notna()].sort_values("eps"))
    ]
    if found:
        end = found[-1]
        tip = f"{rows['site'].iloc[0]}: {percent(end.y)} left at ε = {end.x:g}"
        found[-1] = replace(end, tip=tip)
    return found
