"""The leakage ledger: an overlap is found, counted and refused, or recorded; and no text reaches
the disk."""

from __future__ import annotations

import itertools
import json

import pytest

from auditgap.data.ledger import FITTED, MEASURED, ROLES, LeakageLedger
from auditgap.errors import UsageError
from auditgap.types import Prompt


def prompts(*numbers: int) -> list[Prompt]:
    return [Prompt(f"What colour is vault {i}?") for i in numbers]


@pytest.fixture
def overlapping() -> LeakageLedger:
    ledger = LeakageLedger()
    ledger.use("sft", prompts(1, 2, 3))
    ledger.use("anchor", prompts(4))
    ledger.use("evaluation", [*prompts(3, 4, 5), Prompt("  what COLOUR is\nvault 2?")])
    return ledger


def test_disjoint_is_silent():
    ledger = LeakageLedger()
    ledger.use("probe-train", prompts(1, 2))
    ledger.use("sft", prompts(1, 2))  # two uses of training do not leak into each other
    ledger.use("evaluation", prompts(3))
    ledger.use("pgd", prompts(3))  # nor do two measurements
    assert ledger.check() == {} == ledger.allowed


def test_an_overlap_is_refused_with_its_counts(overlapping):
    with pytest.raises(UsageError, match="allow_overlap: true") as caught:
        overlapping.check()
    text = str(caught.value)
    assert (
        "2 of 4 evaluation prompts were also used for sft" in text
        and "1 of 4 evaluation prompts were also used for anchor" in text
    )
    assert "vault" not in text and overlapping.allowed == {}


def test_an_overlap_that_is_allowed_is_recorded(overlapping, tmp_path):
    wanted = {"evaluation & sft": 2, "evaluation & anchor": 1}
    assert overlapping.check(allow_overlap=True) == wanted
    overlapping.save(tmp_path / "ledger.json")
    assert LeakageLedger.load(tmp_path / "ledger.json").allowed == wanted


@pytest.mark.parametrize(("a", "b"), itertools.permutations(ROLES, 2))
def test_every_pair_of_roles(a, b):
    ledger = LeakageLedger()
    ledger.use(a, prompts(1))
    ledger.use(b, prompts(1))
    forbidden = (a in MEASURED) != (b in MEASURED)
    assert bool(ledger.overlaps()) == forbidden
    assert set(ROLES) == {*FITTED, *MEASURED} and len(ROLES) == 7


def test_an_unknown_role_is_refused():
    with pytest.raises(UsageError, match="Did you mean 'evaluation'"):
        LeakageLedger().use("evalution", prompts(1))


def test_to_disk_and_back_without_a_word_of_text(overlapping, tmp_path):
    path = tmp_path / "ledger.json"
    overlapping.save(path)
    assert LeakageLedger.load(path).roles == overlapping.roles and len(overlapping.roles) == 5
    assert "vault" not in path.read_text().lower() and "colour" not in path.read_text().lower()
    again = tmp_path / "again.json"
    LeakageLedger.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_merged_ledgers_find_what_neither_saw_alone():
    training, audit = LeakageLedger(), LeakageLedger()
    training.use("sft", prompts(1, 2))
    audit.use("evaluation", prompts(2, 3))
    assert training.check() == audit.check() == {}
    audit.merge(training)
    assert audit.overlaps() == {"evaluation & sft": 1}
    training.use("anchor", prompts(3))
    assert audit.overlaps() == {"evaluation & sft": 1}  # what was merged is a copy


GOOD = {"schema": 1, "allowed_overlap": {}, "prompts": {"0" * 24: ["sft"]}}


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "schema": 2},
        {**GOOD, "prompts": {"0" * 24: ["stf"]}},
        {**GOOD, "prompts": {"What colour?": ["sft"]}},
        {**GOOD, "prompts": {"0" * 24: "sft"}},
        {**GOOD, "prompts": []},
        {"schema": 1},
        [],
        None,
    ],
)
def test_what_is_no_ledger_is_refused(bad, tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(GOOD))
    assert LeakageLedger.load(path).roles == {"0" * 24: {"sft"}}
    path.write_text(json.dumps(bad))
    with pytest.raises(UsageError, match="no leakage ledger"):
        LeakageLedger.load(path)


def test_a_torn_or_missing_file_is_refused(tmp_path):
    (tmp_path / "torn.json").write_text('{"schema": 1, "pro')
    for name in ("torn.json", "missing.json"):
        with pytest.raises(UsageError, match="no leakage ledger"):
            LeakageLedger.load(tmp_path / name)
