"""Subjects and judges behind an endpoint, a real one on loopback: what is paid for is asked once,
outages are no answers."""

from __future__ import annotations

import json
import stat
from typing import Any

import chat_endpoint
import pandas as pd
import pytest

from auditgap.audits import Grading, behaviour, regrade
from auditgap.audits.audit import run as run_audit
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.data import load_prompts
from auditgap.engines import Serving, openai
from auditgap.engines.journal import Journal
from auditgap.errors import AuditgapError
from auditgap.judges import card_cache, load_judge
from auditgap.judges.gold import load_gold
from auditgap.judges.harmless import harmless
from auditgap.store import DiskError

ASKING, BENIGN = ([p.text for p in load_prompts(name)] for name in ("demo", "demo-benign"))

CANARY = "sk-canary-4711"


class Endpoint(chat_endpoint.Endpoint):
    """Answers a subject's questions and a judge's; is out of order for those in `down`."""

    def __init__(self) -> None:
        self.down = ""
        super().__init__(self._said)

    def _said(self, body: dict[str, Any]) -> str | None:
        question = body["messages"][-1]["content"]
        if self.down and self.down in question:
            return None
        if body["model"] == "judge":
            return "refused" if "cannot" in question else "complied"
        return "I cannot tell you that colour today."


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setattr(openai, "Patience", lambda: openai_patience)
    with Endpoint().running() as server:
        yield server


openai_patience = openai.Patience(tries=2, first_pause=0.01, longest_pause=0.02)


def ask(endpoint, out, **more):
    values = {
        "models": "subject",
        "suite": "demo,demo-benign",
        "limit": 6,
        "judge": "refusal=judge",
        "endpoint": endpoint.url,
        "device": "cpu",
        "out": str(out),
        **more,
    }
    return run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, values))


def test_a_run_through_an_endpoint(endpoint, tmp_path):
    store, outcome = ask(endpoint, tmp_path / "run")
    assert (outcome.done, outcome.failed) == (2, {}) and endpoint.asked["subject"] == 12
    table = pd.read_parquet(store.path / "behaviour.parquet").set_index("kind")
    assert table["refusal"].tolist() == [1.0, 1.0] and table["n_unscored"].tolist() == [0, 0]
    said = pd.concat([store.generations(r["key"]) for r in store.records()])
    assert said["ids"].isna().all() and set(said["judge_reply"]) == {"refused"}
    assert not (store.path / "scratch" / "journals").exists()
    for file in store.path.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file


def test_outages_fail_the_run_and_what_was_answered_is_not_asked_again(endpoint, tmp_path):
    endpoint.down = ASKING[0][-20:]
    _, outcome = ask(endpoint, tmp_path / "run", limit=None, max_unscored=0.0)
    assert len(outcome.failed) == 2 and "questions got no answer (endpoint: 500" in next(
        iter(outcome.failed.values())
    )
    n_down = sum(endpoint.down in text for text in (*ASKING, *BENIGN))
    before = endpoint.asked["subject"]
    endpoint.down = ""
    _, outcome = ask(endpoint, tmp_path / "run", limit=None, max_unscored=0.0, retry_failed=True)
    assert outcome.done == 2 and not outcome.failed
    assert endpoint.asked["subject"] - before == len(BENIGN) + n_down, (
        "only what had no answer, and what was never asked"
    )


def test_judging_again_pays_no_reply_twice(endpoint, tmp_path):
    store, _ = ask(endpoint, tmp_path / "run")
    serving = Serving(engine="openai", base_url=endpoint.url)
    first = next(
        r["key"] for r in store.records() if r["description"]["settings"]["source"] == "demo"
    )
    endpoint.down, endpoint.asked["judge"] = store.generations(first)["prompt"][0], 0
    with pytest.raises(
        AuditgapError,
        match=r"gave no reply on \d+ of 6 answers \(judge: endpoint: 500 after 2 tries\)",
    ):
        regrade(store.path, Grading(judge="guard=judge", serving=serving, max_unscored=0.0))
    endpoint.down = ""
    new = regrade(store.path, Grading(judge="guard=judge", serving=serving, max_unscored=1.0))
    assert endpoint.asked["judge"] == 12 + 2, (
        "the one that failed was tried twice, then asked again"
    )
    assert len(new.rows(["behaviour"])) == 12 and not (new.path / "scratch" / "journals").exists()
    assert new.run["config"]["judge_endpoint"] == endpoint.url


def test_a_card_pays_no_reply_twice(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": f"Vault {i}?", "completion": f"I cannot say {i}.", "refusal": i % 2}
        for i in range(40)
    ]
    (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gold = load_gold(str(tmp_path / "gold.jsonl"))

    def measure():
        with load_judge(
            "refusal=judge", serving=Serving(engine="openai", base_url=endpoint.url)
        ) as judge:
            return card_cache.measure(judge, gold, inject=0)

    add, kept = Journal.add, []

    def killed():
        raise DiskError("the disk is full")

    monkeypatch.setattr(
        Journal, "add", lambda *a: killed() if len(kept) == 10 else kept.append(add(*a))
    )
    with pytest.raises(DiskError):
        measure()
    (journal,) = (tmp_path / "cache").rglob("*.jsonl")
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    monkeypatch.setattr(Journal, "add", add)
    # Questions that were under way at the kill may still arrive: those of the second run are told
    # by its key.
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    assert measure().n_unscored == 0
    assert endpoint.asked_with["Bearer second"] == 30 + len(harmless())
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_what_an_endpoint_says_does_not_hang_on_this_machine(endpoint):
    """A device here, and the dtype that it would be given, are no part of the question."""
    values = {"models": "subject", "suite": "demo", "judge": "keyword", "endpoint": endpoint.url}
    plan = behaviour.prepare(*BEHAVIOUR.read(None, values))
    assert plan.config.dtype == "auto" and "dtype" not in plan.cells[0].settings
    _, options = BEHAVIOUR.read(None, {"models": "m", "judge_endpoint": endpoint.url})
    assert (options.engine, options.judge_engine) == ("hf", "openai")


def test_a_few_outages_are_unscored_and_said(endpoint, tmp_path):
    endpoint.down = ASKING[0][-20:]
    store, outcome = ask(endpoint, tmp_path / "run", limit=None, max_unscored=0.3)
    assert not outcome.failed
    rows = store.rows(["behaviour"])
    assert (
        set(rows["unscored"]) == {"", "endpoint: 500 after 2 tries"}
        and rows["answered"].isna().sum() >= 1
    )
    assert behaviour.unscored_share(store) == 0.0, "what was never said is not the judge's"


@pytest.mark.parametrize("judge", ["refusal=judge", "majority(keyword,refusal=judge)"])
def test_a_judge_that_is_out_of_order_gives_no_verdicts_and_is_asked_again(
    endpoint, tmp_path, judge
):
    # stands in what the judge reads, not in what the subject is asked
    endpoint.down = "cannot tell you"
    _, outcome = ask(endpoint, tmp_path / "run", judge=judge)
    assert len(outcome.failed) == 2 and "judge's endpoint gave no reply on 12 of 12" in next(
        iter(outcome.failed.values())
    )
    endpoint.down, before = "", endpoint.asked["subject"]
    store, outcome = ask(endpoint, tmp_path / "run", judge=judge, retry_failed=True)
    assert outcome.done == 2 and endpoint.asked["subject"] == before
    assert set(store.rows(["behaviour"])["verdict"]) == {"refusal"}
