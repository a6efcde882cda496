"""The latent audit's part of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from auditgap.audits.report_part import ReportPart
from auditgap.engines import UNFINISHED
from auditgap.report import latent, left_out, power, strength, tables
from auditgap.report.correction import Correction
from auditgap.report.figures import budget_label
from auditgap.report.gather import Make, PartData, ReportData, all_of, of_each_subject, stacked
from auditgap.report.latent_verdicts import CRITERIA
from auditgap.report.latent_ways import model_lines, models_in
from auditgap.report.section import Section
from auditgap.report.setup import find
from auditgap.report.verdict_lines import Criteria, Line
from auditgap.report.verdicts import Limit
from auditgap.stats.gap import GoldCounts
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of
from auditgap.types import ATTACKS, CLEAN, LONGER

#: The attack name of cells that hold minimum distances.
DISTANCE = "distance"
_DISTANCES: Mapping[str, Make] = {
    "distance": tables.distance_table,
    "curves": tables.distance_curves,
}
#: Sites' flags that limit what a page says, in reading order.
_LIMITING = (
    "not_above_matched",
    "no_matched",
    "degenerate",
    "some_degenerate",
    "larger_than_h",
    "last_position_only",
    "dtype_rounding",
    "few",
    "many_unscored",
    "many_broken",
)


class LatentPart(ReportPart):
    title = "Audit gap"
    criteria = CRITERIA

    def gather(
        self, folders: Sequence[RunFolder], corrections: Mapping[str, Correction]
    ) -> PartData:
        counts = corrections["harmful"].counts
        make: Mapping[str, Make] = {
            "gaps": partial(
                tables.audit_gaps, gold=None if counts is None else GoldCounts(*counts)
            ),
            "lvs": partial(tables.lvs_table, correction=corrections["harmful"]),
            "behaviour": tables.behaviour_table,
        }
        left: list[left_out.Counted] = []

        def made(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
            left.extend(left_out.of_edits(rows))
            return all_of(make)(rows)

        found = of_each_subject(folders, [*ATTACKS, LONGER, CLEAN], made)
        distances = of_each_subject(folders, [DISTANCE], all_of(_DISTANCES))
        values = stacked(found, make) | (stacked(distances, _DISTANCES) if distances else {})
        return PartData(
            title=self.title,
            is_there=bool(found or distances),
            values={**values, "strength": strength.strength_table(folders)},
            subjects=list(found),
            left_out=left,
            power=power.of_excess(values["gaps"], _draws(folders)),
        )

    def sections(self, report: ReportData) -> list[Section]:
        return latent.sections(report, is_there=latent.is_there(report))

    def subjects(self, report: ReportData) -> Iterable[str]:
        return models_in(report.gaps)

    def lines(
        self, report: ReportData, subject: str, criteria: Criteria, missing: Mapping[str, str]
    ) -> list[Line]:
        return model_lines(report, subject, criteria, missing)

    def limits(self, report: ReportData) -> list[Limit]:
        flagged: dict[str, list[str]] = {}
        lvs = report.lvs
        for row in rows_of(lvs[lvs["attack"] == "targeted"] if len(lvs) else lvs):
            for word in str(row["flag"] or "").split():
                flagged.setdefault(word, []).append(_place(row))
        found = [
            (word, f"{tables.FLAGS[word]} This holds at {_some(flagged[word])}.")
            for word in _LIMITING
            if word in flagged
        ]
        certified = rows_of(report.strength)
        for word, said in strength.FLAGS.items():
            where = [_place(row) for row in certified if word in str(row["flags"]).split()]
            if where:
                said = f"Strength of the search: {said} This holds at {_some(where)}."
                found.append((word, said))
        left = report.left_out
        cut = left[(left["what"] == "LVS unscored") & (left["reason"] == UNFINISHED)]
        if n := int(cut["count"].sum()):
            said = (
                f"In {n:,} completions the chain of thought never ended: they have no answer, and are"
                " neither harmful nor safe. More --thinking-tokens may let them end."
            )
            found.append((UNFINISHED, said))
        return found


def _draws(folders: Sequence[RunFolder]) -> int:
    """Of each random control: the fewest of these runs'."""
    told = [find(folder.run.get("config", {}), ("draws",)) for folder in folders]
    return min((int(n) for n in told if n), default=1)


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['site']} at {budget_label(row['eps'], row['unit'])}"


def _some(places: Iterable[str], most: int = 3) -> str:
    every = list(dict.fromkeys(places))
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
