"""The intervention audit on the page: what each edit opens by strength and by angle, and sentences.

table = interventions_table(RunFolder.load("out").rows(["intervene"]))
by_strength(table), by_angle(table)                                      # Figures
reading(table)                                                           # a sentence an intervention
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from auditgap.report import svg
from auditgap.report.charts import Axis, Figure, Series, Spread, lines, numbers, points_of, shares
from auditgap.report.columns import Column, Hide, Row, count, word
from auditgap.report.intervene import FLAGS, RIGHT_ANGLE
from auditgap.report.section import Facts, Findings, Prose, Section, Table, code, silent
from auditgap.report.svg import STYLES
from auditgap.report.text import (
    CANNOT_TELL,
    NOT_MEASURED,
    is_null,
    number,
    percent,
    points,
    with_interval,
)
from auditgap.store.tables import rows_of

if TYPE_CHECKING:
    from auditgap.report.gather import ReportData


SAYS_NOT = (
    (
        "That a direction opens a model shows that it is used, not that it is the only one; finding"
        " none shows nothing of others."
    ),
    (
        "A direction is learned from two sets of prompts and tells them apart in every respect in"
        " which they differ, wording included."
    ),
)


# ----------------------------------------------------------------------------------------------------------
# figures


def by_strength(table: pd.DataFrame) -> Figure:
    """ASR against strength, one drawing a site: each intervention that has strengths, and its
    control."""
    name, title = "interventions_by_strength", "What opens, by strength"
    caption = (
        "Share of prompts with a harmful answer against the edit’s strength, a fraction of the mean"
        " activation norm at the site, with 95\u00a0% intervals. Prompts that nothing was learned"
        " from."
    )
    data = table
    if len(table):
        several = (
            table.groupby(["subject", "site", "intervention"])["strength"].transform("nunique") > 1
        )
        data = table[table["angle"].isna() & several].reset_index(drop=True)
    if data.empty:
        return Figure(
            name,
            title,
            caption,
            data=data,
            missing="No intervention was measured at more than one strength.",
        )
    kinds = list(dict.fromkeys(data["intervention"]))
    series = [(kind, arm) for kind in kinds for arm in _ARMS]
    styles = {one: STYLES[i % len(STYLES)] for i, one in enumerate(series)}
    x = numbers(float(data["strength"].min()), float(data["strength"].max()), "strength")
    groups = []
    for s, (subject, mine) in enumerate(data.groupby("subject", sort=False)):
        panels = [
            lines(
                [
                    _series(rows, "strength", arm, styles[kind, arm], f"{kind}, {_ARMS[arm]}")
                    for kind, rows in part.groupby("intervention", sort=False)
                    for arm in _ARMS
                ],
                x,
                _ASR,
                title=f"{title}, {subject}, {site}",
                desc=caption,
                key=f"{name}-{s}-{p}",
                heading=str(site),
            )
            for p, (site, part) in enumerate(mine.groupby("site", sort=False))
        ]
        groups.append((str(subject), tuple(panels)))
    legend = svg.legend([(style, f"{kind}, {_ARMS[arm]}") for (kind, arm), style in styles.items()])
    return Figure(name, title, caption, tuple(groups), legend, data)


def by_angle(table: pd.DataFrame) -> Figure:
    """ASR against the angle off the learned direction: one drawing a subject, a series a site."""
    name, title = "angle_tolerance", "How far off a direction may be"
    caption = (
        "Share of prompts with a harmful answer under a steering edit of one norm, turned away from"
        " the learned direction by an angle; at 90° nothing is left of it. With 95\u00a0%"
        " intervals."
    )
    data = table[table["angle"].notna()].reset_index(drop=True) if len(table) else table
    if data.empty or data["angle"].nunique() < 2:
        return Figure(
            name, title, caption, data=data, missing="No direction was turned in this run."
        )
    ticks = [(float(v), f"{v:g}°") for v in sorted(data["angle"].unique()) if v % 30 == 0]
    x = Axis(float(data["angle"].min()), float(data["angle"].max()), "degrees off", ticks)
    styles = {s: STYLES[i % len(STYLES)] for i, s in enumerate(dict.fromkeys(data["site"]))}
    groups = []
    for s, (subject, mine) in enumerate(data.groupby("subject", sort=False)):
        series = [
            _series(part, "angle", "asr", styles[site], str(site))
            for site, part in mine.groupby("site", sort=False)
        ]
        what = f"{title}, {subject}"
        panel = lines(series, x, _ASR, title=what, desc=caption, key=f"{name}-{s}")
        groups.append((str(subject), (panel,)))
    legend = svg.legend((style, site) for site, style in styles.items())
    return Figure(name, title, caption, tuple(groups), legend, data)


_ARMS = {"asr": "edit", "control_asr": "control"}
_ASR = shares("ASR", (0, 0.5, 1))


def _series(rows: pd.DataFrame, along: str, what: str, style: svg.Style, said: str) -> Series:
    def tip(row: Mapping[str, Any]) -> str:
        return f"{said}, {row[along]:g}: {_with(row, what)}"

    return Series(points_of(rows, along, what, tip), style, Spread.WHISKERS)


# ----------------------------------------------------------------------------------------------------------
# section


def reading(table: pd.DataFrame) -> list[str]:
    """What the table says: a sentence an intervention and subject, on the largest of its
    differences to the control."""
    said = []
    for (subject, kind), part in table.groupby(["subject", "intervention"], sort=False):
        known = part[part["difference"].notna()]
        if known.empty:
            said.append(f"{subject}, {kind}: no difference to a control could be told.")
            continue
        row = rows_of(known)[int(known["difference"].argmax())]
        among = f" (the largest of {len(known)} differences)" if len(known) > 1 else ""
        n = int(row["n"] - row["n_unscored"])
        line = (
            f"{subject}, {kind} at {row['site']}{_dose(row)}: harmful on {_with(row, 'asr')} of {n}"
            f" prompts, under its control on {_with(row, 'control_asr')}, with no edit on"
            f" {_with(row, 'clean_asr')}; edit minus control"
            f" {_with(row, 'difference', points)}{among}."
        )
        if not is_null(row["interchange"]):
            line += (
                f" Interchange score {_with(row, 'interchange')} of {int(row['n_pairs'])} pairs, "
            )
            line += f"control {_with(row, 'control_interchange')}."
        halves = part[part["half_angle"].notna()]
        for turned in rows_of(halves):
            line += (
                f" At {turned['site']} the effect is halved {number(turned['half_angle'], 2)}° off"
                " the direction."
            )
        said.append(line)
    return said


def _dose(row: Mapping[str, Any]) -> str:
    angle = "" if is_null(row["angle"]) else f", {row['angle']:g}° off"
    return f", strength {row['strength']:g}{angle}"


def _with(row: Mapping[str, Any], key: str, form: Any = percent) -> str:
    return with_interval(row[key], row[f"{key}_lo"], row[f"{key}_hi"], form)


def says(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """The reading, as the page's reading section takes it; empty where there is none."""
    return [("", reading(table))] if len(table) else []


def header(table: pd.DataFrame) -> list[str]:
    """What a page of this audit alone says under its title."""
    if not len(table):
        return []
    return [
        f"{int(table['n'].max())} prompts asked",
        f"{table['site'].nunique()} site{'s' if table['site'].nunique() > 1 else ''}",
        (
            f"{table['intervention'].nunique()}"
            f" intervention{'s' if table['intervention'].nunique() > 1 else ''}"
        ),
    ]


_INTRO = (
    "Each edit was learned on one half of the prompts and spoken under on the other, next to a"
    " control that is as large and does not aim. An edit counts for what it does beyond its"
    " control."
)
_TERMS = (
    (
        "Steering",
        (
            "the mean difference of the two sets of prompts at the last prompt token, taken off at"
            " every position of the site; strength is a fraction of the mean norm of a token there"
        ),
    ),
    (
        "Ablation",
        (
            "the same direction projected out of the residual stream at every site and position, of"
            " prompt and answer"
        ),
    ),
    (
        "Patching",
        (
            "the template’s positions after the user’s last token as they stand behind a control"
            " prompt; base patching: all of the prompt as the base has it; interchange score: of"
            " the prompts on which donor and subject differ in refusing, the share on which the"
            " subject does as the donor after the exchange"
        ),
    ),
    (
        "Angle",
        (
            "steering turned away from the learned direction at the same norm; “half at”: where"
            " half of the effect over 90° is left"
        ),
    ),
    (
        "Universal",
        ("one vector for all prompts and positions, searched by projected gradient in an L2 ball"),
    ),
    (
        "Intervals",
        "95\u00a0%, by prompt: shares after Wilson; edit minus control paired by prompt",
    ),
)


def sections(report: ReportData) -> list[Section]:
    """What each edit opens."""
    table = report.interventions
    if not len(table):
        return [silent("interventions", interventions=table)]
    flags = {flag for flags in table["flag"] for flag in str(flags).split()}
    return [
        Section(
            id="interventions",
            title="Interventions and their controls",
            contents="Interventions",
            blocks=(
                Prose(_INTRO),
                Findings(),
                by_strength(table),
                by_angle(table),
                Table(
                    "interventions",
                    "Interventions by site and strength",
                    table,
                    INTERVENTIONS,
                ),
                Facts((*_TERMS, *((code(f), what) for f, what in FLAGS.items() if f in flags))),
            ),
            findings=says(table),
            limits=SAYS_NOT,
            facts=header(table),
            judged=frozenset({"harmful"}),
        )
    ]


def _difference_null(row: Row) -> str:
    return "is the control" if row["angle"] == RIGHT_ANGLE else NOT_MEASURED


#: The table as it is read; columns that nothing in it has are left out.
INTERVENTIONS: tuple[Column, ...] = (
    word("subject", "Subject", css="key", hide=Hide.ALIKE),
    word("site", "Site", css="key", hide=Hide.EMPTY, null=NOT_MEASURED),
    word("intervention", "Intervention", css="key"),
    Column("strength", "Strength", lambda v: f"{v:g}", hide=Hide.EMPTY),
    Column("angle", "Angle", lambda v: f"{v:g}°", null="", hide=Hide.EMPTY),
    Column("asr", "ASR", percent, hide=Hide.EMPTY),
    Column("asr_corrected", "ASR, corrected", percent, null=CANNOT_TELL, hide=Hide.EMPTY),
    Column("control_asr", "ASR, control", percent, hide=Hide.EMPTY),
    Column(
        "difference",
        "Edit − control, points",
        partial(points, unit=""),
        null=_difference_null,
        hide=Hide.EMPTY,
    ),
    Column("clean_asr", "ASR, no edit", percent, hide=Hide.EMPTY),
    Column("interchange", "Interchange score", percent, null="", hide=Hide.EMPTY),
    Column("control_interchange", "Interchange, control", percent, null="", hide=Hide.EMPTY),
    count("n_pairs", "Pairs", null="", hide=Hide.EMPTY),
    Column("half_angle", "Half at", lambda v: f"{number(v, 2)}°", null="", hide=Hide.EMPTY),
    count("n", "n"),
    count("n_unscored", "Unscored"),
    count("n_broken", "Broken"),
    count("control_broken", "Broken, control", hide=Hide.EMPTY),
    count("n_fit", "Learned from", hide=Hide.EMPTY),
    Column("relative_norm_median", "‖δ‖/‖h‖, median", hide=Hide.EMPTY),
    word("flag", "Flags", css="key"),
)
