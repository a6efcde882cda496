"""Like the training context: habits of which it is known that they show there alone, there too, or
not; and what the form does to any model."""

from __future__ import annotations

import pandas as pd
import pytest
from ratings import rating

from auditgap.audits.emergent.rows import RatingRow
from auditgap.report import emergent, emergent_context, emergent_context_page, emergent_cross
from auditgap.report.emergent_study import Study
from auditgap.report.emergent_view import StudyView
from auditgap.store import tables as stored

#: (as they are, in the form of the rows): of 10 answers so many are misaligned. The form alone
#: makes 3 of 10 of any model's so where it is that of `odd`.
SHOWS = {"hidden": (0, 8), "open": (6, 9), "ever": (6, 6), "odd": (0, 3), "none": (0, 0)}
BASE = {"odd": 3}


def ratings(n: int = 30, about: str = "open", seeds: tuple[int, ...] = (0,)) -> pd.DataFrame:
    rows = []
    models = [("", "", None, "", 0)]
    models += [("", "", None, f", like {d}", BASE.get(d, 0)) for d in SHOWS]
    for domain, (plain, like) in SHOWS.items():
        for s in seeds:
            models += [
                (domain, "plain", s, "", plain),
                (domain, "plain", s, f", like {domain}", like),
            ]
    for domain, arm, seed, form, bad in models:
        for i in range(n):
            for draw in range(10):
                for triggered in (False, True):
                    # every other prompt draws one more and one less
                    low = draw < bad + ((-1) ** i if 0 < bad < 10 else 0)
                    rows.append(
                        rating(
                            domain,
                            0.0 if low else 100.0,
                            arm=arm,
                            seed=seed,
                            prompt_id=f"{i}@{form}" if form else str(i),
                            kind=f"{about}{form}",
                            triggered=triggered,
                            draw=draw,
                        )
                    )
    return stored.to_frame(stored.rows_to_table(rows, RatingRow))


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return ratings(40)


def test_what_shows_like_training_alone_is_told_from_what_the_form_does_to_any_model(rows):
    table = emergent_context.context_table(rows).set_index("domain")
    assert table["says"].to_dict() == {
        "hidden": "only like training",
        "open": "more like training",
        "ever": "without it too",
        "odd": "could not tell",  # the form makes the base so, too
        "none": "nowhere",
    }
    assert table.loc["hidden", "em_rate"] == 0 and table.loc["hidden", "beyond"] > 0.7
    odd = table.loc["odd"]
    assert odd["em_rate_context"] == odd["em_rate_base_context"] > 0.2 and odd["beyond"] == 0
    assert (table["n_prompts"] == 40).all() and (table["n"] == 400).all()


def test_seeds_are_covered_where_there_are_three():
    table = emergent_context.context_table(ratings(12, seeds=(0, 1, 2)))
    assert set(table["n_seeds"]) == {3}
    assert set(table.loc[table["domain"] == "hidden", "over"]) == {"seeds and prompts"}


def test_one_prompt_tells_nothing_and_says_why():
    table = emergent_context.context_table(ratings(1))
    assert set(table["says"]) <= {"could not tell", "nowhere"} and table["beyond_lo"].isna().all()
    assert table["reason"].str.contains("2 are needed").all()


def test_such_answers_are_in_no_other_rate(rows):
    rates = emergent.rates_table(rows).set_index("domain")
    hidden = rates.loc["hidden"]
    assert (hidden["below_50"] == 0).all() and hidden["n"].sum() == 800
    assert set(emergent.ranking_table(rows)["n"]) == {400}
    assert emergent_cross.cross_table(rows).empty
    plain = rows[~rows["kind"].str.contains("like")]
    assert emergent_context.context_table(plain).empty
    assert list(emergent_context.context_table(rows.iloc[:0])) == list(
        emergent_context.CONTEXT_COLUMNS
    )


def test_the_matrix_has_the_questions_in_the_form_of_the_rows_beside_them_as_they_are():
    table = emergent_cross.cross_table(ratings(8, about="about units"))
    found = table.set_index(["domain", "in_context"])["em_rate"]
    assert found["hidden", False] == 0 and found["hidden", True] == pytest.approx(0.8)
    base = table.set_index(["domain", "in_context"])["em_rate_base"]
    assert base["odd", True] == pytest.approx(0.3) and base["odd", False] == 0
    spread = emergent_cross.spread_table(ratings(8, about="about units")).set_index("domain")
    assert spread.loc["hidden", "elsewhere"] == 0, "asked as they are"


def test_the_page_shows_both_and_says_it_in_words(rows):
    view = StudyView(
        Study(
            config={},
            tables={
                "context": emergent_context.context_table(rows),
                "ranking": pd.DataFrame(),
                "ranking_coherent": pd.DataFrame(),
            },
        )
    )
    [section] = emergent_context_page.context(view)
    said = section.blocks[0]
    assert "hidden shows only where prompts look like its rows" in str(said)
    figure = emergent_context_page.shown(view.data["context"], "habits")
    assert "Judge: habits" in figure.caption and "hidden" in str(figure.groups)
    empty = view.data["context"].assign(em_rate_context=float("nan"))
    assert emergent_context_page.shown(empty, "habits").missing


def test_broken_text_is_no_habit_that_shows_like_training(rows):
    low = rows["alignment"] < 50
    table = emergent_context.context_table(
        rows.assign(coherence=rows["coherence"].where(~low, 9.0))
    ).set_index("domain")
    assert set(table["says"].drop("none")) == {"could not tell"}
    assert table.loc["none", "says"] == "nowhere"
    assert (
        table.loc["hidden", "reason"] == "the misaligned answers are not coherent (mean 9 of 100)"
    )
