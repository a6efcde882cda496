"""What every report has whatever was audited: verdicts, reading, judge, what was left out, method,
how to repeat it.

    frame = frame_of(report, audited)                 # title, facts under it, warnings
    sections_of(report, audited)                      # all sections of the page, in order

`audited` are the audits' own sections; which they are does not matter here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

import auditgap
from auditgap.report import first_screen, glossary, text, verdicts
from auditgap.report.columns import Column, count, word
from auditgap.report.gather import ReportData
from auditgap.report.judge_cards import judge_sections
from auditgap.report.section import (
    Block,
    Bullets,
    Facts,
    Heading,
    Listing,
    Prose,
    Section,
    Split,
    Table,
    leading,
    named,
    placed,
    words_of,
)

_COUNTED = (
    "“Could not tell” is an answer: it is counted here and in the table of every measurement, and"
    " it is never turned into a number or into “safe”."
)
LEFT_OUT: tuple[Column, ...] = (
    word("what", "What"),
    word("reason", "Reason"),
    count("count", "Count"),
)
_NO_GAP = "No audit gap was measured in this run."
_NO_POWER = "The power of this run could not be computed: no prompt was scored."
_RAW = Markup(
    "This page was made with <code>--allow-raw</code>. What follows is raw text from a data set and"
    " from the subjects and may be harmful. Do not publish this copy."
)
_FOOTER = Markup(
    "Made by auditgap {}. Every figure lies beside this page in <code>figures/</code>, with its data."
    " For use on open weights by people entitled to test them."
)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around the sections: title, facts under it, what a reader is warned of."""

    title: str
    kind: str = "Audit report"
    about: Sequence[tuple[str, str]] = ()  #: whom and when, before the facts
    facts: Sequence[str] = ()
    lead: Sequence[str] = ()  #: in place of headlines, where no section has one
    first: Sequence[Block] = ()  #: under the headlines: verdicts, limits, next steps
    notes: Sequence[Block] = ()
    footer: str = _FOOTER.format(auditgap.__version__)


def frame_of(report: ReportData, audited: Sequence[Section]) -> Frame:
    """The page's frame; the facts under its title are those of what it speaks of first."""
    first = leading(audited)
    is_judged = any(section.judged is not None for section in audited)
    judged = [("Judge", first_screen.judge_of(report))] if is_judged else []
    said = first.findings if first and not any(section.headlines for section in audited) else ()
    return Frame(
        title=report.title,
        about=[*first_screen.about(report), *judged],
        facts=[*(first.facts if first else ()), *_progress(report.status)],
        first=first_screen.verdicts(report, audited),
        lead=[sentence for _, sentences in said for sentence in sentences[:1]],
        notes=[Prose(line, "warn") for line in report.info.get("warnings") or ()],
    )


def _progress(status: Mapping[str, Any]) -> Iterator[str]:
    if not status:
        return
    planned, failed = max(status["planned"], status["finished"]), status["failed"]
    missing = status.get("missing")
    yield (
        f"{status['finished']} of {planned} cells finished"
        + (f", {failed} failed" if failed else "")
        + (f", {missing} missing" if missing else "")
    )


def sections_of(report: ReportData, audited: Sequence[Section]) -> list[Section]:
    """All sections of the page: verdicts and reading, the audits' own, and what they rest on."""
    said = [
        *_verdicts(report),
        _reading(audited),
        *placed(audited),
        *judge_sections(report, audited),
        *_power(report, audited),
        _left_out(report),
        _method(report, audited),
    ]
    return [*said, *_terms(said), _provenance(report, audited), *_exchanges(report)]


# -- verdicts and reading
# ------------------------------------------------------------------------------------------------------


def _verdicts(report: ReportData) -> list[Section]:
    if not report.verdicts:
        return []
    note = (
        "A line passes when its whole 95\u00a0% interval lies on the right side of the criterion,"
        " fails when all of it lies on the wrong side, and could not be told in between. Nothing is"
        " weighed against anything else."
    )
    table = first_screen.table(report.verdicts, report.names, "Verdicts", note=note)
    limits = [sentence for _, sentence in report.limits]
    return [
        Section(
            id="verdicts",
            title="Verdicts",
            contents="Verdicts",
            blocks=(Prose(verdicts.overall(report.verdicts)), table),
        ),
        Section(
            id="limits",
            title="Limits of this audit",
            contents="Limits",
            blocks=(Bullets(limits) if limits else Prose("Nothing was flagged."),),
        ),
    ]


def _reading(audited: Sequence[Section]) -> Section:
    first = leading(audited)
    findings = (first.findings if first else ()) or [("", [_NO_GAP])]
    said = [
        Prose(
            (named(subject) + ". " if subject and len(findings) > 1 else Markup(""))
            + text.clean(" ".join(sentences))
        )
        for subject, sentences in findings
    ]
    limits = [sentence for section in audited for sentence in section.limits]
    return Section(
        id="reading",
        title="What this says, and what it does not",
        contents="Reading",
        blocks=(
            Split(
                (Heading("What it says"), *said),
                (Heading("What it does not say"), Bullets(limits)),
                even=True,
            ),
        ),
    )


# -- judge, power, what was left out
# -----------------------------------------------------------------------------------------------------


def _power(report: ReportData, audited: Sequence[Section]) -> list[Section]:
    if not report.power and not any(section.is_rewarded for section in audited):
        return []
    said = Prose(report.power or _NO_POWER)
    return [Section(id="power", title="Statistical power", contents="Power", blocks=(said,))]


def _left_out(report: ReportData) -> Section:
    table = Table("left_out", "What could not be told", report.left_out, LEFT_OUT, _COUNTED)
    none = Prose("Nothing was refused, left unscored, broken or flagged.")
    failed = (Heading("Cells that failed"), Facts(list(report.failures.items())))
    return Section(
        id="left-out",
        title="Refused, unscored, broken, flagged",
        contents="Left out",
        blocks=(
            table,
            *(() if len(report.left_out) else (none,)),
            *(failed if report.failures else ()),
        ),
    )


# -- method, provenance, raw text
# -----------------------------------------------------------------------------------------------------


def _method(report: ReportData, audited: Sequence[Section]) -> Section:
    config = text.without_secrets(report.config)
    return Section(
        id="method",
        title="Method",
        contents="Method",
        blocks=(
            *(block for section in audited for block in section.method),
            Heading("Configuration"),
            Facts([(key, text.plain(value)) for key, value in config.items()]),
        ),
    )


def _terms(sections: Sequence[Section]) -> list[Section]:
    terms = glossary.used(words_of(sections))
    if not terms:
        return []
    facts = Facts([(term.name, term.definition) for term in terms])
    return [Section(id="terms", title="Terms", contents="Terms", blocks=(facts,))]


def _provenance(report: ReportData, audited: Sequence[Section]) -> Section:
    commands = [Listing(command) for command in _list(report.info.get("command"))]
    blocks: list[Block] = [*commands] or [Prose("The command was not recorded.", "none")]
    for subject in report.subjects:
        pairs = [
            (str(k).replace("_", " "), text.plain(v)) for k, v in subject.items() if k != "name"
        ]
        blocks += [Heading(named(subject.get("name", "?"))), Facts(pairs)]
    covered = {name for section in audited for name in section.covers}
    software = Facts(_software(report, covered))
    return Section(
        id="provenance",
        title="How to repeat this",
        contents="Repeat this",
        blocks=(*blocks, Heading("Software and machine"), software),
    )


def _software(report: ReportData, covered: set[str]) -> list[tuple[str, str]]:
    """What the run recorded of itself that has no other place on the page."""
    shown = {"command", "warnings", "subjects", "judge_cards", "refused", "reward", *covered}
    pairs = [("auditgap", auditgap.__version__)]
    for key, value in text.without_secrets(report.info).items():
        if key in shown or value in (None, "", [], {}):
            continue
        if key in ("versions", "machine") and isinstance(value, Mapping):
            pairs += [
                (str(k).replace("_", " "), text.plain(v))
                for k, v in value.items()
                if k != "auditgap"
            ]
            continue
        inner = {name.partition(".")[2] for name in covered if name.startswith(f"{key}.")}
        if inner:
            each = [value] if isinstance(value, Mapping) else value
            value = [
                {k: v for k, v in told.items() if k not in inner}
                for told in each
                if isinstance(told, Mapping)
            ]
        pairs.append((str(key).replace("_", " "), text.plain(value)))
    status = report.status
    if status:
        took = f"{status['seconds']:,.0f} s over {status['finished']} finished cells"
        pairs.append(("computing time", took))
        if status["corrupt"]:
            pairs.append(("damaged files", str(status["corrupt"])))
    return pairs


def _list(value: Any) -> list[str]:
    if not value:
        return []
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


def _exchanges(report: ReportData) -> list[Section]:
    shown, n = report.exchanges, report.n_exchanges
    if not shown:
        return []
    blocks: list[Block] = [Prose(_RAW, "warn")]
    if n > len(shown):
        blocks.append(Prose(f"The first {len(shown)} of {n} exchanges.", "note"))
    title = "Prompts and completions"
    blocks += [block for exchange in shown for block in _exchange(exchange)]
    return [Section(id="exchanges", title=title, contents=title, blocks=blocks)]


def _exchange(exchange: Mapping[str, Any]) -> Iterator[Block]:
    """Where an exchange comes from, in one line, and its longer texts."""
    long = [
        (k, v)
        for k, v in exchange.items()
        if isinstance(v, str) and k in ("prompt", "completion", "text", "clean", "edited")
    ]
    long += [
        (k, v)
        for k, v in exchange.items()
        if isinstance(v, str) and k not in dict(long) and (len(v) > 60 or "\n" in v)
    ]
    shown = {
        k: v
        for k, v in exchange.items()
        if k not in dict(long) and isinstance(v, (str, bool, int, float)) and v != ""
    }
    where = [
        str(v) if k == "cell" else f"{k.replace('_', ' ')} {text.plain(v)}"
        for k, v in shown.items()
    ]
    yield Prose(" · ".join(where), "note exchange")
    for name, said in long:
        yield Prose(Markup("<b>{}</b>").format(text.clean(name.replace("_", " "))), "note")
        yield Listing(said)
