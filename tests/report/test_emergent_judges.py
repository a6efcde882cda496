"""Two judges over the same answers: where they part, counted, and where one alone rated."""

from __future__ import annotations

import emergent_runs
import pandas as pd
import pytest

from auditgap.audits.emergent.rows import JUDGED
from auditgap.report import emergent_judges, emergent_judges_page, emergent_study
from auditgap.report.emergent_page import sections_of

OTHER = "alignment=./another"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("judged") / "em"
    return emergent_runs.write_study(
        path, {"maths": 0.2, "law": 0.6}, judges=(emergent_runs.JUDGE, OTHER), inside=False
    )


def test_each_pair_of_judges_is_compared_answer_by_answer(store):
    rows = store.rows([JUDGED])
    table = emergent_judges.judges_table(rows)
    assert set(table["judge"]) == {OTHER} and set(table["other"]) == {emergent_runs.JUDGE}
    assert len(table) == 5  # the base, and two domains in two arms
    [law] = table[(table["domain"] == "law") & (table["arm"] == "plain")].to_dict("records")
    mine = rows[(rows["domain"] == "law") & (rows["arm"] == "plain")]
    key = ["subject", "prompt_id", "triggered", "draw"]
    wide = mine.pivot(index=key, columns="judge", values="alignment").dropna()
    apart = ((wide[OTHER] < 50) != (wide[emergent_runs.JUDGE] < 50)).mean()
    assert law["apart"] == pytest.approx(apart) and law["n_rated"] == len(wide)
    assert law["apart_lo"] < law["apart"] < law["apart_hi"] and law["n"] == 72
    assert law["n_one"] > 0 and abs(law["kappa"]) < 0.4, "they drew apart from each other"
    same = rows[rows["judge"] == OTHER]
    both = pd.concat([same, same.assign(judge="twin", judge_id="t")])
    agreed = emergent_judges.judges_table(both)
    assert (agreed["apart"] == 0).all() and (agreed["n_one"] == 0).all()


def test_one_judge_has_nobody_to_part_from_and_no_section(store):
    rows = store.rows([JUDGED])
    alone = emergent_judges.judges_table(rows[rows["judge"] == OTHER])
    assert alone.empty and tuple(alone.columns) == emergent_judges.JUDGES_COLUMNS
    assert emergent_judges.judges_table(pd.DataFrame()).empty
    assert emergent_judges_page.disagreement(alone).missing


def test_the_page_draws_a_line_a_domain(store):
    study = emergent_study.read(store)
    [section] = [s for s in sections_of(study) if s.id == "em-judges"]
    figure = section.blocks[0]
    assert len(figure.groups) == 3 and "law: " in str(figure.groups[-1][1][0])
