"""A study of emergent misalignment in a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from auditgap.audits.report_part import ReportPart
from auditgap.report import emergent_page
from auditgap.report.correction import Correction
from auditgap.report.emergent_study import Study, is_study, read
from auditgap.report.gather import PartData, ReportData
from auditgap.report.left_out import explained
from auditgap.report.section import Section
from auditgap.store import RunFolder


class EmergentPart(ReportPart):
    title = "Emergent misalignment"

    def gather(
        self, folders: Sequence[RunFolder], corrections: Mapping[str, Correction]
    ) -> PartData:
        return data_of([read(folder) for folder in folders if is_study(folder)])

    def sections(self, report: ReportData) -> list[Section]:
        return emergent_page.sections(report)

    def subjects(self, report: ReportData) -> Iterable[str]:
        """None: it has no line of the verdict table."""
        return ()


def data_of(studies: Sequence[Study]) -> PartData:
    """What a report shows of these studies."""
    return PartData(
        title=EmergentPart.title,
        is_there=bool(studies),
        values={"emergent": studies},
        left_out=[
            (what, explained(reason), number)
            for study in studies
            for what, reason, number in study.left_out
        ],
    )
