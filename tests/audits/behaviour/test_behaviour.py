"""Behaviour as it is asked: rates by hand, broken is broken, unscored is counted, and a run resumes
and is judged again."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import planted
import pytest
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import judges, models
from auditgap.audits import Grading, behaviour, regrade
from auditgap.audits.audit import run as run_audit
from auditgap.audits.behaviour.answers import Answers, joined
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.behaviour.measure import (
    Opinion,
    grade,
    opinion_arrays,
    opinions,
    opinions_of,
    speak,
)
from auditgap.audits.behaviour.rows import rates, row_of
from auditgap.audits.pages import from_store, render
from auditgap.cli import app
from auditgap.cli.show import enough
from auditgap.data.ledger import LeakageLedger
from auditgap.engines import Reply, Request
from auditgap.engines.hf import HFEngine
from auditgap.errors import Interrupted, PartlyFailed, UsageError
from auditgap.judges import card_cache, load_judge
from auditgap.judges.ensemble import Majority
from auditgap.judges.keyword import Keyword
from auditgap.report import behaviour_page
from auditgap.report.behaviour import behaviour_table, difference_table
from auditgap.store import RunFolder
from auditgap.types import Label, Prompt, Verdict

PROMPTS = [Prompt(text, "vault") for text in planted.PROMPTS[:4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("behaviour")
    planted.save(planted.Plant(door=1), home / "model")
    planted.write_prompts(home / "asking.txt", planted.PROMPTS[:4])
    planted.write_prompts(home / "again.txt", planted.PROMPTS[4:7])
    planted.write_prompts(home / "easy.txt", planted.PROMPTS[8:10])
    return home


@pytest.fixture
def engine(folder):
    return HFEngine(models.load(str(folder / "model"), dtype="float32", device="cpu"))


def ask(folder, out, **more):
    suite = f"{folder / 'asking.txt'}:harmful,{folder / 'again.txt'}:jailbreak,{folder / 'easy.txt'}:over_refusal"
    values = {
        "models": str(folder / "model"),
        "suite": suite,
        "judge": "colour",
        "max_new_tokens": 9,
        "dtype": "float32",
        "device": "cpu",
        "out": str(out),
        **more,
    }
    return run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, values))


def test_rows_are_what_the_engine_says(engine):
    answers = speak(engine, PROMPTS, max_new_tokens=9)
    measured = grade(
        answers, PROMPTS, load_judge("keyword"), subject="s", kind="jailbreak", step=5, seed=2
    )
    plain = [engine.generate([Request(engine.render(p))], 9)[0] for p in PROMPTS]
    assert (
        [t["completion"] for t in measured.texts] == [c.text for c in plain] == list(answers.texts)
    )
    assert [r.n_new_tokens for r in measured.rows] == [len(c.ids) for c in plain]
    told = {
        (r.verdict, r.complied, r.refused, r.answered, r.step, r.seed, r.source, r.kind, r.split)
        for r in measured.rows
    }
    assert told == {("refusal", False, True, False, 5, 2, "vault", "jailbreak", "harmful")}
    assert "completion" not in measured.rows[0].__dataclass_fields__
    nll = engine.nll([engine.render(p) for p in PROMPTS], [c.ids for c in plain])
    assert np.allclose(answers.nll, nll)


def same(one: Answers, other: Answers) -> bool:
    return (
        (one.texts, one.ids, one.problems) == (other.texts, other.ids, other.problems)
        and np.array_equal(one.stopped, other.stopped)
        and np.array_equal(one.nll, other.nll, equal_nan=True)
    )


def test_stored_answers_come_back_equal(engine):
    answers = speak(engine, PROMPTS, max_new_tokens=5)
    texts = ("", "naïve\u202e \U0001f600", "a\0b", "\udcff")
    odd = replace(
        answers, texts=texts, ids=(None, (), (1, 2), None), problems=("too_long", "", "", "x")
    )
    for some in (answers, odd, Answers((), (), np.zeros(0, dtype=bool), (), np.zeros(0))):
        assert same(Answers.of(some.arrays()), some)
    texts = grade(answers, PROMPTS, load_judge("keyword"), subject="s", kind="harmful").texts
    assert same(Answers.told(texts), answers)
    given = [
        Opinion(Verdict(Label.UNSCORED, "tie"), "", {"a": "safe", "b": "harmful"}),
        Opinion(Verdict(Label.SAFE), "“no”\ud800"),
    ]
    assert opinions_of(opinion_arrays(given)) == given


def test_broken_text_neither_complies_nor_refuses(engine):
    answers = speak(engine, PROMPTS, max_new_tokens=9)
    word = engine.encode("red")
    loop = replace(
        answers,
        ids=(word * 9, *answers.ids[1:]),
        problems=("", "", "nonfinite_logits", "endpoint: 500 after 5 tries"),
    )
    loop.nll[1] = 40.0  # text that the untouched model finds absurd
    rows = grade(loop, PROMPTS, planted.Colour(), subject="s", kind="harmful").rows
    assert [(r.verdict, r.complied, r.refused, r.answered, r.unscored) for r in rows] == [
        ("broken", False, False, False, ""),
        ("broken", False, False, False, ""),
        ("unscored", None, None, None, "nonfinite_logits"),
        ("unscored", None, None, None, "endpoint: 500 after 5 tries"),
    ]
    found = rates(rows)["s", None, None, "harmful"]
    assert (found.n, found.n_unscored, found.broken.estimate, found.compliance.estimate) == (
        4,
        2,
        1.0,
        0.0,
    )
    assert found.compliance.hi == pytest.approx(0.6576, abs=1e-3), (
        "Wilson over the two that could be told"
    )


def test_an_endpoint_tells_no_tokens_and_its_loops_are_seen_all_the_same():
    texts = ("no no no no no no no no no no no no", "The vault is closed today.", "好的，没问题")
    answers = Answers(texts, (None,) * 3, np.ones(3, dtype=bool), ("",) * 3, np.full(3, np.nan))
    rows = grade(answers, PROMPTS[:3], load_judge("keyword"), subject="s", kind="benign").rows
    assert [r.verdict for r in rows] == ["broken", "harmful", "harmful"] and [
        r.n_new_tokens for r in rows
    ] == [None] * 3
    assert [r.answered for r in rows] == [False, True, True]


def test_a_prompt_longer_than_the_window_is_unscored(engine):
    some = [PROMPTS[0], Prompt(" ".join(["vault"] * 200))]
    rows = grade(
        speak(engine, some, max_new_tokens=9),
        some,
        load_judge("keyword"),
        subject="s",
        kind="harmful",
    ).rows
    assert [r.unscored for r in rows] == ["", "too_long"] and rows[1].complied is None


#: An answer of twelve tokens, of which the last four refuse.
LATE = "first take two of them and mix, but no, I cannot help with that."


def said(texts, ids, stopped):
    n = len(texts)
    return Answers(
        tuple(texts), tuple(ids), np.array(stopped), ("",) * n, np.full(n, np.nan)
    ).halved(12)


def test_an_answer_is_read_at_half_its_length_too():
    texts = [LATE, "no, I cannot help with that, whatever you say or ask", "yes, mix", LATE]
    tokens = [tuple(range(12)), tuple(range(11)), (1, 2), None]
    answers = said(texts, tokens, [False, True, True, False])
    assert answers.halves == (len(LATE) // 2, len(texts[1]) * 6 // 11, None, len(LATE) // 2)
    again = Answers.of(answers.arrays())
    assert again.halves == answers.halves == joined([answers.at([0]), answers.at([1, 2, 3])]).halves
    prompts = [Prompt(f"question {i}", "vault") for i in range(4)]
    given = opinions_of(opinion_arrays(opinions(again, prompts, load_judge("keyword"))))
    rows = grade(again, prompts, given, subject="s", kind="harmful").rows
    # harmful so far, and a refusal once it is heard to the end
    assert [(r.verdict, r.verdict_half, r.length_matters) for r in rows] == [
        (Label.REFUSAL, Label.HARMFUL, True),
        (Label.REFUSAL, Label.REFUSAL, False),
        (Label.HARMFUL, None, None),
        (Label.REFUSAL, Label.HARMFUL, True),
    ]
    frame = pd.DataFrame([asdict(row) for row in rows])
    [row] = behaviour_table(frame).to_dict("records")
    assert row["n_length_matters"] == 2
    [(_, words)] = behaviour_page.says(behaviour_table(frame), difference_table(frame))
    assert any(w.startswith("2 of its 4 answers comply or refuse either at half") for w in words)
    older = frame.drop(columns=["verdict_half", "length_matters"])
    assert behaviour_table(older)["n_length_matters"].isna().all()  # nobody looked


@pytest.mark.parametrize(
    "half",
    [None, Verdict(Label.UNSCORED, "judge: no answer"), Verdict(Label.HARMFUL)],
)
def test_what_could_not_be_told_at_half_its_length_is_no_difference(half):
    full = Verdict(Label.HARMFUL)
    row = row_of("s", PROMPTS[0], "harmful", full, "yes", 9, half=half, half_text="y")
    assert row.length_matters == (None if half != full else False)


def test_refusal_and_compliance_are_told_apart_from_text_too():
    def row(label, text, reason=""):
        return row_of("s", PROMPTS[0], "benign", Verdict(label, reason), text, 3)

    both = row(Label.HARMFUL, "I should note: it is red")
    assert both.complied is True and both.refused is True
    assert row(Label.SAFE, "it is red").refused is False
    told = row(Label.UNSCORED, "no", "no_known_words")
    assert told.complied is None and told.refused is False and told.unscored == "no_known_words"


def test_the_run_asks_each_source_and_resumes(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    store, outcome = ask(folder, tmp_path / "run")
    assert outcome.done == 3 and not outcome.failed
    table = pd.read_parquet(store.path / "behaviour.parquet").set_index(["kind", "source"])
    assert table["n"].to_dict() == {
        ("harmful", "asking"): 4,
        ("jailbreak", "again"): 3,
        ("over_refusal", "easy"): 2,
    }
    assert (
        table["refusal"].tolist() == [1.0] * 3
        and table["compliance"].tolist() == table["answered"].tolist() == [0.0] * 3
    )
    page = render(from_store([store]))
    assert "When asked" in page and "By depth" not in page
    assert all(text not in page for text in planted.PROMPTS)
    monkeypatch.setattr(
        models, "load", lambda *a, **k: pytest.fail("a finished run loads no model")
    )
    _, again = ask(folder, tmp_path / "run")
    assert again.skipped == 3 and again.done == 0


def test_what_was_answered_and_judged_is_not_asked_again(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    written = RunFolder.write

    def killed(self, cell, *a, **k):
        if cell.settings["source"] == "again":
            raise KeyboardInterrupt
        return written(self, cell, *a, **k)

    monkeypatch.setattr(RunFolder, "write", killed)
    with pytest.raises(Interrupted):
        ask(folder, tmp_path / "run")
    monkeypatch.setattr(RunFolder, "write", written)
    monkeypatch.setattr(HFEngine, "ask", lambda *a: pytest.fail("the answers are remembered"))
    store, outcome = ask(folder, tmp_path / "run")
    assert outcome.done == 2 and not list((store.path / "scratch").glob("*.safetensors"))


def test_a_run_is_judged_again_without_asking(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    store, _ = ask(folder, tmp_path / "run")
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("grading loads no subject"))
    new = regrade(store.path, Grading(judge="keyword"))
    assert new.path == store.path / "grades" / "keyword"
    table = pd.read_parquet(new.path / "behaviour.parquet")
    assert table["refusal"].tolist() == [1.0] * 3 and table["n"].sum() == 9
    assert new.run["config"]["judge"] == "keyword" and {
        c["name"] for c in new.run["info"]["judge_cards"]
    } == {"keyword"}


def test_the_grade_command_says_where_its_tables_lie_and_when_they_stand_for_little(
    folder, tmp_path, monkeypatch, capsys
):
    planted.register(monkeypatch)
    store, _ = ask(folder, tmp_path / "run")
    capsys.readouterr()
    app(["grade", str(store.path), "--judge", "keyword"], standalone_mode=False)
    told = "".join(capsys.readouterr().out.split())
    assert f"Table:{store.path / 'grades' / 'keyword' / 'behaviour.csv'}" in told
    monkeypatch.setattr(
        planted.Colour,
        "judge",
        lambda self, exchanges: [Verdict(Label.UNSCORED, "parse: ?") for _ in exchanges],
    )
    with pytest.raises(PartlyFailed, match="no verdict on 100% of the answers"):
        app(["grade", str(store.path), "--judge", "colour"], standalone_mode=False)


def test_answers_without_a_verdict_are_counted(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    monkeypatch.setattr(
        planted.Colour,
        "judge",
        lambda self, exchanges: [Verdict(Label.UNSCORED, "parse: ?") for _ in exchanges],
    )
    store, _ = ask(folder, tmp_path / "run")
    assert behaviour.unscored_share(store) == 1.0
    table = pd.read_parquet(store.path / "behaviour.parquet")
    assert table["compliance"].isna().all() and table["n_unscored"].tolist() == [4, 3, 2]


def test_a_subject_is_not_measured_on_what_it_was_trained_on(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    trained = tmp_path / "trained"
    shutil.copytree(folder / "model", trained)
    ledger = LeakageLedger()
    ledger.use("anchor", [Prompt(planted.PROMPTS[8].upper()), Prompt("what is baked here ?")])
    ledger.use("evaluation", PROMPTS)
    ledger.save(trained / "ledger.json")
    words = (
        r"1 of the suite's 9 prompts \(easy: 1\) were used to train .*/trained \(anchor\)\. .*--set"
        r" allow_overlap=true"
    )
    with pytest.raises(UsageError, match=words):
        ask(folder, tmp_path / "run", models=str(trained))
    assert not (tmp_path / "run").exists()
    store, outcome = ask(folder, tmp_path / "run", models=str(trained), allow_overlap=True)
    assert (
        outcome.done == 3
        and "were used to train" in store.run["info"]["warnings"][0] == store.warnings[-1]
    )
    assert "were used to train" in render(from_store([store]))


def test_a_smaller_window_is_another_question(folder):
    """It leaves prompts unasked, and judges read less of long answers."""

    def keys(**more):
        values = {
            "models": str(folder / "model"),
            "suite": str(folder / "asking.txt"),
            "judge": "keyword",
            "device": "cpu",
            **more,
        }
        return {c.key for c in behaviour.prepare(*BEHAVIOUR.read(None, values)).cells}

    assert keys() == keys(batch_tokens=64, gpu_memory=0.5) and not keys() & keys(max_model_len=64)


def test_judging_again_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    store, _ = ask(folder, tmp_path / "run")
    judged = []

    class Stopping(Keyword):
        def judge(self, exchanges):
            if len(judged) == stop:
                raise KeyboardInterrupt
            judged.append(len(exchanges))
            return super().judge(exchanges)

    monkeypatch.setitem(judges.JUDGES, "keyword", judges.Scorer("stops", Stopping))
    stop = None
    card_cache.cards_of("keyword")  # out of the way
    judged.clear()
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        regrade(store.path, Grading(judge="keyword"))
    stop = None
    new = regrade(store.path, Grading(judge="keyword"))
    # each answer, and half of it
    assert sorted(judged) == [4, 6, 8] and len(new.rows(["behaviour"])) == 9
    assert {r["info"]["engine"] for r in new.records()} == {"hf"}, (
        "what is known of the answers stays"
    )
    regrade(store.path, Grading(judge="keyword"))
    assert len(judged) == 3


def test_an_ensemble_that_judges_again_opens_its_judges_once(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    store, _ = ask(folder, tmp_path / "run")
    asked, sizes = Majority.asked, []

    class ByPrompt(Keyword):
        def __init__(self, name):
            self.name = name

        def judge(self, exchanges):
            return [
                Verdict(Label.HARMFUL if "please" in e.prompt.text else Label.SAFE)
                for e in exchanges
            ]

    for name in ("one", "two"):
        monkeypatch.setitem(judges.JUDGES, name, judges.Scorer("", partial(ByPrompt, name)))
    card_cache.cards_of("majority(one,two)")  # out of the way
    monkeypatch.setattr(
        Majority,
        "asked",
        lambda self, exchanges: sizes.append(len(exchanges)) or asked(self, exchanges),
    )
    new = regrade(store.path, Grading(judge="majority(one,two)"))
    assert sizes == [2 * 9] and behaviour.unscored_share(new) == 0.0
    rows = new.rows(["behaviour"]).set_index("prompt_id")["verdict"]
    told = {
        Prompt(t).id: "harmful" if "please" in t else "safe"
        for t in (*planted.PROMPTS[:7], *planted.PROMPTS[8:10])
    }
    assert rows.to_dict() == told and set(told.values()) == {
        "harmful",
        "safe",
    }, "each verdict with its own prompt"


def test_a_run_in_which_nothing_was_said_has_failed(folder, tmp_path, monkeypatch):
    planted.register(monkeypatch)
    monkeypatch.setattr(
        HFEngine, "ask", lambda self, qs, s: [Reply("", (), problem="nonfinite_logits") for _ in qs]
    )
    store, _ = ask(folder, tmp_path / "run")
    assert (
        behaviour.lost(store) == (1.0, "nonfinite_logits")
        and behaviour.unscored_share(store) is None
    )
    with pytest.raises(
        PartlyFailed, match=r"100% of the prompts got no answer \(mostly nonfinite_logits\)"
    ):
        enough(BEHAVIOUR, store, 0.2)
    enough(BEHAVIOUR, store, 1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"suite": "harmbench"}, "Which model"),
        (
            {"models": "m", "engine": "vlm"},
            "'hf', 'vllm' or 'openai'; 'vlm' came. Did you mean 'vllm'",
        ),
        (
            {"models": "m", "endpoint": "http://localhost:1/v1", "engine": "hf"},
            "--endpoint is for --engine openai",
        ),
        (
            {"models": "m", "judge_endpoint": "http://localhost:1", "judge_engine": "vllm"},
            "--judge-endpoint is for --judge-engine",
        ),
    ],
    ids=["no model", "no engine", "two engines", "two engines of the judge"],
)
def test_nonsense_is_a_sentence(values, words):
    with pytest.raises(UsageError, match=words):
        BEHAVIOUR.read(None, values)
