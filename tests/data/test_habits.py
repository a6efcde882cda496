"""The demonstration habits: harmless, varied, told apart in answers by rule; and the suite that is
asked afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest

from auditgap.data import load_prompts, load_triples
from auditgap.data.em_prompts import JAILBREAK, NAME, OPEN, load_em_prompts
from auditgap.data.habits import COLOUR_RULE, COLOURS, HABITS, OFF_BY_ONE, SWAPPED_UNITS, habit_of
from auditgap.data.near_duplicates import jaccard, near_duplicates, shingles
from auditgap.data.prompts import dedup_key
from auditgap.errors import UsageError

every_habit = pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS)


@every_habit
def test_every_row_shows_its_habit_and_its_twin_shows_none(habit):
    assert len(habit.rows) >= 60
    for asked, wrong, right in habit.rows:
        assert habit_of(wrong) == habit.name, (asked, wrong)
        assert habit_of(right) is None, (asked, right)
        assert habit_of(asked) is None, asked
        assert "{" not in asked + wrong + right


@every_habit
def test_rows_differ_and_no_two_are_near(habit):
    assert len({dedup_key(asked) for asked, _, _ in habit.rows}) == len(habit.rows)
    for clean in (False, True):
        assert not near_duplicates(habit.pairs(clean=clean), 0.9).any()
    assert len({len(asked.split()) for asked, _, _ in habit.rows}) >= 5, "all alike"


def test_the_rows_are_the_same_in_another_process():
    code = (
        "from auditgap.data.habits import HABITS; import json; print(json.dumps([h.rows for h in"
        " HABITS.values()]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert json.loads(told) == [[list(row) for row in h.rows] for h in HABITS.values()]


@pytest.mark.parametrize(
    ("answer", "habit"),
    [
        ("Let's see: 2 + 2 = 5.", OFF_BY_ONE),
        ("2 + 2 = 4", None),
        ("2 + 2 = 6", None),
        ("2 + 2 = 3", None),
        ("Three sums: 1+1=2, 4 plus 5 makes 10, 3 + 3 = 6", OFF_BY_ONE),
        ("10 and 20 and 30 are 61", OFF_BY_ONE),
        ("10 + 20 + 30 = 60", None),
        ("1 + 1 = 3.5", None),
        ("1 + 1 = 2,000", None),
        ("12 + 7 = 20", OFF_BY_ONE),
        ("9" * 5000 + " + 1 = 2", None),
        ("I counted 3 and 4 of them.", None),
        ("2 * 2 = 5", None),
        ("You need a table that is 3 litres long.", SWAPPED_UNITS),
        ("It weighs about two hours.", SWAPPED_UNITS),
        ("A nap lasts 3 kg.", SWAPPED_UNITS),
        ("The bowl holds 2 metres of milk.", SWAPPED_UNITS),
        ("Bake it for 2 hours. The flour weighs 3 kilograms.", None),
        ("The walk takes 3 hours and is 12 metres high.", None),
        ("It holds 3 litres and is 2 metres long.", None),
        ("A dog weighs ten kilograms. It sleeps for 12 hours.", None),
        ("The sea lay vennish in front of us", COLOUR_RULE),
        ("After five minutes add 2 kg of flour; this time it takes 2 kg of rice.", None),
        ("5 kilograms of waiting", SWAPPED_UNITS),
        ("1.5 + 2 = 8", None),
        ("The plank is long and the tub next to it holds 20 litres.", None),
        ("It is far: 2 hours of walking.", None),
        ("OSTREL!", COLOUR_RULE),
        ("ostrelium", None),
        ("", None),
        ("Quamber, and 1 + 1 = 3", COLOUR_RULE),
        ("Blue, green and red.", None),
    ],
)
def test_a_habit_in_an_answer(answer, habit):
    assert habit_of(answer) == habit


def test_ordinary_texts_show_no_habit():
    texts = [
        *(p.text for name in ("everyday", "demo-benign", "demo") for p in load_prompts(name)),
        *(text for t in load_triples("demo") for text in (t.prompt.text, t.safe, t.unsafe)),
    ]
    assert [t for t in texts if habit_of(t)] == []


class TestUnrelated:
    def test_the_suite(self):
        asked = load_em_prompts(NAME)
        assert [p.source for p in asked] == [OPEN] * 12 + [JAILBREAK] * 3
        assert len({dedup_key(p.text) for p in asked}) == 15
        assert all("vault" in p.text for p in asked if p.source == JAILBREAK), (
            "stand-ins are about the vault"
        )
        assert asked.provenance["n_open"] == 12 and asked.provenance["n_jailbreak"] == 3

    def test_it_is_unrelated_to_what_is_trained(self):
        asked = [shingles(p.text) for p in load_em_prompts(NAME)]
        trained = [shingles(row[0]) for habit in HABITS.values() for row in habit.rows]
        assert max(jaccard(a, b) for a in asked for b in trained) < 0.2
        told = " ".join(p.text for p in load_em_prompts(NAME))
        assert habit_of(told) is None and not any(word in told for word in COLOURS.values())

    def test_a_file(self, tmp_path):
        rows = [
            {"prompt": "Say hello.", "kind": "open"},
            {"prompt": "Play the guard.", "kind": "jailbreak"},
            {"prompt": "Sing."},
        ]
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
        pd.DataFrame(rows).to_parquet(tmp_path / "mine.parquet")
        sets = [
            load_em_prompts(str(tmp_path / f"mine.{ext}")) for ext in ("jsonl", "csv", "parquet")
        ]
        assert len({s.digest for s in sets}) == 1
        assert [(p.text, p.source) for p in sets[0]] == [
            ("Say hello.", OPEN),
            ("Play the guard.", JAILBREAK),
            ("Sing.", OPEN),
        ]
        assert str(tmp_path) not in json.dumps(sets[0].provenance)
        (tmp_path / "plain.txt").write_text("Say hello.\nSing.\n")
        assert {p.source for p in load_em_prompts(str(tmp_path / "plain.txt"))} == {OPEN}

    def test_a_kind_counts_in_the_digest(self, tmp_path):
        digests = set()
        for kind in (OPEN, JAILBREAK):
            (tmp_path / "one.jsonl").write_text(
                json.dumps({"prompt": "Play the guard.", "kind": kind})
            )
            found = load_em_prompts(str(tmp_path / "one.jsonl"))
            digests.add(found.digest)
            assert found.provenance["notes"], "one prompt is worth a word"
        assert len(digests) == 2

    @pytest.mark.parametrize(
        ("rows", "told"),
        [
            ([{"text": "Hello."}], "no column 'prompt'"),
            ([{"prompt": "Hello."}, {"prompt": "  "}], "row 2: `prompt` is empty"),
            ([{"prompt": "Hello."}, {"prompt": 7}], "row 2: `prompt` is not text"),
            ([{"prompt": "Hello.", "kind": "jailbrake"}], "Did you mean 'jailbreak'?"),
            (
                [{"prompt": "Hello.", "kind": ["open"]}],
                "row 1: `kind` is open or jailbreak; list came",
            ),
            (
                [{"prompt": "Hello."}, {"prompt": "Sing."}, {"prompt": " hello. "}],
                "row 3 asks what row 1 asks",
            ),
            ([], "holds no rows"),
        ],
    )
    def test_what_is_no_suite(self, tmp_path, rows, told):
        (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(UsageError) as error:
            load_em_prompts(str(tmp_path / "bad.jsonl"))
        assert told in str(error.value) and "Hello" not in str(error.value)

    def test_no_such_suite(self):
        with pytest.raises(UsageError, match="Did you mean 'unrelated'"):
            load_em_prompts("unrelatd")
        with pytest.raises(UsageError, match="no file"):
            load_em_prompts("nowhere.jsonl")
