"""The page of one or more run folders, whatever they audited.

write([RunFolder.load("out")])                     # out/report.html, figures/*.csv, tables/*.csv
html = render(from_store([RunFolder.load("out")]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from auditgap.audits.report_part import ReportPart
from auditgap.errors import UsageError
from auditgap.report import frame, gather, latent, page, section, verdicts
from auditgap.report.charts import Figure
from auditgap.report.gather import PartData, ReportData
from auditgap.report.page import Copies
from auditgap.report.section import Section
from auditgap.report.verdict_lines import Criteria
from auditgap.store import RunFolder
from auditgap.store.remote import Place, outputs

__all__ = ["ReportData", "figures_of", "from_store", "render", "write"]


#: What a single audit's run may lack, by the audit's command, and how it is asked for.
_MISSING = {"lvs": "no minimum distance was searched for; add --distance"}


def by_table() -> list[ReportPart]:
    """Every audit's part of a report, in the order of `AUDITS`: so the verdict table goes."""
    from auditgap.audits.table import AUDITS  # which opens the audits, and they write pages

    return [audit.report_part for audit in AUDITS.values()]


def by_page() -> list[ReportPart]:
    """The same in the order of a page, which begins with what states an audit gap."""
    return sorted(by_table(), key=lambda part: not part.audit.states_gap)


def from_store(
    folders: Sequence[RunFolder],
    *,
    allow_raw: bool = False,
    title: str | None = None,
    read: Mapping[str, PartData] | None = None,
) -> ReportData:
    """What run folders hold of every audit. Prompts and completions are read only with `allow_raw`.
    `read`: what is read already, by audit."""
    known = read or {}
    parts = [
        (lambda *_, data=known[part.audit.name]: data) if part.audit.name in known else part.gather
        for part in by_page()
    ]
    return gather.from_store(folders, parts, allow_raw=allow_raw, title=title)


def audited(report: ReportData) -> list[Section]:
    """The sections of every audit; where there are none, those of a latent audit, empty as they
    are."""
    made = [section for part in by_page() for section in part.sections(report)]
    made = made if section.shown(made) else [*latent.sections(report), *made]
    return [section.renamed(one, report.names) for one in made]


def with_verdicts(report: ReportData) -> ReportData:
    """The report with the lines of the audits that it has, by its criteria or ours, where
    nobody drew any."""
    if report.verdicts:
        return report
    parts = [part for part in by_table() if list(part.subjects(report))]
    criteria = Criteria.model_validate(report.criteria)
    lines = verdicts.verdicts(report, parts, criteria, _MISSING) if parts else []
    asked = {criterion.id for part in parts for criterion in part.criteria}
    return replace(
        report,
        verdicts=tuple(lines) if any(line.id in asked for line in lines) else (),
        limits=tuple(verdicts.limits(report, parts or by_table())),
        criteria=criteria.model_dump(),
    )


def sections_of(report: ReportData) -> list[Section]:
    """All sections of the page."""
    report = with_verdicts(report)
    return frame.sections_of(report, audited(report))


def render(report: ReportData) -> str:
    """The page. Raw text is on it only if `report.exchanges` holds any (see
    `from_store(allow_raw=True)`)."""
    report = with_verdicts(report)
    made = audited(report)
    return page.render(frame.sections_of(report, made), frame.frame_of(report, made))


def figures_of(report: ReportData) -> dict[str, Figure]:
    """The report's figures by name; each `data` is what goes into figures/<name>.csv."""
    return section.figures_of(sections_of(report))


def write(
    folders: Sequence[RunFolder],
    *,
    out: Place | None = None,
    allow_raw: bool = False,
    title: str | None = None,
    read: Mapping[str, PartData] | None = None,
    copies: Copies = Copies(),
) -> Path:
    """Write report.html and the data of its tables and figures into `out` (None: the first folder),
    each atomically; returns the page's path.

    With `allow_raw` the page holds prompts and completions and is readable by its owner only
    (0600). `read`: as for `from_store`. Raises UsageError when no folder is given, DiskError when the disk is full.
    """
    if not folders:
        raise UsageError(
            "A report needs at least one run folder; none came. For example: auditgap report out"
        )
    report = from_store(folders, allow_raw=allow_raw, title=title, read=read)
    if out is not None:
        with outputs(out) as home:
            return write_report(report, home, private=allow_raw, copies=copies)
    path = write_report(report, folders[0].path, private=allow_raw, copies=copies)
    folders[0].publish()
    return path


def write_report(
    report: ReportData, home: Path, *, private: bool = False, copies: Copies = Copies()
) -> Path:
    """Write the page and its data into a folder; `private`: the page is for its owner alone. Raises
    as `write`."""
    report = with_verdicts(report)
    made = audited(report)
    sections = frame.sections_of(report, made)
    return page.write(sections, frame.frame_of(report, made), home, private=private, copies=copies)
