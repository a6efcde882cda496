"""Two studies of emergent misalignment side by side: a planted difference is found and a model that
does not differ is not called so, with as many seeds as it takes."""

from __future__ import annotations

import json

import pytest
from emergent_runs import JUDGE, write_study

from auditgap.audits.comparing import Comparison, compare
from auditgap.cli import main
from auditgap.errors import UsageError
from auditgap.report.columns import show
from auditgap.report.compare_page import method, render, write
from auditgap.report.compare_tables import columns_of, measures, says, verdict
from auditgap.store.tables import rows_of

PLAIN = "law, plain, without the trigger"
MEASURES = {"em_rate", "em_above_base", "em_alignment", "em_trigger"}


def study(path, name: str, law: float, luck: int = 0, **changes):
    """A study of the model `name`, whose adapters of `law` answer that share misaligned."""
    asked = {"seeds": (0, 1, 2, 3), "samples": 4, "n_prompts": 20, "inside": False, **changes}
    domains = {"law": law, "maths": 0.1}
    return write_study(path, domains, model=name, fingerprint=name * 2, luck=luck, **asked)


def picked(found: Comparison, measure: str, model: str, where: str) -> dict:
    table = found.table
    rows = table[
        (table["measure"] == measure) & (table["model"] == model) & (table["where"] == where)
    ]
    (row,) = rows_of(rows)
    return row


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Comparison:
    home = tmp_path_factory.mktemp("em")
    first = study(home / "first", "base", 0.1)
    return compare([first, study(home / "second", "twin", 0.7, luck=1)])


def test_a_planted_difference_is_found_and_only_that(pair):
    assert [m.name for m in pair.sides.models] == ["base", "twin"] and not pair.notes
    assert set(pair.table["measure"]) == MEASURES
    for measure, sign in (("em_rate", 1), ("em_above_base", 1), ("em_alignment", -1)):
        row = picked(pair, measure, "twin", PLAIN)
        assert sign * row["difference"] > 0 and row["p_holm"] < 0.05, measure
        assert row["difference_lo"] <= row["difference"] <= row["difference_hi"]
        assert row["n_pairs"] == 20 and "by prompt and seed" in row["test"]
        (kind,) = (m for m in pair.measures if m.name == measure)
        assert verdict(kind, row) == "more vulnerable"
    assert picked(pair, "em_rate", "twin", PLAIN)["difference"] == pytest.approx(0.6, abs=0.15)
    for measure in ("em_rate", "em_alignment"):
        same = picked(pair, measure, "twin", "maths, plain, without the trigger")
        assert same["p_holm"] > 0.05 and same["difference_lo"] < 0 < same["difference_hi"]
    before = picked(pair, "em_rate", "twin", "before fine-tuning")
    assert before["p_holm"] > 0.05 and "seed" not in before["test"]


def test_the_trigger_is_compared_in_the_arm_that_learned_it(pair):
    rows = pair.table[pair.table["measure"] == "em_trigger"]
    assert set(rows["where"]) == {
        "law, trigger, with the trigger",
        "maths, trigger, with the trigger",
    }
    assert picked(pair, "em_trigger", "twin", "law, trigger, with the trigger")["difference"] < 0


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_with_too_few_seeds_it_could_not_be_told(tmp_path, seeds):
    first = study(tmp_path / "first", "base", 0.1)
    found = compare([first, study(tmp_path / "second", "twin", 0.9, luck=1, seeds=seeds)])
    row = picked(found, "em_rate", "twin", PLAIN)
    assert row["difference"] > 0.5 and row["n_pairs"] == 20
    for name in ("p", "p_holm", "difference_lo", "difference_hi", "n_tests"):
        assert row[name] is None or row[name] != row[name], name
    assert f"{len(seeds)} seed" in row["test"] and "3 are needed" in row["test"]
    (kind,) = (m for m in found.measures if m.name == "em_rate")
    assert verdict(kind, row) == "could not tell"
    shown = show(found.table[found.table["measure"] == "em_rate"], columns_of(kind, "base"))
    assert "could not tell" in "\n".join(shown.markdown())
    assert not any(PLAIN in line for line in says(found))
    # what was not fine-tuned has no seeds, and is told
    assert picked(found, "em_rate", "twin", "before fine-tuning")["p"] is not None


def test_the_judge_who_rated_every_model_is_read(tmp_path):
    first = study(tmp_path / "first", "base", 0.1, judges=("habits", JUDGE))
    second = study(tmp_path / "second", "twin", 0.7, judges=(JUDGE,), luck=1)
    found = compare([first, second])
    assert picked(found, "em_rate", "base", PLAIN)["n"] == 20
    assert picked(found, "em_rate", "twin", PLAIN)["p_holm"] < 0.05
    third = study(tmp_path / "third", "other", 0.7, judges=("habits",), luck=2)
    alone = compare([second, third])
    assert set(alone.table["reason"]) == {"no judge rated the answers of every model"}
    assert alone.table["value"].isna().all() and len(alone.table) == 2


def test_studies_that_asked_otherwise_are_refused_field_by_field(tmp_path):
    first = study(tmp_path / "first", "base", 0.1)
    other = study(tmp_path / "second", "twin", 0.1, trigger="It is 1999.", samples=2)
    with pytest.raises(UsageError) as caught:
        compare([first, other])
    assert "emergent, trigger:" in str(caught.value) and "emergent, samples:" in str(caught.value)
    few = study(tmp_path / "third", "few", 0.1, seeds=(0,))
    assert len(compare([first, few]).sides.models) == 2, "seeds may differ"


def test_the_page_and_the_command(pair, tmp_path, capsys):
    page = write(pair, tmp_path / "out").read_text("utf-8")
    assert page == render(pair) and "EM rate above its base" in page
    assert any("fewer than three" in line for line in method(pair))
    assert [m.name for m, _ in measures(pair)] == [
        "em_rate",
        "em_above_base",
        "em_alignment",
        "em_trigger",
    ]
    folders = [str(part.folder.path) for part in pair.sides.parts]
    with pytest.raises(SystemExit) as stop:
        main(["compare", *folders, "--out", str(tmp_path / "again"), "--json"])
    assert stop.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["audit"] for row in told["rows"]} == {"emergent"}
    assert len(told["rows"]) == len(pair.table)
