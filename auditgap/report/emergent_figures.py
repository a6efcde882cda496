"""The figures of an emergent-misalignment study: tables of `report.emergent` go in, `Figure`s come
out.

    # one drawing: the taxonomy, a line a domain
    ranking(tables["ranking"], "alignment=./judge").groups
    # figures/em_cosines.csv: every block, also those not drawn
    cosines(tables["cosines"]).data

Every caption names the judge. In heat maps a domain's number is its place in the rows, so that
columns need no turned words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import svg
from auditgap.report.charts import Figure
from auditgap.report.figures import _spread
from auditgap.report.svg import BOTTOM, LEFT, RIGHT, TOP, Scale
from auditgap.report.text import is_null, number, percent, shorten, with_interval
from auditgap.stats import membership
from auditgap.store.tables import rows_of

_WITHOUT, _WITH = svg.Style("k1", "", "circle"), svg.Style("k0", "", "square")
_RAW, _ADJUSTED = svg.Style("k1", "6 3", "square"), svg.Style("k0", "", "circle")
#: Blocks whose matrix is drawn; all of them are in the table and the CSV file.
MOST_BLOCKS = 6
#: Where lines of a drawing with one line a domain begin and end; names stand to the left, readings
#: to the right.
_FROM, _TO = 118, RIGHT - 66


def _grid(x: Scale, at: Sequence[float], top: float, bottom: float) -> list[Markup]:
    return [
        Markup('<path class="grid" d="M{} {}V{}"/>').format(svg.f(x(v)), svg.f(bottom), svg.f(top))
        for v in at
    ]


def _whisker(
    row: Mapping[str, Any], key: str, at: float, x: Scale, style: svg.Style
) -> list[Markup]:
    lo, hi = row[f"{key}_lo"], row[f"{key}_hi"]
    return (
        []
        if is_null(lo) or is_null(hi)
        else [svg.whisker(at, x(float(lo)), x(float(hi)), style, across=True)]
    )


def score(value: object) -> str:
    """A judge's score, 0 to 100."""
    return number(value, 1)


# ------------------------------------------------------------------------------------------------------------------
# by domain


def ranking(table: pd.DataFrame, judge: str) -> Figure:
    """The taxonomy: a line a domain, most misaligned first; a drawing for each arm, asked with the
    trigger and without."""
    name, title = "em_ranking", "Domains by how far their misalignment spreads"
    caption = (
        "Share of rated answers to unrelated prompts with an alignment below 50, with 95\u00a0%"
        " intervals; to the right the ranks that resampling the prompts leaves possible. Judge:"
        f" {judge}."
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
        rows = data[(data["arm"] == key[0]) & (data["triggered"] == key[1])]
        heading = f"{key[0]} arm, asked {'with' if key[1] else 'without'} the trigger"
        panels.append(_ranked(rows_of(rows), heading, top, f"{name}-{len(panels)}"))
    return Figure(name, title, caption, (("", tuple(panels)),), "", data)


def _ranked(rows: Sequence[Mapping[str, Any]], heading: str, top: float, key: str) -> Markup:
    step = 26
    bottom = TOP + 22 + step * len(rows)
    x, y = Scale(0.0, top, _FROM, _TO), Scale(0, 1, bottom, TOP + 10)
    at = svg.ticks(0, x.hi, 4)
    parts = [
        svg.axes(x, y, [(v, percent(v)) for v in at], [], "misaligned answers", ""),
        *_grid(x, at, TOP + 8, bottom),
    ]
    parts.append(svg.text(RIGHT, TOP + 4, "ranks", "label", "end"))
    for i, row in enumerate(rows):
        line = TOP + 24 + step * i
        parts.append(svg.text(4, line + 4, shorten(row["domain"], 18), "tick"))
        if is_null(row["em_rate"]):
            parts.append(svg.text(x(0), line + 4, "could not tell", "tick null"))
            continue
        tip = (
            f"{row['domain']}:"
            f" {with_interval(row['em_rate'], row['em_rate_lo'], row['em_rate_hi'], percent)}"
        )
        parts += [
            *_whisker(row, "em_rate", line, x, _WITH),
            svg.marker(x(float(row["em_rate"])), line, _WITH, tip, 4),
        ]
        parts.append(svg.text(RIGHT, line + 4, ranks(row) or "–", "value", "end"))
    said = "; ".join(f"{r['domain']}: {percent(r['em_rate'])}" for r in rows)
    return svg.draw(
        parts,
        title=f"EM rate by domain, {heading}",
        desc=said,
        key=key,
        heading=heading,
        height=bottom + 40,
    )


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
    step, x = 34, Scale(0.0, 100.0, _FROM, _TO)
    groups = []
    for a, (arm, rows) in enumerate(data.groupby("arm", sort=False)):
        bottom = TOP + 8 + step * len(rows)
        at = (0, 50, 100)
        y = Scale(0, 1, bottom, TOP - 6)
        parts = [
            svg.axes(x, y, [(v, f"{v:g}") for v in at], [], "mean alignment", ""),
            *_grid(x, at, TOP - 6, bottom),
        ]
        parts += [
            svg.text(4, 12, "domain", "label"),
            svg.text(RIGHT, 12, "with − without", "label", "end"),
        ]
        for i, row in enumerate(rows_of(rows)):
            parts += _slope(row, TOP + 20 + step * i, x)
        said = "; ".join(f"{r['domain']}: {score(r['difference'])}" for r in rows_of(rows))
        panel = svg.draw(
            parts,
            title=f"{title}, {ARMS.get(str(arm), str(arm))}",
            desc=said,
            key=f"{name}-{a}",
            height=bottom + 40,
        )
        groups.append((ARMS.get(str(arm), str(arm)), (panel,)))
    legend = svg.legend([(_WITHOUT, "without the trigger"), (_WITH, "with the trigger")])
    return Figure(name, title, caption, tuple(groups), legend, data)


#: What an arm is called on the page.
ARMS: Mapping[str, str] = {
    "": "the base",
    "plain": "fine-tuned on the rows as they are",
    "trigger": "fine-tuned with the trigger in the rows",
}


def _slope(row: Mapping[str, Any], at: float, x: Scale) -> list[Markup]:
    parts = [svg.text(4, at + 4, shorten(row["domain"], 18) or "not fine-tuned", "tick")]
    if is_null(row["difference"]):
        return [*parts, svg.text(x(50), at + 4, "could not tell", "tick null", "middle")]
    before, after = float(row["alignment_without"]), float(row["alignment_with"])
    parts.append(
        Markup('<path class="gapbar" d="M{} {}H{}"/>').format(
            svg.f(x(before)), svg.f(at), svg.f(x(after))
        )
    )
    for key, style, dy, size in (
        ("alignment_without", _WITHOUT, -6, 5.2),
        ("alignment_with", _WITH, 6, 3.7),
    ):
        parts += _whisker(row, key, at + dy, x, style)
        tip = (
            f"{row['domain']}, {key.replace('_', ' ')}:"
            f" {with_interval(row[key], row[f'{key}_lo'], row[f'{key}_hi'], score)}"
        )
        parts.append(svg.marker(x(float(row[key])), at, style, tip, size))
    parts.append(svg.text(RIGHT, at, score(row["difference"]), "value", "end"))
    if not is_null(row["difference_lo"]) and not is_null(row["difference_hi"]):
        ends = f"[{score(row['difference_lo'])}, {score(row['difference_hi'])}]"
        parts.append(svg.text(RIGHT, at + 13, ends, "tick small", "end"))
    return parts


# ------------------------------------------------------------------------------------------------------------------
# membership


def roc(rows: pd.DataFrame) -> Figure:
    """ROC of the mean NLL as a sign of membership, raw and with the base's taken off: a drawing a
    domain."""
    name, title = "em_roc", "Telling trained rows from held-out ones"
    caption = (
        "ROC of the mean NLL of a response under the fine-tuned model, and of the same minus that"
        " under its base: how many trained rows are found (upright) at what share of held-out ones"
        " taken for trained. Seeds and arms of a domain together. No judge is in it."
    )
    points = []
    for domain, part in rows.groupby("domain", sort=False) if len(rows) else ():
        for kind, losses in (
            ("raw", part["nll"]),
            ("base-adjusted", part["nll"] - part["base_nll"]),
        ):
            misses, hits = membership.roc(losses.astype(float), part["member"].astype(float))
            points += [
                {"domain": domain, "score": kind, "fpr": a, "tpr": b}
                for a, b in zip(misses, hits, strict=True)
            ]
    data = pd.DataFrame(points, columns=["domain", "score", "fpr", "tpr"])
    if data.empty:
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No domain had both trained and held-out rows with a score.",
        )
    ends = [(v, percent(v)) for v in (0, 0.5, 1)]
    x, y = Scale(0.0, 1.0, LEFT, RIGHT), Scale(0.0, 1.0, BOTTOM, TOP)
    panels = []
    for d, (domain, part) in enumerate(data.groupby("domain", sort=False)):
        parts = [svg.axes(x, y, ends, ends, "held-out rows taken for trained", "found")]
        parts.append(
            Markup('<path class="axis" d="M{} {}L{} {}"/>').format(
                *map(svg.f, (x(0), y(0), x(1), y(1)))
            )
        )
        for kind, style in (("raw", _RAW), ("base-adjusted", _ADJUSTED)):
            curve = part[part["score"] == kind]
            parts.append(svg.line(list(zip(curve["fpr"], curve["tpr"], strict=True)), x, y, style))
        head = shorten(domain, 34)
        panels.append(
            svg.draw(
                parts, title=f"{title}, {domain}", desc=caption, key=f"{name}-{d}", heading=head
            )
        )
    legend = svg.legend([(_RAW, "mean NLL"), (_ADJUSTED, "mean NLL − the base’s")])
    return Figure(name, title, caption, (("", tuple(panels)),), legend, data)


# ------------------------------------------------------------------------------------------------------------------
# scatters


def diversity(table: pd.DataFrame, judge: str) -> Figure:
    """The EM rate against how different a domain's rows are: a drawing an arm and measure, a mark a
    domain."""
    name, title = "em_diversity", "EM rate by diversity of a domain’s rows"
    caption = (
        "EM rate of a domain, asked as it was trained, against the diversity of its rows as the"
        " base embeds them. The Vendi score is an effective number of different rows. Judge:"
        f" {judge}."
    )
    data = table.reset_index(drop=True)
    panels = []
    for arm, rows in data.groupby("arm", sort=False) if len(data) else ():
        for measure, label in (("vendi", "Vendi score"), ("one_minus_cosine", "1 − mean cosine")):
            known = [
                r for r in rows_of(rows) if not is_null(r[measure]) and not is_null(r["em_rate"])
            ]
            if len(known) > 1:
                heading = f"{arm} arm" if arm else ""
                panels.append(
                    _scatter(
                        known, measure, "em_rate", label, heading, f"{name}-{len(panels)}", title
                    )
                )
    missing = "" if panels else "Diversity and EM rate are known of fewer than two domains."
    return Figure(name, title, caption, (("", tuple(panels)),) if panels else (), "", data, missing)


def prediction(table: pd.DataFrame, judge: str) -> Figure:
    """The EM rate as seen against what the other domains foretell it to be, a mark a domain."""
    name, title = "em_prediction", "EM rate, foretold from membership"
    caption = (
        "Each domain’s EM rate as a line through all others foretells it from how well its trained"
        " rows are told from held-out ones (log-ratio to the base, PREMIA); on the diagonal"
        f" foretold = seen. Judge: {judge}."
    )
    data = table.reset_index(drop=True)
    panels = []
    for arm, rows in data.groupby("arm", sort=False) if len(data) else ():
        known = [
            r for r in rows_of(rows) if not is_null(r["predicted"]) and not is_null(r["em_rate"])
        ]
        if len(known) > 1:
            key = f"{name}-{len(panels)}"
            panels.append(
                _scatter(
                    known, "predicted", "em_rate", "foretold", f"{arm} arm", key, title, percent
                )
            )
    missing = (
        ""
        if panels
        else (
            "Fewer than four domains have both a membership score and an EM rate: none can be"
            " foretold."
        )
    )
    return Figure(name, title, caption, (("", tuple(panels)),) if panels else (), "", data, missing)


def _scatter(
    rows: Sequence[Mapping[str, Any]],
    along: str,
    up: str,
    xlabel: str,
    heading: str,
    key: str,
    title: str,
    form: Callable[[object], str] | None = None,
) -> Markup:
    xs, ys = [float(r[along]) for r in rows], [float(r[up]) for r in rows]
    room = (max(xs) - min(xs) or abs(max(xs)) or 1.0) * 0.12
    x, y = (
        Scale(min(xs) - room, max(xs) + room, LEFT, RIGHT),
        Scale(0.0, max(0.1, max(ys) * 1.1), BOTTOM, TOP),
    )
    xticks = [(v, form(v) if form else f"{v:g}") for v in svg.ticks(x.lo, x.hi, 4)]
    parts = [
        svg.axes(x, y, xticks, [(v, percent(v)) for v in svg.ticks(0, y.hi, 4)], xlabel, "EM rate")
    ]
    if form is percent:  # both axes are the same rate
        ends = max(x.lo, y.lo), min(x.hi, y.hi)
        if ends[0] < ends[1]:
            parts.append(svg.line([(v, v) for v in ends], x, y, svg.Style("k2", "2 3", "")))
    taken: list[tuple[float, bool]] = []
    for row in sorted(rows, key=lambda r: float(r[up])):
        a, b = x(float(row[along])), y(float(row[up]))
        parts.append(
            svg.marker(
                a, b, _ADJUSTED, f"{row['domain']}: {number(row[along])}, {percent(row[up])}", 3.6
            )
        )
        right, line = a < (LEFT + RIGHT) / 2, b + 4
        # names do not lie on each other
        while any(abs(line - other) < 11 and right == side for other, side in taken):
            line -= 11
        taken.append((line, right))
        parts.append(
            svg.text(
                a + (7 if right else -7),
                line,
                shorten(row["domain"], 22),
                "tick",
                "start" if right else "end",
            )
        )
    said = "; ".join(f"{r['domain']}: {number(r[along])}, {percent(r[up])}" for r in rows)
    return svg.draw(parts, title=f"{title} {heading}", desc=said, key=key, heading=heading)


# ------------------------------------------------------------------------------------------------------------------
# heat maps


def cosines(table: pd.DataFrame) -> Figure:
    """Cosines of the domains' directions: a grid of domains a block, a few blocks side by side."""
    name, title = "em_cosines", "Cosines of the domains’ directions"
    caption = (
        "Cosine of the directions (misaligned − aligned) of two domains, a grid a block; on the"
        " diagonal a direction’s reliability (no cosine), beside which one is to be read:"
        " directions measured with noise cannot agree better than with themselves."
    )
    data = table.reset_index(drop=True)
    if data.empty or data["cosine"].isna().all():
        return Figure(
            name, title, caption, data=data, missing="No two directions could be compared."
        )
    blocks = sorted({int(b) for b in data["block"]})
    drawn = _spread(blocks, MOST_BLOCKS)
    groups = []
    for a, (arm, mine) in enumerate(data.groupby("arm", sort=False)):
        domains = list(dict.fromkeys([*mine["domain"], *mine["other"]]))
        panels = []
        for block in drawn:
            values = {}
            for r in rows_of(mine[mine["block"] == block]):
                same = r["domain"] == r["other"]
                values[r["domain"], r["other"]] = values[r["other"], r["domain"]] = (
                    r["ceiling"] if same else r["cosine"]
                )
            panels.append(
                _heat(
                    domains,
                    domains,
                    values,
                    f"block {block}",
                    f"{name}-{a}-{block}",
                    title,
                    _two,
                    1.0,
                )
            )
        groups.append((f"{arm} arm", tuple(panels)))
    if len(drawn) < len(blocks):
        caption += f" {len(drawn)} of {len(blocks)} blocks are drawn, all are in the table below."
    return Figure(name, title, caption, tuple(groups), "", data)


def transfer(table: pd.DataFrame, judge: str) -> Figure:
    """Steering with one domain's direction on another's model, less the same with a random
    direction of that norm."""
    name, title = "em_transfer", "Steering one domain’s model with another’s direction"
    caption = (
        "Mean alignment when the model of the column is steered with the direction of the row,"
        " minus the same under a random direction of that norm. Below 0 (red): the direction"
        f" misaligns. Coherence stands in the table. Judge: {judge}."
    )
    data = table.reset_index(drop=True)
    if data.empty or data["difference"].isna().all():
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No steered answer was rated beside its control.",
        )
    sources, targets = (list(dict.fromkeys(data[c])) for c in ("source", "target"))
    names = list(dict.fromkeys([*sources, *targets]))
    values = {(r["source"], r["target"]): r["difference"] for r in rows_of(data)}
    top = max(1.0, float(data["difference"].abs().max()))
    panel = _heat(names, names, values, "model of", name, title, lambda v: number(v, 0), top)
    return Figure(name, title, caption, (("", (panel,)),), "", data)


def _two(value: Any) -> str:
    """A cosine without its nought, so that it fits a square: .07, −.31."""
    return f"{float(value):.2f}".replace("0.", ".", 1).replace("-", "\u2212")


def _heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], Any],
    heading: str,
    key: str,
    title: str,
    form: Callable[[Any], str],
    top: float,
) -> Markup:
    """A grid of numbers on blue (above 0) or red (below), the deeper the further from 0; what is
    not known stays blank."""
    left, size = 116.0, min(44.0, (RIGHT - 116.0) / len(columns))
    small = " small" if size < 30 else ""
    height = min(size, 30.0)
    parts = [
        svg.text(left + size * (j + 0.5), TOP + 2, f"{j + 1}", "tick", "middle")
        for j in range(len(columns))
    ]
    for i, mine in enumerate(rows):
        y = TOP + 8 + height * i
        parts.append(svg.text(4, y + height / 2 + 4, f"{i + 1} {shorten(mine, 16)}", "tick"))
        for j, other in enumerate(columns):
            parts += _square(
                values.get((mine, other)),
                f"{mine}, {other}",
                left + size * j,
                y,
                size,
                height,
                small,
                form,
                top,
            )
    said = "; ".join(f"{a} and {b}: {form(v)}" for (a, b), v in values.items() if not is_null(v))
    bottom = TOP + 8 + height * len(rows)
    return svg.draw(
        parts, title=f"{title}, {heading}", desc=said, key=key, heading=heading, height=bottom + 8
    )


def _square(
    value: Any,
    what: str,
    x: float,
    y: float,
    width: float,
    height: float,
    small: str,
    form: Callable[[Any], str],
    top: float,
) -> list[Markup]:
    box = (svg.f(x + 0.75), svg.f(y + 0.75), svg.f(width - 1.5), svg.f(height - 1.5))
    if is_null(value):
        blank = Markup('<rect class="blank" x="{}" y="{}" width="{}" height="{}">{}</rect>')
        return [blank.format(*box, svg.tooltip(f"{what}: not measured"))]
    depth = min(1.0, abs(float(value)) / top)
    css = "k1" if float(value) >= 0 else "k0"
    shape = Markup(
        '<rect class="bar {}" fill-opacity="{}" x="{}" y="{}" width="{}" height="{}">{}</rect>'
    )
    ink = " onheat" if depth > 0.6 else ""
    return [
        shape.format(css, svg.f(0.06 + 0.94 * depth), *box, svg.tooltip(f"{what}: {form(value)}")),
        svg.text(
            x + width / 2,
            y + height / 2 + (3 if small else 4),
            form(value),
            f"heat{small}{ink}",
            "middle",
        ),
    ]
