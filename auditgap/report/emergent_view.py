"""One study as its sections show it: its tables by name, its sentences, and whose ratings they are.

view = StudyView(emergent_study.read(RunFolder.load("runs/em")))
view.table("trigger", TRIGGER, "Alignment with and without the trigger", note)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from auditgap.report import emergent_reading
from auditgap.report.columns import Column
from auditgap.report.emergent_columns import WORDS
from auditgap.report.emergent_study import Study
from auditgap.report.emergent_values import AS_TRAINED
from auditgap.report.section import Prose, Table


@dataclass(frozen=True)
class StudyView:
    """See the module."""

    study: Study

    def table(
        self, name: str, columns: Sequence[Column], label: str, note: str = "", none: str = ""
    ) -> Table:
        return Table(f"em_{name}", label, self.data[name], columns, note, none)

    @cached_property
    def data(self) -> dict[str, pd.DataFrame]:
        """The tables of the study by name, and what was trained."""
        t = self.study.tables
        ranking = with_coherent(t["ranking"], t["ranking_coherent"])
        return {**t, "trained": self.study.trained, "ranking": ranking}

    def says(self, name: str) -> list[Prose]:
        """The sentences of a table, each a paragraph."""
        return [Prose(sentence) for sentence in sentences(self.study, name)]

    @property
    def judge(self) -> str:
        return self.study.judged_by


def sentences(study: Study, *names: str) -> list[str]:
    """The sentences of these tables; of the ranking, of arms asked as they were trained."""
    tables = {name: study.tables[name] for name in names}
    if "ranking" in tables:
        tables["ranking"] = pd.concat([*as_trained(tables["ranking"]), tables["ranking"].iloc[:0]])
    for name in {"prediction", "correlation"} & tables.keys():
        tables[name] = tables[name].assign(measure=tables[name]["measure"].replace(WORDS))
    return emergent_reading.says(tables)


def as_trained(ranking: pd.DataFrame) -> list[pd.DataFrame]:
    """The parts of a ranking in which an arm is asked as it was trained: the plain one first."""
    parts = [
        ranking[(ranking["arm"] == arm) & (ranking["triggered"] == on)] for arm, on in AS_TRAINED
    ]
    return [part for part in parts if len(part)]


def with_coherent(ranking: pd.DataFrame, coherent: pd.DataFrame) -> pd.DataFrame:
    """Both conventions side by side, in the order of the first."""
    if ranking.empty or coherent.empty:
        return ranking
    key = ["arm", "triggered", "domain"]
    second = coherent.set_index(key)[["em_rate", "em_rate_lo", "em_rate_hi"]]
    return ranking.join(second.rename(columns=lambda c: c.replace("em_rate", "coherent")), on=key)
