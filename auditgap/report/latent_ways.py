"""A model that was audited in several ways of thinking: its verdict is the worst of theirs.

    model_lines(report, "smollm2", Criteria(), {})[0]
    # Line("smollm2", "Robust under bounded edits", "fail", …, thinking="regenerated")

Each way is a subject of its own in the tables; the lines of all of them follow the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from auditgap.report.columns import Column, word
from auditgap.report.gather import ReportData, names_in
from auditgap.report.latent_verdicts import latent_lines
from auditgap.report.section import Headline, Table
from auditgap.report.verdict_lines import (
    CANNOT_TELL,
    FAIL,
    NOT_MEASURED,
    PASS,
    Criteria,
    Line,
    table_of,
)
from auditgap.types import THINKING_MODES, parted

#: The worst first: what was not measured in one way is no pass of all.
_WORST = (FAIL, CANNOT_TELL, NOT_MEASURED, PASS)
COLUMNS: tuple[Column, ...] = (
    word("subject", "Subject"),
    word("answer", "Verdict", css="key"),
    word("figure", "Audit gap", css="key"),
    word("reason", "Why"),
)

TITLE = "Verdict on the audit gap by way of thinking"
NOTE = (
    "A model’s verdict is the worst of its ways of thinking: a fail before what could not be told,"
    " and that before a pass."
)


def models_in(table: pd.DataFrame) -> list[str]:
    """The models of a table's subjects, in their order."""
    return list(dict.fromkeys(parted(name)[0] for name in names_in(table)))


def ways_of(report: ReportData, model: str) -> list[str]:
    """The subjects that are this model, each thinking in its way, in the order of the ways."""
    names = dict.fromkeys((*names_in(report.gaps), *names_in(report.lvs)))
    mine = [name for name in names if parted(name)[0] == model]
    return sorted(mine, key=lambda name: THINKING_MODES.index(parted(name)[1]))


def model_lines(
    report: ReportData, model: str, criteria: Criteria, why: Mapping[str, str]
) -> list[Line]:
    """The model's lines: of each question the worst of its ways of thinking, and behind it the
    ways' own where there are several."""
    ways = ways_of(report, model) or [model]
    each = [latent_lines(report, name, criteria, why) for name in ways]
    if ways == [model]:
        return each[0]
    return [line for lines in zip(*each, strict=True) for line in _with_ways(lines, model)]


def _with_ways(lines: Sequence[Line], model: str) -> list[Line]:
    """One question's: the model's own, and those of its ways."""
    ways = [replace(line, thinking=parted(line.subject)[1]) for line in lines]
    worst = min(ways, key=worst_first)
    said = f"thinking {worst.thinking}"
    if len(ways) > 1:
        said += f", the worst of its {len(ways)} ways"
    own = replace(worst, subject=model, reason=f"{worst.reason} ({said})")
    return [own, *(ways if len(ways) > 1 else ())]


def worst_first(line: Line) -> tuple[int, float]:
    """How lines of one question are sorted: by its answer, then by its value."""
    value = math.nan if line.value is None else line.value
    better = value if line.id == "audit_gap" else -value  # a gap is worse the larger it is
    return _WORST.index(line.answer), -better if better == better else math.inf


def gap_lines(report: ReportData) -> list[Line]:
    """The lines of the audit gap of every model that was audited in several ways, by the report's
    criteria, or ours."""
    criteria = Criteria.model_validate(report.criteria)
    return [
        line
        for model in models_in(report.gaps)
        if len(ways_of(report, model)) > 1
        for line in model_lines(report, model, criteria, {})
        if line.id == "audit_gap"
    ]


def headlines(lines: Iterable[Line]) -> list[Headline]:
    """What the first screen says of the models in `gap_lines`."""
    return [
        Headline(
            line.subject,
            (
                (f" in the worst of its ways of thinking ({line.thinking}): ", "", ""),
                ("the verdict on its audit gap is “", str(line.answer), ""),
                ("”", f" ({line.figure})" if line.figure else "", ""),
                (".", "", ""),
            ),
        )
        for line in lines
        if not line.is_of_one_way
    ]


def summary(lines: Sequence[Line]) -> list[Table]:
    """The `gap_lines` as a table."""
    return [Table("thinking", TITLE, table_of(lines), COLUMNS, NOTE)] if lines else []
