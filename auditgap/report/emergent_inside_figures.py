"""The figures of what is inside fine-tuned models: membership, diversity, directions, transfer. Tables
of `report.emergent_inside` and `report.emergent_transfer` go in, `Figure`s come out.

    # figures/em_cosines.csv: every block, also those not drawn
    cosines(tables["cosines"]).data

Every caption that speaks of a rating names the judge. In heat maps a domain's number is its place in
the rows, so that columns need no turned words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
from markupsafe import Markup

from auditgap.report import emergent_membership, svg
from auditgap.report.charts import (
    Figure,
    Point,
    Series,
    Spread,
    heat,
    lines,
    numbers,
    shares,
)
from auditgap.report.emergent_transfer import ABLATE, ADD
from auditgap.report.figures import spread_out
from auditgap.report.text import number, percent, shorten
from auditgap.stats import membership
from auditgap.store.tables import rows_of

_RAW, _ADJUSTED = svg.Style("k1", "6 3", "square"), svg.Style("k0", "", "circle")
#: Blocks whose matrix is drawn; all of them are in the table and the CSV file.
MOST_BLOCKS = 6


def roc(rows: pd.DataFrame, reference: pd.DataFrame | None = None) -> Figure:
    """ROC of the mean NLL as a sign of membership, raw and with the base's, or the named
    reference's, taken off: a drawing a domain."""
    name, title = "em_roc", "Telling trained rows from held-out ones"
    others = list(emergent_membership.referred(rows, reference)) if len(rows) else []
    against, theirs = others[-1] if others else (emergent_membership.OWN_BASE, rows)
    caption = (
        "ROC of the mean NLL of a response under the fine-tuned model, and of the same minus that"
        f" under {_whose(against)}: how many trained rows are found (upright) at what share of held-out ones"
        " taken for trained. Seeds and arms of a domain together. No judge is in it."
    )
    points = []
    for domain, part in rows.groupby("domain", sort=False) if len(rows) else ():
        for kind, losses in (
            ("raw", part["nll"]),
            ("adjusted", part["nll"] - theirs.loc[part.index, "nll"]),
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
    ends = (0, 0.5, 1)
    x, y = shares("held-out rows taken for trained", ends), shares("found", ends)
    panels = []
    for d, (domain, part) in enumerate(data.groupby("domain", sort=False)):
        series = []
        for kind, style in (("raw", _RAW), ("adjusted", _ADJUSTED)):
            curve = part[part["score"] == kind]
            points = [Point(a, b) for a, b in zip(curve["fpr"], curve["tpr"], strict=True)]
            series.append(Series(points, style, Spread.NONE))
        panels.append(
            lines(
                series,
                x,
                y,
                title=f"{title}, {domain}",
                desc=caption,
                key=f"{name}-{d}",
                heading=shorten(domain, 34),
                diagonal=True,
            )
        )
    less = f"mean NLL − that of {_whose(against)}"
    legend = svg.legend([(_RAW, "mean NLL"), (_ADJUSTED, less)])
    return Figure(name, title, caption, (("", tuple(panels)),), legend, data)


def _whose(reference: str) -> str:
    own = reference == emergent_membership.OWN_BASE
    return "its base" if own else shorten(reference, 40)


def diversity(table: pd.DataFrame, judge: str) -> Figure:
    """The EM rate against how different a domain's rows are: a drawing an arm and measure, a mark a
    domain."""
    name, title = "em_diversity", "EM rate by diversity of a domain’s rows"
    caption = (
        "EM rate of a domain, asked as it was trained, against the diversity of its rows, as the"
        " base’s states or a named encoder have them. The Vendi score is an effective number of different rows. Judge:"
        f" {judge}."
    )
    data = table.reset_index(drop=True)
    panels = []
    for (arm, encoder), rows in data.groupby(["arm", "encoder"], sort=False) if len(data) else ():
        for measure, label in (("vendi", "Vendi score"), ("one_minus_cosine", "1 − mean cosine")):
            words = (f"{arm} arm" if arm else "", shorten(encoder, 24))
            heading, key = ", ".join(filter(None, words)), f"{name}-{len(panels)}"
            panels += _scatter(rows, measure, label, heading, key, title)
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
        key = f"{name}-{len(panels)}"
        panels += _scatter(rows, "predicted", "foretold", f"{arm} arm", key, title, percent)
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
    rows: pd.DataFrame,
    along: str,
    xlabel: str,
    heading: str,
    key: str,
    title: str,
    form: Callable[[float], str] | None = None,
) -> list[Markup]:
    """EM rate against a column, a mark a domain; [] with fewer than two. With a `form` both axes
    are the same rate, and the diagonal is where they agree."""
    known = rows_of(rows[rows[along].notna() & rows["em_rate"].notna()])
    if len(known) < 2:
        return []
    xs, top = [float(r[along]) for r in known], max(float(r["em_rate"]) for r in known)
    room = (max(xs) - min(xs) or abs(max(xs)) or 1.0) * 0.12
    points = [
        Point(
            float(r[along]),
            float(r["em_rate"]),
            tip=f"{r['domain']}: {number(r[along])}, {percent(r['em_rate'])}",
            name=r["domain"],
        )
        for r in known
    ]
    return [
        lines(
            [Series(points, _ADJUSTED, Spread.NONE, size=3.6, joined=False)],
            numbers(min(xs) - room, max(xs) + room, xlabel, form or "{:g}".format),
            numbers(0.0, max(0.1, top * 1.1), "EM rate", percent),
            title=f"{title} {heading}",
            desc="; ".join(p.tip for p in points),
            key=key,
            heading=heading,
            diagonal=form is not None,
        )
    ]


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
    drawn = spread_out(blocks, MOST_BLOCKS)
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
                heat(
                    domains,
                    domains,
                    values,
                    form=_two,
                    top=1.0,
                    title=title,
                    key=f"{name}-{a}-{block}",
                    heading=f"block {block}",
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
        "Mean alignment when the model of the column is steered with the direction of the row (or it"
        " is projected out), minus the same with a random direction as large. Below 0 (red): that"
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
    top = max(1.0, float(data["difference"].abs().max()))
    groups = []
    for by, rows in data.groupby("by", sort=True, dropna=False):
        panel = heat(
            names,
            names,
            {(r["source"], r["target"]): r["difference"] for r in rows_of(rows)},
            form=partial(number, digits=0),
            top=top,
            title=title,
            key=f"{name}-{by}",
            heading="model of",
        )
        groups.append((BY[str(by)] if data["by"].nunique() > 1 else "", (panel,)))
    return Figure(name, title, caption, tuple(groups), "", data)


#: What was done with a direction, in words.
BY = {ADD: "added", ABLATE: "projected out"}


def _two(value: Any) -> str:
    """A cosine without its nought, so that it fits a square: .07, −.31."""
    return f"{float(value):.2f}".replace("0.", ".", 1).replace("-", "\u2212")
