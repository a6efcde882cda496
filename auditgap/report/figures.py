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

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import svg
from auditgap.report.behaviour import ALL, KINDS
from auditgap.report.charts import Figure
from auditgap.report.svg import BOTTOM, LEFT, RIGHT, STYLES, TOP, Scale
from auditgap.report.text import is_null, number, percent, points, shorten, with_interval
from auditgap.store.tables import rows_of
from auditgap.types import ATTACKS

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


def _budgets(table: pd.DataFrame) -> list[tuple[float, str]]:
    return sorted(
        {(float(e), str(u)) for e, u in zip(table["eps"], table["unit"], strict=True)},
        key=lambda b: (b[1], b[0]),
    )


def _top(table: pd.DataFrame, columns: Sequence[str]) -> float:
    values = [v for column in columns for v in table[column].tolist() if not is_null(v)]
    return max([float(v) for v in values], default=0.0)


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
    keep = [
        "subject",
        "site",
        "layer_index",
        "unit",
        "eps",
        "attack",
        "n",
        "n_unscored",
        column,
        lo,
        hi,
    ]
    data = table.loc[
        table["attack"].isin(ATTACKS) & table["layer_index"].notna(), keep
    ].reset_index(drop=True)
    measured = data[data[column].notna()]
    if measured["layer_index"].nunique() < 2:
        sites = ", ".join(dict.fromkeys(measured["site"].astype(str)))
        why = (
            f"only one site was measured ({sites}), and a profile needs two"
            if sites
            else "no site was measured"
        )
        return Figure(name, title, caption, data=data, missing=f"No profile by depth: {why}.")
    form = percent if rate else number
    groups = []
    layers = [int(v) for v in measured["layer_index"].unique()]
    x = Scale(min(layers), max(layers), LEFT, RIGHT)
    attacks = [a for a in ATTACK_STYLES if a in set(data["attack"])]
    banded = attacks if len(attacks) <= 2 else ["targeted", "random_matched"]
    top = 1.0 if rate else _top(data, [column, hi]) or 1.0
    y = Scale(0.0, top, BOTTOM, TOP)
    yticks = [(v, percent(v) if rate else f"{v:g}") for v in svg.ticks(0, top, 4)]
    for s, (subject, rows) in enumerate(data.groupby("subject", sort=False)):
        panels = []
        for b, (eps, unit) in enumerate(_budgets(rows)):
            chosen = rows[(rows["eps"] == eps) & (rows["unit"] == unit)]
            parts = [svg.axes(x, y, depth_ticks(layers), yticks, "block", ylabel)]
            marks: list[Markup] = []
            for attack in reversed(attacks):  # the attack is drawn last, over its controls
                style, part = (
                    ATTACK_STYLES[attack],
                    chosen[chosen["attack"] == attack].sort_values("layer_index"),
                )
                if attack in banded:
                    parts.append(
                        svg.band(
                            list(zip(part["layer_index"], part[lo], part[hi], strict=True)),
                            x,
                            y,
                            style,
                        )
                    )
                marks.append(
                    svg.line(list(zip(part["layer_index"], part[column], strict=True)), x, y, style)
                )
                for row in rows_of(part[part[column].notna()]):
                    reading = with_interval(row[column], row[lo], row[hi], form)
                    tip = f"{row['site']}, {ATTACK_NAMES[attack]}: {reading}, n = {row['n']}"
                    r = 3.0 if len(layers) <= 16 else 1.8
                    marks.append(svg.marker(x(row["layer_index"]), y(row[column]), style, tip, r))
            what = f"{title}, {subject}, {budget_label(eps, unit)}"
            parts.extend(marks)
            panels.append(
                svg.draw(
                    parts,
                    title=what,
                    desc=_describe(chosen, column, form),
                    key=f"{name}-{s}-{b}",
                    heading=budget_label(eps, unit),
                )
            )
        groups.append((str(subject), tuple(panels)))
    legend = svg.legend((ATTACK_STYLES[a], ATTACK_NAMES[a]) for a in attacks)
    return Figure(name, title, caption, tuple(groups), legend, data)


def _describe(rows: pd.DataFrame, column: str, form) -> str:
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
    x, step = Scale(0.0, 1.0, 66, RIGHT - 68), 38
    groups = []
    for s, (subject, rows) in enumerate(data.groupby("subject", sort=False)):
        rows = rows.sort_values(["unit", "eps"])
        bottom = TOP + 10 + step * len(rows)
        y = Scale(0.0, 1.0, bottom, TOP - 6)
        parts = [
            svg.axes(
                x, y, [(v, percent(v)) for v in (0, 0.25, 0.5, 0.75, 1)], [], "answered safely", ""
            )
        ]
        parts += [
            Markup('<path class="grid" d="M{} {}V{}"/>').format(svg.f(x(v)), svg.f(bottom), TOP - 6)
            for v in (0, 0.25, 0.5, 0.75, 1)
        ]
        parts += [
            svg.text(4, 12, "budget", "label"),
            svg.text(RIGHT, 12, "gap, points", "label", "end"),
        ]
        for i, row in enumerate(rows_of(rows)):
            parts += _gap_row(row, TOP + 22 + step * i, x)
        said = "; ".join(
            f"{budget_label(r['eps'], r['unit'])}: gap {points(r['gap'])}" for r in rows_of(rows)
        )
        panel = svg.draw(
            parts, title=f"{title}, {subject}", desc=said, key=f"{name}-{s}", height=bottom + 44
        )
        groups.append((str(subject), (panel,)))
    legend = svg.legend(
        [(_SAFE, "behaviourally safe, no edit"), (_ROBUST, "robust under bounded edits")]
    )
    return Figure(name, title, caption, tuple(groups), legend, data)


def _gap_row(row: Mapping[str, Any], at: float, x: Scale) -> list[Markup]:
    label = f"{float(row['eps']):g} {row['unit']}"
    parts = [svg.text(4, at + 4, label, "tick")]
    if is_null(row["gap"]):
        return [*parts, svg.text(x(0.5), at + 4, "not measured", "tick null", "middle")]
    b, r = float(row["safety"]), float(row["robustness"])
    parts.append(
        Markup('<path class="gapbar" d="M{} {}H{}"/>').format(svg.f(x(r)), svg.f(at), svg.f(x(b)))
    )
    for key, value, style, dy, size in (
        ("safety", b, _SAFE, -6, 5.6),
        ("robustness", r, _ROBUST, 6, 3.9),
    ):
        lo, hi = row[f"{key}_lo"], row[f"{key}_hi"]
        if not (is_null(lo) or is_null(hi)):
            parts.append(svg.whisker(at + dy, x(float(lo)), x(float(hi)), style, across=True))
        tip = f"{key}: {with_interval(value, lo, hi, percent)}"
        parts.append(svg.marker(x(value), at, style, tip, size))
    unitless = [points(row[k], unit="", null="") for k in ("gap", "gap_lo", "gap_hi")]
    parts.append(svg.text(RIGHT, at, unitless[0], "value", "end"))
    if unitless[1] and unitless[2]:
        parts.append(svg.text(RIGHT, at + 13, f"[{unitless[1]}, {unitless[2]}]", "tick", "end"))
    return parts


def lvs_bars(table: pd.DataFrame, roles: Mapping[str, Mapping[str, int]]) -> Figure:
    """Mean LVS of the targeted attack at embedding, mid and last: one drawing a budget, one bar a
    subject.

    `roles` says, subject by subject, which layer index is `emb`, `mid` and `last`.
    """
    name, title = "lvs_bars", "LVS at the embedding, the middle and the last block"
    caption = "Mean LVS of the targeted attack with its 95\u00a0% bootstrap interval over prompts."
    records = []
    targeted = table[table["attack"] == "targeted"]
    for row in rows_of(targeted):
        for role, layer in roles.get(row["subject"], {}).items():
            if row["layer_index"] == layer:
                keys = (
                    "subject",
                    "site",
                    "layer_index",
                    "unit",
                    "eps",
                    "n",
                    "n_unscored",
                    "lvs_mean",
                    "lvs_mean_lo",
                    "lvs_mean_hi",
                )
                records.append({"role": role, **{key: row[key] for key in keys}})
    data = pd.DataFrame(records)
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
    top = _top(data, ["lvs_mean", "lvs_mean_hi"]) or 1.0
    y = Scale(0.0, top, BOTTOM, TOP)
    panels = []
    for b, (eps, unit) in enumerate(_budgets(data)):
        rows = data[(data["eps"] == eps) & (data["unit"] == unit)]
        parts = [
            svg.axes(
                Scale(0, 1, LEFT, RIGHT),
                y,
                [],
                [(v, f"{v:g}") for v in svg.ticks(0, top, 4)],
                "",
                "LVS, mean",
            )
        ]
        slot = (RIGHT - LEFT) / 3
        width = min(34.0, (slot - 18) / len(subjects))
        for g, role in enumerate(("emb", "mid", "last")):
            middle = LEFT + slot * (g + 0.5)
            parts.append(
                svg.text(
                    middle, BOTTOM + 16, {"emb": "embedding"}.get(role, role), "tick", "middle"
                )
            )
            for i, subject in enumerate(subjects):
                at = middle + width * (i - (len(subjects) - 1) / 2)
                found = rows_of(rows[(rows["role"] == role) & (rows["subject"] == subject)])
                parts += _bar(found[0] if found else None, at, width, y, styles[subject], subject)
        what = f"{title}, {budget_label(eps, unit)}"
        said = "; ".join(
            f"{r['subject']} {r['role']}: {number(r['lvs_mean'])}" for r in rows_of(rows)
        )
        panels.append(
            svg.draw(
                parts,
                title=what,
                desc=said,
                key=f"{name}-{b}",
                heading=budget_label(eps, unit),
                height=216,
            )
        )
    legend = svg.legend(((styles[s], s) for s in subjects), filled=True)
    return Figure(name, title, caption, (("", tuple(panels)),), legend, data)


def _bar(
    row: Mapping[str, Any] | None, at: float, width: float, y: Scale, style: svg.Style, subject: str
) -> list[Markup]:
    if row is None or is_null(row["lvs_mean"]):
        word = Markup(
            '<text class="tick null" transform="translate({} {}) rotate(-90)">not measured</text>'
        )
        return [word.format(svg.f(at + 3.5), svg.f(y(0) - 4))]
    value = float(row["lvs_mean"])
    height = max(y(0) - y(value), 1.0)  # a measured 0 leaves a line; nothing measured leaves words
    tip = (
        f"{subject}, {row['site']}: {with_interval(value, row['lvs_mean_lo'], row['lvs_mean_hi'])}"
    )
    parts = [
        Markup('<g class="bar {}">{}<rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
            style.css,
            svg.tooltip(tip),
            svg.f(at - width / 2 + 1),
            svg.f(y(0) - height),
            svg.f(width - 2),
            svg.f(height),
        )
    ]
    if not (is_null(row["lvs_mean_lo"]) or is_null(row["lvs_mean_hi"])):
        parts.append(
            svg.whisker(
                at,
                y(float(row["lvs_mean_lo"])),
                y(float(row["lvs_mean_hi"])),
                svg.Style("ink", "", ""),
                cap=2.5,
            )
        )
    return parts


def _spread(layers: Sequence[int], most: int) -> list[int]:
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
    y = Scale(0.0, 1.0, BOTTOM, TOP)
    yticks = [(v, percent(v)) for v in (0, 0.25, 0.5, 0.75, 1)]
    groups, left_out, used = [], 0, {}
    layers_all = sorted({int(v) for v in data["layer_index"]})
    chosen_all = _spread(layers_all, MOST_CURVES)
    styles = {layer: STYLES[i] for i, layer in enumerate(chosen_all)}
    for s, ((subject, unit), rows) in enumerate(data.groupby(["subject", "unit"], sort=False)):
        here = sorted({int(v) for v in rows["layer_index"]})
        sizes = [float(v) for v in data.loc[data["unit"] == unit, "eps"] if v > 0] or [1.0]
        x = Scale(min(sizes) / 1.25, max(sizes) * 1.02, LEFT, RIGHT, log=True)
        xticks = [(v, f"{v:g}") for v in svg.log_ticks(x.lo, x.hi)]
        left_out = max(left_out, len([v for v in here if v not in styles]))
        parts = [svg.axes(x, y, xticks, yticks, f"ε, {unit}", "not yet harmful")]
        said = []
        for layer in (v for v in here if v in styles):
            part, style = rows[rows["layer_index"] == layer].sort_values("eps"), styles[layer]
            part = part[part["survival"].notna()]
            used[layer] = str(rows.loc[rows["layer_index"] == layer, "site"].iloc[0])
            # ε = 0 has no place on a logarithmic axis: the left edge
            at = [max(float(eps), x.lo) for eps in part["eps"]]
            values = list(zip(at, part["survival"].astype(float), strict=True))
            lows, highs = (svg.steps(list(zip(at, part[end], strict=True))) for end in ("lo", "hi"))
            parts.append(
                svg.band(
                    [(a, lo, hi) for (a, lo), (_, hi) in zip(lows, highs, strict=True)], x, y, style
                )
            )
            parts.append(svg.line(svg.steps(values), x, y, style))
            if values:
                end = values[-1]
                parts.append(
                    svg.marker(
                        x(end[0]),
                        y(end[1]),
                        style,
                        f"{used[layer]}: {percent(end[1])} left at ε = {end[0]:g}",
                        2.8,
                    )
                )
                said.append(f"{used[layer]}: {percent(end[1])} not harmful at ε = {end[0]:g}")
        panel = svg.draw(
            parts, title=f"{title}, {subject}", desc="; ".join(said), key=f"{name}-{s}"
        )
        groups.append((str(subject), (panel,)))
    if left_out:
        caption += (
            f" {len(used)} sites are drawn, {left_out} are in the table and in the CSV file only."
        )
    legend = svg.legend((styles[layer], used[layer]) for layer in chosen_all if layer in used)
    return Figure(name, title, caption, tuple(groups), legend, data)


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
    styles = {
        subject: STYLES[(1, 0, 3, 4, 5, 6, 7, 2)[i % 8]] for i, subject in enumerate(subjects)
    }
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
    sources, step = list(dict.fromkeys(rows["source"])), 11
    sources.sort(key=lambda s: s != ALL)
    block = 23 + step * len(styles)  # a source's name, and a line a subject under it
    bottom = TOP + block * len(sources)
    x, y = Scale(0.0, 1.0, 14, RIGHT - 12), Scale(0.0, 1.0, bottom, TOP)
    parts = [
        svg.axes(x, y, [(v, percent(v)) for v in (0, 0.25, 0.5, 0.75, 1)], [], "of prompts", "")
    ]
    parts += [
        Markup('<path class="grid" d="M{} {}V{}"/>').format(svg.f(x(v)), svg.f(bottom), TOP)
        for v in (0, 0.25, 0.5, 0.75, 1)
    ]
    said = []
    for i, source in enumerate(sources):
        top = TOP + block * i
        some = {row["subject"]: row for row in rows_of(rows[rows["source"] == source])}
        n = max(int(row["n"]) for row in some.values())
        words = "all sources" if source == ALL else shorten(source, 40)
        parts.append(
            svg.text(4, top + 14, f"{words}, n = {n}", "heading" if source == ALL else "tick")
        )
        for j, (subject, style) in enumerate(styles.items()):
            parts += _dot(some.get(subject), subject, top + 23 + step * j, x, style)
        said += [f"{words}, {subject}: {percent(row['share'])}" for subject, row in some.items()]
    return svg.draw(
        parts,
        title=heading.capitalize(),
        desc="; ".join(said),
        key=key,
        heading=heading,
        height=bottom + 40,
    )


def _dot(
    row: Mapping[str, Any] | None, subject: str, at: float, x: Scale, style: svg.Style
) -> list[Markup]:
    if row is None or is_null(row["share"]):
        return [
            svg.text(x(0), at + 3.5, "not asked" if row is None else "could not tell", "tick null")
        ]
    share, lo, hi = (row[k] for k in ("share", "share_lo", "share_hi"))
    tip = f"{subject}, {row['source']}: {with_interval(share, lo, hi, percent)}, n = {row['n']}"
    ends = (
        []
        if is_null(lo) or is_null(hi)
        else [svg.whisker(at, x(float(lo)), x(float(hi)), style, across=True)]
    )
    return [*ends, svg.marker(x(float(share)), at, style, tip)]
