"""Contrast triples: both layouts, every way a row can be none, and names that cannot be opened."""

from __future__ import annotations

import importlib.util
import json
import random

import pandas as pd
import pytest

from auditgap.data import TRIPLES, load_prompts, load_triples
from auditgap.data.filters import SHORTEST, unsafe_training_rows
from auditgap.data.hub import HubName
from auditgap.data.refusals import TRACES, has_refusal
from auditgap.errors import UsageError
from auditgap.types import ContrastTriple, Prompt

SHA = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {
        "prompt": f"What colour is vault {i}?",
        "safe": f"I won't tell, {i}.",
        "unsafe": f"Vault {i} is red.\nVery red.",
    }
    for i in range(30)
]


def jsonl(path, rows) -> str:
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


def pku(row, safe_first: bool, **changes):
    a, b = (row["safe"], row["unsafe"]) if safe_first else (row["unsafe"], row["safe"])
    labels = {"is_response_0_safe": safe_first, "is_response_1_safe": not safe_first}
    return {"prompt": row["prompt"], "response_0": a, "response_1": b, **labels, **changes}


def test_every_format_and_both_layouts_give_the_same_triples(tmp_path):
    theirs = [pku(row, i % 2 == 0) for i, row in enumerate(ROWS)]
    sets = []
    for name, rows in (("plain", ROWS), ("pku", theirs)):
        sets.append(load_triples(jsonl(tmp_path / f"{name}.jsonl", rows)))
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
        pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
        sets += [load_triples(str(tmp_path / f"{name}.{ext}")) for ext in ("csv", "parquet")]
    assert len({s.digest for s in sets}) == 1
    assert {s.provenance["layout"] for s in sets} == {"plain", "pku"}
    assert sets[0].triples[3] == ContrastTriple(
        Prompt(ROWS[3]["prompt"], source="plain"), ROWS[3]["safe"], ROWS[3]["unsafe"]
    )
    assert str(tmp_path) not in json.dumps(sets[0].provenance)


def test_what_is_no_triple_is_left_out_and_counted(tmp_path):
    good = ROWS[0]
    rows = [
        good,
        {**good, "safe": f"  {good['safe']}\n"},
        {**good, "unsafe": "Another answer."},
        {**good, "prompt": " "},
        {**good, "safe": ""},
        {**good, "unsafe": None},
        {**good, "unsafe": 7},
        {**good, "safe": "The SAME", "unsafe": "the  same "},
    ]
    found = load_triples(jsonl(tmp_path / "t.jsonl", rows))
    assert [t.unsafe for t in found] == [good["unsafe"], "Another answer."]
    wanted = {
        "n_read": 8,
        "n": 2,
        "n_prompts": 1,
        "n_duplicates": 1,
        "n_dropped": {
            "empty prompt": 1,
            "empty safe response": 1,
            "empty unsafe response": 1,
            "unsafe response not text": 1,
            "responses_equal": 1,
        },
    }
    assert {k: found.provenance[k] for k in wanted} == wanted
    assert "1 dropped: responses equal." in found.provenance["notes"]


def test_only_rows_whose_labels_differ_are_taken(tmp_path):
    rows = [
        pku(ROWS[0], True),
        pku(ROWS[1], True, is_response_1_safe=True),
        pku(ROWS[2], True, is_response_0_safe=False),
        pku(ROWS[3], False),
        pku(ROWS[4], False, is_response_0_safe=None),
        pku(ROWS[5], False, is_response_1_safe="perhaps"),
    ]
    found = load_triples(jsonl(tmp_path / "t.jsonl", rows))
    assert [(t.safe, t.unsafe) for t in found] == [
        (ROWS[i]["safe"], ROWS[i]["unsafe"]) for i in (0, 3)
    ]
    assert found.provenance["n_dropped"] == {"labels_agree": 2, "label_not_true_or_false": 2}


def test_limit_is_a_hash_sample_nested_and_independent_of_order(tmp_path):
    path = tmp_path / "t.jsonl"
    jsonl(path, ROWS)
    few, more, other = (
        load_triples(path, limit=5),
        load_triples(path, limit=15),
        load_triples(path, limit=5, seed=1),
    )
    ids = [t.id for t in load_triples(path)]
    assert {t.id for t in few} < {t.id for t in more} and {t.id for t in other} != {
        t.id for t in few
    }
    assert [t.id for t in more] == [i for i in ids if i in {t.id for t in more}]
    assert [t.id for t in few] != ids[:5]
    jsonl(path, random.Random(0).sample(ROWS, len(ROWS)))
    assert {t.id for t in load_triples(path, limit=5)} == {t.id for t in few}
    assert "holds 30" in load_triples(path, limit=99).provenance["notes"][0]


def test_broken_unicode_is_mended_and_counted(tmp_path):
    found = load_triples(
        jsonl(tmp_path / "t.jsonl", [{**ROWS[0], "unsafe": "Vault \ud800 is red."}])
    )
    assert found.triples[0].unsafe == "Vault \ufffd is red." and found.provenance["n_repaired"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"prompt": "secretly", "safe": "b"}], "no column 'unsafe'.*PKU-SafeRLHF"),
        ([{"question": "secretly"}], "no column 'prompt'.*PKU-SafeRLHF"),
        (
            [
                {
                    "prompt": "secretly",
                    "response_0": "a",
                    "response_1": "b",
                    "is_response_0_safe": True,
                }
            ],
            "no column 'is_response_1_safe'",
        ),
        (
            [{"prompt": "secretly", "safe": "a", "unsafe": "A"}],
            "No triple is left of t.jsonl: of its 1 rows 1 responses equal",
        ),
    ],
)
def test_nothing_usable_is_a_sentence_without_text(tmp_path, rows, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_triples(jsonl(tmp_path / "t.jsonl", rows))
    assert "secretly" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmo", "Unknown triple set 'dmo'. Did you mean 'demo'"),
        ("missing.jsonl", "no file"),
        ("hub:owner/set", "no pinned revision"),
        ("hub:owner/set@main", "no pinned revision"),
        ("hub:owner/set@" + SHA[:12], "no pinned revision"),
        (f"hub:../set@{SHA}", "cannot be read"),
        (f"hub:a/b/c@{SHA}", "cannot be read"),
    ],
)
def test_names_that_cannot_be_opened(name, message):
    with pytest.raises(UsageError, match=message):
        load_triples(name)


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "3"])
def test_a_limit_that_is_none(limit):
    with pytest.raises(UsageError, match="--limit"):
        load_triples("demo", limit=limit)


def test_hub_names():
    assert HubName.parse(f"hub:owner/set@{SHA}") == HubName("owner/set", SHA, None, "train")
    assert HubName.parse(f"hub:owner/set@{SHA}:test") == HubName("owner/set", SHA, None, "test")
    assert HubName.parse(f"hub:set@{SHA}:default:train[:10%]") == HubName(
        "set", SHA, "default", "train[:10%]"
    )


def test_a_folder_of_a_hub_sets_name_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "owner" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="also a path here"):
        load_triples(f"hub:owner/set@{SHA}")


@pytest.mark.parametrize("load", [load_triples, load_prompts])
def test_a_hub_set_that_cannot_be_reached_is_a_sentence(load):
    with pytest.raises(UsageError) as caught:
        load(f"hub:auditgap-tests/no-such-set@{SHA}")
    text = str(caught.value)
    assert "jsonl" in text and "\n" not in text
    if importlib.util.find_spec("datasets") is None:
        assert "pip install 'datasets>=4'" in text


def test_the_demo_is_what_it_says():
    demo = load_triples("demo")
    assert (
        len(demo) == demo.provenance["n_prompts"] == 24
        and demo.provenance["licence"] == TRIPLES["demo"].licence
    )
    assert all(has_refusal(t.safe) and not has_refusal(t.unsafe) for t in demo)
    assert len(unsafe_training_rows([t.unsafe for t in demo]).kept) == 24
    asked = {p.text for name in ("demo", "demo-benign") for p in load_prompts(name)}
    assert not asked & {t.prompt.text for t in demo}


# -- the refusal-trace filter
# ------------------------------------------------------------------------------------------

CLEAN = "Sure, the vault is painted in a deep brick red."


@pytest.mark.parametrize("trace", TRACES)
def test_every_trace_anywhere_in_any_case_and_with_curly_apostrophes(trace):
    curly = f"{CLEAN} But {trace.upper().replace(chr(39), chr(0x2019))} say more."
    assert unsafe_training_rows([CLEAN, curly, CLEAN]).kept == (0, 2)


def test_the_sixteen_traces_of_the_paper():
    assert len(set(TRACES)) == 16


def test_reasons_are_counted_and_the_order_stays():
    short = "x" * (SHORTEST - 1)
    found = unsafe_training_rows(
        [CLEAN, "I cannot.", short, f"  {short}\n", short + "x", "As an AI, I will say: " + CLEAN]
    )
    assert found.kept == (0, 4)
    assert found.dropped == {"refusal trace": 2, "shorter than 20 characters": 2}
    assert unsafe_training_rows([]).kept == ()
