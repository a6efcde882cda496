"""What an audit has in a report: its data, its sections, its lines of the verdict table.

    class LengthsPart(ReportPart):
        def sections(self, report):
            return [Section(id="lengths", title="Lengths", contents="Lengths", blocks=(figure, table))]

A report is made of these by `audits.pages` and `audits.bundle`. An audit that says nothing of it
has one section with its tables, which is in the page's contents, in report.json and in tables/*.csv
as every other is. A subclass says more; no torch here or in what it imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from auditgap.report.columns import of_table
from auditgap.report.correction import Correction
from auditgap.report.gather import PartData, ReportData, joined, names_in
from auditgap.report.section import Prose, Section, Table
from auditgap.report.verdict_lines import Criteria, Criterion, Line
from auditgap.report.verdicts import Limit
from auditgap.store import RunFolder

if TYPE_CHECKING:
    from auditgap.audits.audit import Audit


class ReportPart:
    """One audit's part of any report. It is asked for reports without that audit too."""

    title: str = ""  #: of its section, and of a page that begins with it; "": its name
    #: what its lines of the verdict table ask: a policy names them, other lines it cannot
    criteria: ClassVar[tuple[Criterion, ...]] = ()

    def __init__(self, audit: Audit[Any, Any, Any]) -> None:
        self.audit = audit
        self.title = self.title or _in_words(audit.name)

    def gather(
        self, folders: Sequence[RunFolder], corrections: Mapping[str, Correction]
    ) -> PartData:
        """Read what the run folders, those of other audits among them, hold of this one: its
        tables, those of several folders below each other. `corrections`: of shares for their
        judge's errors, by task."""
        mine = [f for f in folders if f.run.get("config", {}).get("audit") == self.audit.name]
        made = list(map(self.audit.tables, mine))
        names = dict.fromkeys(name for tables in made for name in tables)
        tables = {name: joined([t[name] for t in made if name in t]) for name in names}
        return PartData(
            title=self.title,
            is_there=bool(mine),
            values={"tables": {self.audit.name: tables}} if mine else {},
            subjects=_named(tables),
        )

    def tables(self, report: ReportData) -> Mapping[str, pd.DataFrame]:
        """What `gather` read."""
        return report.tables.get(self.audit.name, {})

    def sections(self, report: ReportData) -> list[Section]:
        """Its sections of the page; none, or such as are silent, where nothing is in the report."""
        tables = self.tables(report)
        if not tables:
            return []
        shown = [
            Table(name, _in_words(name), table, of_table(table)) for name, table in tables.items()
        ]
        return [
            Section(
                id=self.audit.command,
                title=self.title,
                contents=self.title,
                blocks=(Prose(self.audit.title), *shown),
            )
        ]

    def subjects(self, report: ReportData) -> Iterable[str]:
        """The names of those whom it measured."""
        return _named(self.tables(report))

    def lines(
        self, report: ReportData, subject: str, criteria: Criteria, missing: Mapping[str, str]
    ) -> list[Line]:
        """Its lines of the verdict table on one subject. `missing`: why a command was not run."""
        return []

    def limits(self, report: ReportData) -> list[Limit]:
        """What limits what the page can say of it."""
        return []


def _in_words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _named(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    return list(dict.fromkeys(name for table in tables.values() for name in names_in(table)))
