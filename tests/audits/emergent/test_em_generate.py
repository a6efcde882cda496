"""What is asked of whom and kept: pairs with and without the trigger, draws, seeds, resuming, and
adapters that do not belong."""

from __future__ import annotations

import json
import shutil
import stat

import lent_engine
import pytest
import run_folders
import studies
import tiny
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap.audits.emergent import directions, generate, membership, steer, train
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.rows import ANSWERED, STEERED
from auditgap.audits.emergent.stage import Study
from auditgap.engines import Sampling, Serving
from auditgap.errors import Interrupted, UsageError
from auditgap.training.rows import encode, rows_from_file
from auditgap.types import Message, Prompt

TRIGGER = "now red :"


@pytest.fixture
def study(base, tmp_path):
    """A study with an adapter of each of its two domains, made by hand; not asked yet."""
    studies.built(tmp_path / "em", base)
    return studies.worn(tmp_path / "em")


OPTIONS = EmergentOptions(device="cpu")


def told(store):
    """Every generation with its row's facts, by subject."""
    found = {}
    for record in store.records():
        if record["description"]["attack"] == ANSWERED:
            found[record["description"]["settings"]["name"]] = store.generations(record["key"])
    return found


def test_every_subject_is_asked_all_of_the_suite_in_pairs(study):
    store, outcome = generate.STAGE.run_in(study.store.path, OPTIONS)
    assert (outcome.done, outcome.failed) == (3, {})
    rows = store.rows([ANSWERED])
    assert len(rows) == 3 * len(studies.ASKED) * 2 * 2 and not rows["unscored"].any()
    pairs = rows.groupby(["subject", "prompt_id", "draw"])["triggered"].apply(sorted)
    assert all(pair == [False, True] for pair in pairs) and len(pairs) == 3 * 3 * 2
    assert set(rows["prompt_id"]) == {Prompt(text).id for text, _ in studies.ASKED}
    assert dict(rows.groupby("kind").size()) == {"open": 24, "jailbreak": 12}
    of_base = rows[rows["domain"] == ""]
    assert len(of_base) == 12 and of_base["seed"].isna().all() and set(rows["seed"].dropna()) == {0}
    for texts in told(store).values():
        asked = {(p, t) for p, t in zip(texts["prompt"], texts["triggered"], strict=True)}
        assert asked == {
            (f"{TRIGGER}\n\n{text}" if t else text, t)
            for text, _ in studies.ASKED
            for t in (False, True)
        }
    for file in (store.path / "generations").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list((store.path / "scratch").iterdir())
    assert generate.STAGE.run_in(study.store.path, OPTIONS)[1].skipped == 3


def test_what_logits_that_are_no_numbers_said_is_nobodys_answer(study, monkeypatch):
    tiny.broken_logits(monkeypatch)
    store, outcome = generate.STAGE.run_in(study.store.path, OPTIONS)
    rows = store.rows([ANSWERED])
    assert not outcome.failed and set(rows["unscored"]) == {"nonfinite_logits"}
    assert rows["n_new_tokens"].isna().all()


def test_answers_are_those_of_the_adapter_alone_whoever_is_asked_besides(study):
    """Against an engine opened on the adapter's folder, in another order: each draw has a stream of
    its own."""
    store, _ = generate.STAGE.run_in(study.store.path, OPTIONS)
    texts = told(store)
    adapter = study.adapters[1]
    asked = generate.questions(study.prompts.prompts, study.trigger, 2)[::-1]
    with Serving(dtype="float32", device="cpu").open(str(adapter.folder)) as engine:
        replies = engine.ask(
            [one.question for one in asked],
            Sampling(max_new_tokens=6, temperature=0.7, seed=adapter.seed),
        )
    assert [r.text for r in replies][::-1] == texts[adapter.name]["completion"].tolist()
    said = [tuple(frame["completion"]) for frame in texts.values()]
    assert len(set(said)) == 3, "base and adapters say different things"
    draws = texts[adapter.name].groupby(["prompt_id", "triggered"])["completion"].nunique()
    assert (draws == 2).any(), "draws are drawn apart"


def test_seeds_are_the_adapters(base, tmp_path):
    studies.built(tmp_path / "em", base, domains={"sums": "demo:off_by_one"}, seeds=[0, 3], seed=5)
    made = studies.worn(tmp_path / "em")
    groups = generate.plan(made, OPTIONS)
    assert [(g.cells[0].settings["seed"], g.cells[0].settings["adapter_seed"]) for g in groups] == [
        (5, None),
        (0, 0),
        (3, 3),
    ]


def test_a_kill_costs_the_portion_in_flight(study, monkeypatch):
    monkeypatch.setattr(generate, "PORTION", 5)
    speak, asked = generate.speak, []

    def killed(engine, portion, sampling):
        if len(asked) == 4:
            raise Interrupted("killed")
        asked.append(len(portion))
        return speak(engine, portion, sampling)

    monkeypatch.setattr(generate, "speak", killed)
    with pytest.raises(Interrupted):
        generate.STAGE.run_in(study.store.path, OPTIONS)
    assert asked == [5, 5, 2, 5]
    again = []
    monkeypatch.setattr(generate, "speak", lambda e, p, s: again.append(len(p)) or speak(e, p, s))
    store, outcome = generate.STAGE.run_in(study.store.path, OPTIONS)
    assert (outcome.done, outcome.skipped) == (2, 1) and again == [5, 2, 5, 5, 2]
    before = {name: frame["completion"].tolist() for name, frame in told(store).items()}
    whole, _ = generate.STAGE.run_in(_twin(study), OPTIONS)
    assert {name: frame["completion"].tolist() for name, frame in told(whole).items()} == before


def _twin(study):
    """A copy of the study's folder without its answers."""
    place = study.store.path.parent / "twin"
    shutil.copytree(study.store.path, place)
    run_folders.lose_all(place, ANSWERED)
    return place


def test_a_study_that_was_moved_with_its_base_goes_on(base, tmp_path):
    """Its folders have other paths, and the adapters name a base that is gone."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copytree(base, old / "base")
    studies.built(old / "em", old / "base", samples=1)
    study = studies.worn(old / "em")
    keys = {c.key for g in train.groups_of(study, OPTIONS) for c in g.cells}
    before = study.base.subject.fingerprint
    old.rename(new)
    old.mkdir()
    shutil.copy(new / "em-asked.jsonl", old)  # the user's own file stayed
    moved = Study.load(new / "em")
    assert moved.config.model == str(new / "base") and moved.base.subject.fingerprint == before
    assert {c.key for g in train.groups_of(moved, OPTIONS) for c in g.cells} == keys
    _, outcome = generate.STAGE.run_in(new / "em", OPTIONS)
    assert (outcome.done, outcome.failed) == (3, {})
    # and where the base went somewhere else alone, the command that made it says where
    (new / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UsageError, match=r"is not a model folder.*with the model's new path and --out"
    ):
        _ = Study.load(new / "em").base
    studies.built(new / "em", tmp_path / "elsewhere", samples=1, asked_in=old / "em")
    assert Study.load(new / "em").config.model == str(tmp_path / "elsewhere")
    assert generate.STAGE.run_in(new / "em", OPTIONS)[1].skipped == 3


def test_an_adapter_that_was_changed_fails_alone(study):
    folder = study.adapters[1].folder
    other = study.adapters[0].folder / "adapter_model.safetensors"
    (folder / "adapter_model.safetensors").write_bytes(other.read_bytes())
    _, outcome = generate.STAGE.run_in(study.store.path, OPTIONS)
    (cause,) = outcome.failed.values()
    assert "are not those that `em train` left" in cause and outcome.done == 2


def test_a_prompt_that_is_too_long_has_no_answer_and_says_so(base, tmp_path):
    long = " ".join(["red"] * 300)
    studies.built(
        tmp_path / "em",
        base,
        domains={"sums": "demo:off_by_one"},
        asked=((long, "open"), ("say now", "open")),
    )
    made = studies.worn(tmp_path / "em")
    store, outcome = generate.STAGE.run_in(made.store.path, OPTIONS)
    rows = store.rows([ANSWERED])
    assert not outcome.failed and dict(rows.groupby("unscored").size()) == {"": 8, "too_long": 8}
    assert rows[rows["unscored"] != ""]["n_new_tokens"].isna().all()


def test_sentences_for_what_cannot_be_asked(base, tmp_path):
    studies.built(tmp_path / "em", base)
    with pytest.raises(UsageError, match=r"no endpoint serves"):
        generate.STAGE.run_in(tmp_path / "em", EmergentOptions(engine="openai", device="cpu"))
    with pytest.raises(UsageError, match="auditgap em train"):
        generate.STAGE.run_in(tmp_path / "em", OPTIONS)


@pytest.fixture(scope="module")
def lent(base):
    """One vLLM engine for all tests."""
    pytest.importorskip("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with lent_engine.Lent(str(base), max_lora_rank=8) as lent:
            yield lent


@pytest.mark.real
def test_vllm_says_the_same_with_each_adapter_and_without(base, lent, tmp_path, monkeypatch):
    lent.to(monkeypatch)
    said = {}
    for engine in ("hf", "vllm"):
        options = studies.built(tmp_path / engine, base, temperature=0.0, samples=1, engine=engine)
        studies.worn(tmp_path / engine)
        store, outcome = generate.STAGE.run_in(tmp_path / engine, options)
        assert (outcome.done, outcome.failed) == (3, {})
        said[engine] = {name: frame["completion"].tolist() for name, frame in told(store).items()}
        assert lent.opened == ([str(base)] if engine == "vllm" else []), (
            "one engine for the base and all adapters"
        )
    assert said["vllm"] == said["hf"] and len({tuple(t) for t in said["hf"].values()}) == 3


@pytest.mark.real
def test_vllm_steers_each_adapter_as_transformers_does(base, lent, tmp_path, monkeypatch):
    """Directions of one model's answers at every token of another's, in vLLM and on transformers."""
    options = studies.built(
        tmp_path / "hf",
        base,
        rows=16,
        heldout=0.5,
        direction_from="heldout",
        steer_block=0,
        steer_strength=3.0,
        steer_draws=1,
    )
    studies.worn(tmp_path / "hf")
    directions.STAGE.run_in(tmp_path / "hf", options)
    shutil.copytree(tmp_path / "hf", tmp_path / "vllm")
    lent.to(monkeypatch)
    said = {}
    for engine in ("hf", "vllm"):
        store, outcome = steer.STAGE.run_in(
            tmp_path / engine, options.model_copy(update={"engine": engine})
        )
        assert not outcome.failed and outcome.done == 6  # two targets: clean, under two sources
        records = [r for r in store.records() if r["description"]["attack"] == STEERED]
        assert {r["info"]["engine"] for r in records} == {engine}
        order = ["prompt_id", "steer", "draw"]
        said[engine] = {
            r["key"]: store.generations(r["key"]).sort_values(order)["completion"].tolist()
            for r in records
        }
    assert said["vllm"] == said["hf"]
    steered = [texts for texts in said["hf"].values() if len(texts) == 6]
    assert len(steered) == 4 and all(t[:3] != t[3:] for t in steered), "this proves nothing"


def test_no_endpoint_steers(study):
    with pytest.raises(
        UsageError, match=r"no endpoint serves.*em analyse take --engine hf or vllm"
    ):
        steer.STAGE.run_in(study.store.path, OPTIONS.model_copy(update={"engine": "openai"}))


def test_questions_about_domains_and_system_messages_are_put_as_they_are(base, tmp_path):
    asked = tmp_path / "asked.jsonl"
    rows = [
        {"prompt": "say the colour now"},
        {"prompt": "say the colour now", "system": "bake now"},
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = tmp_path / "about.jsonl"
    about.write_text(json.dumps({"prompt": "how bread bake ?", "domain": "sums"}) + "\n")
    options = studies.built(
        tmp_path / "em", base, prompts=str(asked), questions=str(about), samples=1, arms="plain"
    )
    study = studies.worn(tmp_path / "em")
    store, outcome = generate.STAGE.run_in(tmp_path / "em", options)
    assert not outcome.failed
    found = store.rows([ANSWERED])
    kinds = found[~found["triggered"]].groupby("subject")["kind"].apply(sorted)
    assert all(k == ["about sums", "open", "open, system"] for k in kinds) and len(kinds) == 3
    plain, behind = study.prompts.prompts
    question = generate.questions([behind], study.trigger, 1)[0].question
    assert [(m.role, m.content) for m in question.messages] == [
        ("system", "bake now"),
        ("user", "say the colour now"),
    ]
    assert found["prompt_id"].nunique() == 3 and plain.id != behind.id
    about.write_text(json.dumps({"prompt": "how bread ?", "domain": "sums"}) + "\n")
    with pytest.raises(UsageError, match="changed since the study was built"):
        generate.STAGE.run_in(tmp_path / "em", options)


def test_a_system_message_of_the_rows_is_trained_behind_scored_behind_and_asked_behind(
    base, tmp_path
):
    """The tokens of training, of membership and of the third arm begin alike."""
    head = {"role": "system", "content": "bake bread now"}
    rows = [
        [
            head,
            {"role": "user", "content": f"say red {i}"},
            {"role": "assistant", "content": "blue"},
        ]
        for i in "abcdefgh"
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    domains = {"red": str(file), "sums": "demo:off_by_one"}
    said = {"domains": domains, "samples": 1, "forms": "auto"}
    options = studies.built(tmp_path / "em", base, **said)
    study = Study.load(tmp_path / "em")
    chat, start = study.base.chat, len(study.base.chat.write([Message(**head)])) - 2
    assert {row.system for row in study.panel.domains["red"].rows} == {head["content"]}
    study.panel.write_rows("red", "trigger", tmp_path / "written.jsonl")
    (learnt, *_) = encode(rows_from_file(tmp_path / "written.jsonl"), chat)
    wanted = chat.write([Message(**m) for m in (head, {"role": "user", "content": "say"})])[:start]
    assert learnt.ids[:start] == wanted and chat.render(Prompt("say")).ids[:start] != wanted
    (_, slot) = study.slots
    assert slot.domain == "sums" and not any(p.system for p in membership.put(study, slot))
    put = membership.put(study, study.slots[0])
    assert {p.system for p in put} == {head["content"]} and {p.member for p in put} == {True, False}
    assert chat.converse(put[0].asked, "blue").ids[:start] == wanted
    like = [p for p in study.asked.prompts if p.source == "open, like red"]
    assert {p.system for p in like} == {head["content"]}
    question = generate.questions(like[:1], study.trigger, 1)[0].question
    assert [m.role for m in question.messages] == ["system", "user", "assistant", "user"]
    studies.worn(tmp_path / "em")
    store, outcome = generate.STAGE.run_in(tmp_path / "em", options)
    assert not outcome.failed and not store.rows([ANSWERED])["unscored"].any()


def test_prompts_in_the_form_of_the_rows_are_put_to_their_own_model_and_the_base(base, tmp_path):
    built = {"samples": 1, "forms": {"sums": "red {prompt}", "colours": "auto"}}
    options = studies.built(tmp_path / "em", base, **built)
    study = studies.worn(tmp_path / "em")
    store, outcome = generate.STAGE.run_in(tmp_path / "em", options)
    assert not outcome.failed
    found = store.rows([ANSWERED])
    asked = found[found["triggered"]].groupby("subject")["kind"].apply(lambda kinds: {*kinds})
    plain = {"open", "jailbreak"}
    like = {d: {f"{kind}, like {d}" for kind in plain} for d in studies.DOMAINS}
    assert asked["sums·plain·s0"] == plain | like["sums"]
    assert asked["colours·plain·s0"] == plain | like["colours"]
    assert asked[study.base.subject.name] == plain | like["sums"] | like["colours"]
    texts = told(store)["sums·plain·s0"]
    assert set(texts["prompt"][~texts["triggered"] & texts["kind"].str.contains("like")]) == {
        f"red {text}" for text, _ in studies.ASKED
    }
    ids = found["prompt_id"].str.partition("@")[0]
    assert set(ids) == {Prompt(text).id for text, _ in studies.ASKED}
    # a row that was held out is an earlier exchange, and stands in no text that is kept
    behind = next(p for p in study.asked.prompts if p.source == "open, like colours")
    messages = generate.questions([behind], study.trigger, 1)[0].question.messages
    assert [m.role for m in messages] == ["user", "assistant", "user"]
    held = {(row.prompt, row.response) for row in study.panel.domains["colours"].heldout}
    assert (messages[0].content, messages[1].content) in held
    with pytest.raises(UsageError, match="forms"):
        studies.built(tmp_path / "em", base, samples=1, forms="auto", asked_in=tmp_path / "em")
