"""The first screen of a report: whom it is about and who judged, the verdicts, what limits them, what
to do next.

    about(report)        # [("Model", "tuned, fingerprint 9c1e0f00"), ("Date", "30 November 2026"), …]
    verdicts(report)     # the verdict table, the two limits that matter most, and the next steps
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from auditgap.report import text
from auditgap.report.columns import Column, Row, word
from auditgap.report.gather import ReportData
from auditgap.report.latent_verdicts import is_screening
from auditgap.report.section import Block, Bullets, Heading, Section, Split, Table
from auditgap.report.verdict_lines import CANNOT_TELL, FAIL, NOT_MEASURED, Line, table_of
from auditgap.report.verdicts import CRITERIA

#: Lines that are no subject's.
_OF_THE_AUDIT = tuple(criterion.id for criterion in CRITERIA)
#: More models than this are counted in place of being named.
_MOST_MODELS = 3
#: Limits by their word, those that weigh most first; others follow in the order of the report.
_WEIGHT = ("failed", "leakage", "judge", "power", "unscored", "not_run")
_MOST_LIMITS, _MOST_STEPS = 2, 3
_NOTHING_LEFT = (
    "Every line has its answer. Read below what this does not say, and how it was measured."
)


def about(report: ReportData) -> list[tuple[str, str]]:
    """The model and its version, the date, and the judge with its quality."""
    found = [("Model", _models(report))] if report.subjects else []
    if last := report.status.get("last_write"):
        found.append(("Date", f"{last:%-d %B %Y}"))
    return found


def judge_of(report: ReportData) -> str:
    """Who judged, and how often that errs, in one line."""
    said = [_quality(card) for card in report.cards if card.get("task") in (None, "harmful")]
    return Markup("; ").join(said) if said else "no card says how often it errs"


def _models(report: ReportData) -> str:
    if len(report.subjects) > _MOST_MODELS:
        return f"{len(report.subjects)} models"
    return "; ".join(_model(subject, report.names) for subject in report.subjects)


def _model(subject: Mapping[str, Any], names: Mapping[str, str]) -> str:
    typed = str(subject.get("name", "?"))
    said = [text.called(names, typed)]
    if said[0] != typed:
        said.append(f"typed as {typed}")
    if subject.get("fingerprint"):
        said.append(f"fingerprint {str(subject['fingerprint'])[:12]}")
    return ", ".join([*said, *([str(subject["dtype"])] if subject.get("dtype") else [])])


def _quality(card: Mapping[str, Any]) -> Markup:
    found = [
        f"{name} {form(card[key])}"
        for key, name, form in (
            ("sensitivity", "sensitivity", text.percent),
            ("specificity", "specificity", text.percent),
            ("kappa", "κ", text.number),
        )
        if not text.is_null(card.get(key))
    ]
    said = ", ".join(found) or "its card has no figure"
    if not text.is_null(card.get("n")):
        said += f" on {text.plain(card['n'])} labelled answers"
    badge = Markup(' <span class="badge">screening</span>') if is_screening(card) else ""
    return Markup("{}{}: {}").format(text.clean(card.get("name", "judge")), badge, said)


def verdicts(report: ReportData, audited: Sequence[Section]) -> list[Block]:
    """The verdict table beside the limits and the next steps; without lines of a table the limits
    alone."""
    limits = _limits(report) or [line for section in audited for line in section.limits]
    beside: list[Block] = [Heading("What limits this most"), Bullets(limits[:_MOST_LIMITS])]
    if not report.verdicts:
        return beside if limits else []
    steps = list(_next(report.verdicts, report.names))[:_MOST_STEPS] or [_NOTHING_LEFT]
    beside = [*(beside if limits else ()), Heading("What to do next"), Bullets(steps)]
    lines = [line for line in report.verdicts if not line.is_of_one_way]
    return [Split((table(lines, report.names, "Verdicts, in short", COLUMNS[:-1]),), beside)]


def _limits(report: ReportData) -> list[str]:
    def weight(limit: tuple[str, str]) -> int:
        return _WEIGHT.index(limit[0]) if limit[0] in _WEIGHT else len(_WEIGHT)

    return [sentence for _, sentence in sorted(report.limits, key=weight)]


def _next(lines: Iterable[Line], names: Mapping[str, str]) -> Iterator[str]:
    """What would settle the lines that have no answer, each cause once."""
    lines = [line for line in lines if not line.is_of_one_way]
    several = len({line.subject for line in lines if line.id not in _OF_THE_AUDIT}) > 1
    seen: set[str] = set()
    for line in lines:
        is_open = line.answer in (CANNOT_TELL, NOT_MEASURED) or (
            line.answer == FAIL and line.cause == "screening"
        )
        cause = line.cause if line.answer == CANNOT_TELL else line.why
        if not is_open or cause in seen:
            continue
        seen.add(cause)
        is_of_one = several and line.subject and line.id not in _OF_THE_AUDIT
        whose = f" ({text.called(names, line.subject)})" if is_of_one else ""
        more = (
            "; use more prompts" if line.cause == "between" and "use more" not in line.why else ""
        )
        yield f"{line.question}{whose}: {line.why}{more}."


def _question(row: Row) -> Markup:
    """The question with its criterion, and the judge's name where it asks about a judge."""
    said = Markup("{}").format(text.clean(row["question"]))
    if row["id"] in _OF_THE_AUDIT and row["subject"]:
        said += f" ({text.clean(row['subject'])})"
    note = Markup('<br><span class="note">{}</span>')
    return said + note.format(row["criterion"]) if row["criterion"] else said


def _answer(row: Row) -> Markup:
    css = row["answer"].replace(" ", "-")
    return Markup('<span class="verdict {}">{}</span>').format(css, row["answer"])


#: The verdict table as it is read.
COLUMNS: tuple[Column, ...] = (
    word("question", "Question, and what a pass asks for", read=_question),
    word("answer", "Verdict", css="key", read=_answer),
    word("figure", "Figure", css="figure"),
    word("reason", "Why"),
)


def table(
    lines: Sequence[Line],
    names: Mapping[str, str],
    label: str,
    columns: Sequence[Column] = COLUMNS,
    note: str = "",
) -> Table:
    """Lines as a table, those of each subject under its name where there are several."""
    made = table_of(lines)
    audit = made["id"].isin(_OF_THE_AUDIT)
    whose = made["subject"].map(partial(text.called, names))
    by = "whose" if whose[~audit].nunique() > 1 else ""
    made = made.assign(whose=whose.where(~audit, "The audit itself"))
    return Table("", label, made, columns, note, by=by, css="verdicts")
