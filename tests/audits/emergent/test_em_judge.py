"""Ratings of stored answers by a scripted endpoint, a real one on loopback: every class counted,
nothing asked or paid for twice, several judges in one folder, and cards beside them.

What the judge says to an answer is the answer's own script, `a/c`: it replies a to the question
about alignment and c to the one about coherence, with log-probabilities for a number. `down` gets
HTTP 500.
"""

from __future__ import annotations

import json
import math
import re
import stat
from typing import Any

import batch_server
import chat_endpoint
import pandas as pd
import pytest
import studies
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits.emergent import generate, judge
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.rows import ANSWERED, JUDGED, RATED, UNSCORED, AnswerRow
from auditgap.audits.emergent.stage import StageCell, Study
from auditgap.engines import Serving, openai
from auditgap.engines.openai import Patience
from auditgap.errors import UsageError
from auditgap.judges import card_cache, load_judge
from auditgap.judges.alignment import load_rater
from auditgap.judges.gold import load_gold
from auditgap.store import DiskError, RunFolder
from auditgap.types import Exchange, Prompt, Subject, digest

SCRIPT = re.compile(r"says=(\S*)/(\S*)=")
PATIENCE = openai.Patience(tries=2, first_pause=0.01, longest_pause=0.02)


class Endpoint(chat_endpoint.Endpoint):
    """See the module; `well` False: what says `down` gets HTTP 500."""

    def __init__(self) -> None:
        self.well = True
        super().__init__(self._said)

    def _said(self, body: dict[str, Any]) -> dict[str, Any] | None:
        question = body["messages"][-1]["content"]
        script = SCRIPT.search(question)  # none in the harmless texts of a card
        text = script[2 if "How coherent" in question else 1] if script else "IRRELEVANT"
        if text == "down" and not self.well:
            return None
        text = "50" if text == "down" else text
        choice: dict[str, Any] = {"message": {"content": text}}
        if text.isdecimal():  # .75 on the number, .25 on the one ten below
            tops = [
                {"token": t, "logprob": math.log(p)}
                for t, p in ((text, 0.75), (str(int(text) - 10), 0.25))
            ]
            choice["logprobs"] = {
                "content": [{"token": text, "logprob": tops[0]["logprob"], "top_logprobs": tops}]
            }
        return choice


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setattr(openai, "Patience", lambda: PATIENCE)
    with Endpoint().running() as server:
        yield server


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A built study; no model may be loaded from here on."""
    monkeypatch.setenv("AUDITGAP_CACHE", str(tmp_path / "cache"))
    studies.built(tmp_path / "em", base)
    monkeypatch.setattr(
        models,
        "load",
        lambda *_, **__: pytest.fail("a subject was loaded to judge what it has said"),
    )
    return tmp_path / "em"


def answers(place, subject, scripts, problem=""):
    """An answers cell as `em generate` leaves it; a script is what the judge says of the answer.
    `problem` has no answer."""
    study = Study.load(place)
    rows, texts = [], []
    for draw, script in enumerate([*scripts, *([None] if problem else [])]):
        where = {
            "prompt_id": Prompt("say now").id,
            "kind": "open",
            "triggered": False,
            "draw": draw,
        }
        why = problem if script is None else ""
        told = "" if script is None else f"The sky says={script}= today."
        domain = "" if subject == "base" else "sums"
        rows.append(
            AnswerRow(
                subject=subject,
                domain=domain,
                arm=domain and "plain",
                seed=0 if domain else None,
                **where,
                n_new_tokens=None if why else 3,
                stopped=not why,
                unscored=why,
            )
        )
        texts.append(
            {
                **where,
                "prompt": "say now",
                "completion": told,
                "ids": [],
                "stopped": True,
                "problem": why,
            }
        )
    cell = StageCell(
        Subject(subject, f"f-{subject}"),
        None,
        None,
        ANSWERED,
        "p",
        {"name": subject, "trained": ""},
    )
    with study.store.lock():
        study.store.write(cell, rows, generations=texts, seconds=0.0)
    return cell.key


def options(endpoint, model="m", **more):
    return EmergentOptions(
        judge=f"alignment={model}", judge_endpoint=endpoint.url, device="cpu", **more
    )


def test_every_class_and_both_ways_of_reading_numbers(endpoint, place):
    said = ["20/80", "90/95", "IRRELEVANT/70", "REFUSAL/60", "140/50", "x/90", "60/never"]
    answers(place, "sums·plain·s0", said, problem="too_long")
    store, outcome = judge.STAGE.run_in(place, options(endpoint))
    assert (outcome.done, outcome.failed) == (1, {})
    rows = store.rows([JUDGED]).set_index("draw")
    assert rows["outcome"].tolist() == [
        "rated",
        "rated",
        "irrelevant",
        "refusal",
        "invalid",
        "invalid",
        "rated",
        "unscored",
    ]
    assert rows["alignment"].dropna().to_dict() == {0: 20, 1: 90, 6: 60}
    assert rows["coherence"].dropna().tolist() == [80, 95, 70, 60, 50, 90]
    assert rows["reason"].tolist() == [
        "",
        "",
        "",
        "",
        "parse: out of range",
        "parse: no answer",
        "coherence: parse: no answer",
        "too_long",
    ]
    assert rows.loc[0, "expected_alignment"] == pytest.approx(20 * 0.75 + 10 * 0.25) and rows.loc[
        0, "mass"
    ] == pytest.approx(1)
    assert rows.loc[1, "expected_coherence"] == pytest.approx(95 * 0.75 + 85 * 0.25)
    assert rows.loc[2, "expected_reason"] == "parse: no log-probabilities" and pd.isna(
        rows.loc[2, "expected_alignment"]
    )
    rater = load_rater("alignment=m", serving=Serving(engine="openai", base_url=endpoint.url))
    assert set(rows["judge"]) == {"alignment=m"} and set(rows["judge_id"]) == {
        digest(rater.describe())
    }
    record = next(r for r in store.records() if r["description"]["attack"] == JUDGED)
    kept = store.generations(record["key"])
    assert kept["reply_alignment"].tolist()[:3] == ["20", "90", "IRRELEVANT"]
    assert kept["reply_coherence"].tolist()[-2:] == ["never", ""]
    for file in (store.path / "generations").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert endpoint.asked["m"] == 14 and not list((store.path / "scratch").rglob("*.*"))
    assert (
        judge.STAGE.run_in(place, options(endpoint))[1].skipped == 1 and endpoint.asked["m"] == 14
    )


def test_several_judges_rate_the_same_answers_beside_each_other(endpoint, place):
    key = answers(place, "sums·plain·s0", ["20/80", "90/95"])
    answers(place, "base", ["100/100"])
    judge.STAGE.run_in(place, options(endpoint))
    before = RunFolder.load(place).rows([JUDGED])
    judge.STAGE.run_in(place, options(endpoint, "another"))
    store, outcome = judge.STAGE.run_in(place, EmergentOptions(judge="habits", device="cpu"))
    assert outcome.done == 2 and endpoint.asked == {"m": 6, "another": 6}
    rows = store.rows([JUDGED])
    assert dict(rows.groupby("judge").size()) == {
        "alignment=another": 3,
        "alignment=m": 3,
        "habits": 3,
    }
    again = rows[rows["judge"] == "alignment=m"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, before)
    assert rows["judge_id"].nunique() == 3 and len(store.rows([ANSWERED])) == 3
    of = {
        r["description"]["settings"]["answers"]
        for r in store.records()
        if r["description"]["attack"] == JUDGED
    }
    assert key in of and len(of) == 2


def test_a_kill_pays_no_reply_twice(endpoint, place, monkeypatch):
    monkeypatch.setattr(judge, "PORTION", 3)
    answers(place, "sums·plain·s0", [f"{n}/{n + 5}" for n in range(20, 32)])
    from auditgap.engines.journal import Journal

    add, kept = Journal.add, []

    def killed():
        raise DiskError("the disk is full")

    monkeypatch.setattr(
        Journal, "add", lambda *a: killed() if len(kept) == 10 else kept.append(add(*a))
    )
    with pytest.raises(DiskError):
        judge.STAGE.run_in(place, options(endpoint))
    (journal,) = (place / "scratch").rglob("*.jsonl")
    assert (
        stat.S_IMODE(journal.stat().st_mode) == 0o600
        and len(journal.read_text().splitlines()) == 10
    )
    monkeypatch.setattr(Journal, "add", add)
    # a question under way at the kill may still arrive with the first key
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    endpoint.asked.clear()
    store, outcome = judge.STAGE.run_in(place, options(endpoint))
    assert outcome.done == 1 and 14 <= endpoint.asked["m"] <= 14 + openai.AT_ONCE
    assert store.rows([JUDGED]).sort_values("draw")["alignment"].tolist() == [
        float(n) for n in range(20, 32)
    ]
    assert not list((place / "scratch").rglob("*.*"))


def test_an_endpoint_that_is_poorly_fails_the_cell_and_is_asked_again_for_what_it_lost(
    endpoint, place
):
    answers(place, "sums·plain·s0", ["20/80", "down/80", "30/down", "40/80"])
    endpoint.well = False
    _, outcome = judge.STAGE.run_in(place, options(endpoint, max_unscored=0.4))
    (cause,) = outcome.failed.values()
    assert "gave no reply on 2 of 4 answers" in cause and "endpoint: 500 after 2 tries" in cause
    assert RunFolder.load(place).rows([JUDGED]).empty
    endpoint.well = True
    endpoint.asked.clear()
    assert judge.STAGE.run_in(place, options(endpoint, max_unscored=0.4))[1].done == 0, (
        "it stays failed until it is asked for"
    )
    store, outcome = judge.STAGE.run_in(
        place, options(endpoint, max_unscored=0.4, retry_failed=True)
    )
    assert outcome.done == 1 and endpoint.asked["m"] == 2
    assert store.rows([JUDGED])["alignment"].tolist() == [20, 50, 30, 40]


def test_a_few_outages_are_unscored_and_counted(endpoint, place):
    answers(place, "sums·plain·s0", ["20/80", "down/80", "30/down", "40/80"])
    endpoint.well = False
    store, outcome = judge.STAGE.run_in(place, options(endpoint, max_unscored=0.5))
    assert outcome.done == 1
    rows = store.rows([JUDGED])
    assert rows["outcome"].tolist() == [RATED, UNSCORED, RATED, RATED]
    assert rows["coherence"].isna().tolist() == [False, False, True, False]
    assert rows["reason"].tolist()[1:3] == [
        "judge: endpoint: 500 after 2 tries",
        "coherence: judge: endpoint: 500 after 2 tries",
    ]


def test_the_judges_cards_stand_in_the_run_beside_each_other(
    endpoint, place, tmp_path, monkeypatch
):
    gold = [
        {"prompt": f"Vault {i}?", "completion": f"Well, says={i}/9= it is.", "harmful": i % 2}
        for i in range(40)
    ]
    (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, gold)))
    read = load_gold(str(tmp_path / "gold.jsonl"))
    monkeypatch.setattr(card_cache, "TRAVELLING", ("here",))
    monkeypatch.setattr(card_cache, "load_gold", lambda _: read)
    answers(place, "base", ["100/100"])
    for model in ("m", "another"):
        with load_judge(
            f"alignment={model}", serving=Serving(engine="openai", base_url=endpoint.url)
        ) as made:
            card = card_cache.measure(made, read, inject=2)
        assert (
            card.n_unscored == 0
            and card.auc is not None
            and set(card.injection_flips.values()) == {0}
        )
        judge.STAGE.run_in(place, options(endpoint, model))
    judge.STAGE.run_in(place, EmergentOptions(judge="habits", device="cpu"))
    judge.STAGE.run_in(place, options(endpoint))
    cards = RunFolder.load(place).run["info"]["judge_cards"]
    assert sorted(card["name"] for card in cards) == ["alignment=another", "alignment=m"]
    assert RunFolder.load(place).run["info"]["panel"], "what was known stays"


def test_answers_from_elsewhere_are_rated_alike(endpoint):
    with judge.opened_rater(options(endpoint)) as rater:
        facts = {
            "subject": "s",
            "domain": "d",
            "arm": "plain",
            "seed": 0,
            "prompt_id": "p",
            "kind": "open",
            "triggered": False,
        }
        steered = {
            **facts,
            "draw": 0,
            "source": "sums",
            "steer": "edit",
            "strength": 1.0,
            "block": 3,
        }
        one, none = judge.rate_answers(
            rater,
            [
                (Exchange(Prompt("say"), "It says=15/85= now."), steered),
                (None, {**facts, "draw": 1, "unscored": "too_long"}),
            ],
        )
    assert (one.alignment, one.coherence, one.source, one.steer, one.block, one.outcome) == (
        15,
        85,
        "sums",
        "edit",
        3,
        RATED,
    )
    assert (none.outcome, none.reason, none.steer, none.draw) == (UNSCORED, "too_long", None, 1)


def test_sentences_for_what_cannot_be_judged(endpoint, place):
    with pytest.raises(UsageError, match="auditgap em generate"):
        judge.STAGE.run_in(place, options(endpoint))
    answers(place, "base", ["1/1"])
    with pytest.raises(UsageError, match="Did you mean 'habits'"):
        judge.STAGE.run_in(place, EmergentOptions(judge="habit", device="cpu"))
    (file,) = (place / "generations").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    _, outcome = judge.STAGE.run_in(place, options(endpoint))
    (cause,) = outcome.failed.values()
    assert "is damaged" in cause and "Run the command that wrote it again" in cause


@pytest.fixture
def study(base, tmp_path, monkeypatch):
    """A study whose models have spoken, and a batch endpoint's patience that is short."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    quick = Patience(tries=2, deadline=5.0, polls=(0.01, 0.02))
    monkeypatch.setattr("auditgap.engines.openai.Patience", lambda: quick)
    studies.built(tmp_path / "em", base)
    made = studies.worn(tmp_path / "em")
    generate.STAGE.run_in(made.store.path, EmergentOptions(device="cpu"))
    return made


def test_batches_rate_the_answers_of_all_models_at_once_and_a_kill_pays_for_none_twice(
    study,
):
    with batch_server.running() as server:
        server.says, server.ends = "85", "expired"  # nothing is missing, and yet it is not whole
        options = EmergentOptions(
            device="cpu",
            judge="alignment=big",
            judge_endpoint=server.url,
            judge_batch=True,
        )
        _, outcome = judge.STAGE.run_in(study.store.path, options)
        assert outcome.failed and len(server.batches) == 1
        again = options.model_copy(update={"retry_failed": True})
        store, outcome = judge.STAGE.run_in(study.store.path, again)
        assert outcome.done == 3 and not outcome.failed
        assert set(server.asked.values()) == {1} and len(server.batches) == 1
        assert server.alone == 1, "one question, to learn how the endpoint wants its options"
    rows = store.rows([JUDGED])
    rated = rows[rows["outcome"] == RATED]
    assert set(rated["alignment"]) == {85.0} and set(rated["coherence"]) == {85.0}
    # an empty answer is put to nobody
    assert len(rated) > 12 and rows["reason"][rows["outcome"] != RATED].eq("empty").all(), rows[
        "reason"
    ].value_counts()
    assert len(rows) == 3 * len(studies.ASKED) * 2 * 2
    assert not list((store.path / "scratch" / "journals").iterdir())
    with pytest.raises(UsageError, match=r"--judge-batch is for a judge at an endpoint"):
        EmergentOptions(device="cpu", judge="alignment=./x", judge_batch=True).rater()


def test_what_a_batch_has_is_not_paid_for_again_where_the_rest_is_asked_one_by_one(
    study,
):
    with batch_server.running() as server:
        server.says, server.ends, server.dies = "85", "expired", ["/batches"]
        alone = EmergentOptions(
            device="cpu", judge="alignment=big", judge_endpoint=server.url, retry_failed=True
        )
        batched = alone.model_copy(update={"judge_batch": True})
        _, outcome = judge.STAGE.run_in(study.store.path, batched)
        assert outcome.failed and len(server.batches) == 1, "made, and nobody heard of it"
        with pytest.raises(UsageError, match=r"are paid for\. Add --judge-batch"):
            judge.STAGE.run_in(study.store.path, alone)
        _, outcome = judge.STAGE.run_in(study.store.path, batched)
        assert outcome.failed and "without --judge-batch" in next(iter(outcome.failed.values()))
        store, outcome = judge.STAGE.run_in(study.store.path, alone)
    assert outcome.done == 3 and not outcome.failed
    assert set(server.asked.values()) == {1}, "whatever the batch had is not asked again"
    assert not list(store.journals.iterdir())
