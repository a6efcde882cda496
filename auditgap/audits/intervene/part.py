"""The intervention audit's part of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from auditgap.audits.report_part import ReportPart
from auditgap.report import intervene, intervene_page, left_out
from auditgap.report.correction import Correction
from auditgap.report.gather import PartData, ReportData, joined
from auditgap.report.section import Section
from auditgap.store import RunFolder


class IntervenePart(ReportPart):
    title = "Interventions"

    def gather(
        self, folders: Sequence[RunFolder], corrections: Mapping[str, Correction]
    ) -> PartData:
        read = [folder.rows([intervene.INTERVENE]) for folder in folders]
        rows = joined([part for part in read if "intervention" in part])
        table = intervene.interventions_table(rows, correction=corrections["harmful"])
        return PartData(
            title=self.title,
            is_there=bool(len(rows)),
            values={"interventions": table},
            left_out=[*left_out.of_answers("answer in the intervention audit", rows)],
        )

    def sections(self, report: ReportData) -> list[Section]:
        return intervene_page.sections(report)

    def subjects(self, report: ReportData) -> Iterable[str]:
        """None: it has no line of the verdict table."""
        return ()
