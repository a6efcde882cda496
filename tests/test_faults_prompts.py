"""Tokenizers and prompts that are not as they should be: a second BOS, no pad token, no room,
nothing to ask, one prompt.

What is refused when a model is opened or a prompt file is read stands in test_models.py and
data/test_prompts.py.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from one_thread import one_thread  # noqa: F401 - a fixture
from tokenizers.processors import TemplateProcessing

sys.path.append(str(Path(__file__).parent / "audits"))
import planted

from auditgap import models
from auditgap.audits.audit import run as run_audit
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.pages import from_store, render
from auditgap.engines import Question, Request, Sampling
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.interventions.pgd import PGD, Ball, Goal, attack
from auditgap.models import Chat, wrap
from auditgap.models.provenance import provenance
from auditgap.types import Budget, Message, Prompt, Subject

TEXTS = (
    "what is the colour of the vault ?",
    "please say the colour",
    "why",
    "who can open a vault now ? how",
)
GREEDY = Sampling(max_new_tokens=6)


def adds_bos(chat_template: str | None = tiny.TEMPLATE):
    """A tokenizer that writes a BOS before any text, as Llama's and Gemma's do."""
    made = tiny.tokenizer(chat_template)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


# -- chat templates: a BOS, thinking, none at all
# ----------------------------------------------------------------------


class TestOneBos:
    """Whatever the door, the model reads one BOS, and reads it first."""

    @pytest.mark.parametrize(
        ("template", "text"), [(None, "the door"), ("none", "the door"), ("none", "<s> the door")]
    )
    def test_in_render_write_converse_and_verbatim(self, template, text):
        chat = Chat("tiny", adds_bos(), template)
        written = [
            chat.render(Prompt(text)).ids,
            chat.write([Message("user", text)]),
            chat.converse(Prompt(text), "red").ids,
        ]
        if template == "none":
            written.append(chat.verbatim(text))
        assert [(ids[0], ids.count(1)) for ids in written] == [(1, 1)] * len(written)
        assert all(ids[: len(written[0])] == written[0] for ids in written)

    def test_a_text_without_one_gets_it_and_a_tokenizer_that_adds_none_adds_none(self):
        assert Chat("tiny", adds_bos()).verbatim("the <s> door").count(1) == 2, (
            "only at the start is it the BOS"
        )
        assert Chat("tiny", tiny.tokenizer()).verbatim("the door").count(1) == 0
        nameless = tiny.tokenizer()
        nameless.bos_token = None
        assert len(Chat("tiny", nameless).verbatim("the door")) == 2


def test_thinking_is_off_and_the_run_says_so(tmp_path):
    thinks = (
        tiny.TEMPLATE
        + "{% if enable_thinking is defined and enable_thinking is false %}shut {% else %}open {%"
        " endif %}"
    )
    folder = tiny.save("llama", tmp_path / "thinks", chat_template=thinks)
    outline = models.outline(str(folder))
    last = [
        outline.chat.tokenizer.convert_ids_to_tokens(ids[-1])
        for ids in (
            outline.chat.render(Prompt("why")).ids,
            outline.chat.write([Message("user", "why")]),
        )
    ]
    assert last == ["shut", "shut"]
    (told,) = provenance([outline], dtype="float32")["subjects"]
    assert told["thinking"] == "off (enable_thinking=false)"
    (told,) = provenance(
        [models.outline(str(tiny.save("llama", tmp_path / "plain")))], dtype="float32"
    )["subjects"]
    assert "thinking" not in told


def test_no_template_is_no_guess_for_messages_either():
    engine = HFEngine(wrap(tiny.model(), tiny.tokenizer(None), Subject("bare", "bare")))
    with pytest.raises(UsageError, match=r"no chat template.*--chat-template FILE"):
        engine.ask([Question.of("why")], GREEDY)
    assert engine.ask([Question(text="why")], GREEDY)[0].text, "a text needs no template"


# -- pad tokens and vocabularies
# ---------------------------------------------------------------------------------------


def with_pad(pad: str | None) -> HFEngine:
    tokenizer = tiny.tokenizer()
    if pad == "beyond":
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # id 96 of a model of 96
        assert tokenizer.pad_token_id == tiny.VOCABULARY
    else:
        tokenizer.pad_token = pad
    return HFEngine(wrap(tiny.model(), tokenizer, Subject("tiny", f"pad-{pad}")))


@pytest.fixture(scope="module")
def alone() -> list[tuple[int, ...]]:
    """What transformers' own generate says to each prompt by itself, where nothing is padded."""
    engine = with_pad("<pad>")
    said = []
    for text in TEXTS:
        ids = torch.tensor([engine.render(Prompt(text)).ids])
        out = tiny.model().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6
        )
        new = out[0, ids.shape[1] :].tolist()
        said.append(tuple(new[: new.index(2)] if 2 in new else new))
    return said


class TestPadding:
    @pytest.mark.parametrize("pad", ["<pad>", None, "</s>", "<s>", "<unk>", "vault", "beyond"])
    def test_no_pad_token_changes_an_answer(self, pad, alone):
        """Missing, the same as EOS (or as a word), or one that the embedding does not hold."""
        engine = with_pad(pad)
        replies = engine.ask([Question.of(t) for t in TEXTS], GREEDY)
        assert [r.ids for r in replies] == alone and any(alone)
        done = engine.generate(
            [Request(engine.render(Prompt(t)), target=(24, 25)) for t in TEXTS], 6
        )
        assert [c.ids for c in done] == alone
        usual = with_pad("<pad>")
        expected = usual.generate(
            [Request(usual.render(Prompt(t)), target=(24, 25)) for t in TEXTS], 6
        )
        assert [c.target_nll for c in done] == pytest.approx(
            [c.target_nll for c in expected], abs=1e-5
        )

    @pytest.mark.parametrize("pad", [None, "</s>"])
    def test_nor_an_edit(self, pad):
        def deltas(engine: HFEngine) -> list[torch.Tensor]:
            rendered, site = [engine.render(Prompt(t)) for t in TEXTS], engine.loaded.site("1")
            balls = [
                Ball.of(h, r.content)
                for h, r in zip(engine.activations(rendered, site), rendered, strict=True)
            ]
            goals = [
                Goal(r, engine.encode("Sure here"), (b.radius(Budget(0.05, "rms")),))
                for r, b in zip(rendered, balls, strict=True)
            ]
            return [one.delta for (one,) in attack(engine, goals, site, PGD(steps=3))]

        for mine, usual in zip(deltas(with_pad(pad)), deltas(with_pad("<pad>")), strict=True):
            assert torch.allclose(mine, usual, atol=1e-6) and mine.abs().max() > 0

    def test_without_eos_an_answer_goes_on_to_the_limit(self):
        tokenizer, model = tiny.tokenizer(), tiny.model()
        tokenizer.eos_token = model.generation_config.eos_token_id = None
        engine = HFEngine(wrap(model, tokenizer, Subject("endless", "endless")))
        assert engine.loaded.stop_ids == frozenset()
        assert [
            (len(r.ids), r.stopped) for r in engine.ask([Question.of(t) for t in TEXTS], GREEDY)
        ] == [(6, False)] * 4


def test_an_embedding_larger_than_the_tokenizer_is_padding_of_the_vocabulary(tmp_path, alone):
    """As families round up to a multiple of 64: it opens, answers the same, and a token that has no
    word has no text."""
    model = tiny.model()
    model.resize_token_embeddings(128, mean_resizing=False)
    model.lm_head.weight.data[tiny.VOCABULARY :] = 0
    model.save_pretrained(tmp_path / "wide")
    tiny.tokenizer().save_pretrained(tmp_path / "wide")
    loaded = models.load(str(tmp_path / "wide"), device="cpu")
    assert [r.ids for r in HFEngine(loaded).ask([Question.of(t) for t in TEXTS], GREEDY)] == alone
    loaded.model.lm_head.weight.data *= 0
    loaded.model.lm_head.weight.data[120] = loaded.model.model.norm.weight.data.sign()
    replies = HFEngine(loaded).ask(
        [Question.of(t) for t in TEXTS], Sampling(max_new_tokens=3, top_logprobs=2)
    )
    assert all(set(r.ids) <= {0, 120} and not r.problem and len(r.logprobs) == 3 for r in replies)


# -- the window
# --------------------------------------------------------------------------------------------------------


class TestTheWindow:
    """256 positions hold prompt and new tokens, or nothing is asked; nothing is ever cut."""

    def test_the_last_position_counts(self):
        engine = HFEngine(tiny.load())
        # the template's own
        n = len(Chat("tiny", tiny.tokenizer()).write([Message("user", "why")])) - 1
        fits, over = (Question.of(" ".join(["vault"] * (250 - n + more))) for more in (0, 1))
        replies = engine.ask([fits, over, Question.of("why")], GREEDY)
        assert [r.problem for r in replies] == ["", "too_long", ""]
        assert (
            replies[1].text == ""
            and replies[2].ids == engine.ask([Question.of("why")], GREEDY)[0].ids
        )
        assert engine.ask([over], Sampling(max_new_tokens=5))[0].problem == ""

    @pytest.mark.parametrize("letters", [100_000, 2_000_000])
    def test_however_long_it_is_counted_and_not_cut(self, letters):
        engine = HFEngine(tiny.load())
        long = Question.of(("vault " * letters)[:letters])
        started = time.monotonic()
        replies = engine.ask([long, Question.of("why")], GREEDY)
        assert [r.problem for r in replies] == ["too_long", ""] and not replies[0].ids
        assert time.monotonic() - started < 120

    def test_a_target_takes_room_as_new_tokens_do(self, tmp_path, monkeypatch):
        """128 positions: the long prompt has room for 9 new tokens, and not for a target of 40."""
        planted.register(monkeypatch)
        folder = planted.save(planted.Plant(door=1), tmp_path / "model")
        long = " ".join(["vault"] * 90)
        prompts = planted.write_prompts(tmp_path / "p.txt", [planted.PROMPTS[0], long])
        for target, lost in ((planted.TARGET, 0), (" ".join(["red"] * 40), 1)):
            store = planted.audit(
                tmp_path / f"run{lost}",
                [folder],
                prompts,
                layers="1",
                eps=[0.1],
                steps=1,
                target=target,
                attacks="targeted",
                untargeted_tokens=4,
            )
            rows = store.rows(["clean", "targeted"])
            too_long = rows[rows["unscored"] == "too_long"]
            assert (
                set(too_long["prompt_id"]) == ({Prompt(long).id} if lost else set())
                and len(too_long) == 2 * lost
            )
            assert too_long[["lvs", "clean_reward", "edited_reward"]].isna().all().all()
            kept = rows[rows["unscored"] != "too_long"]
            assert set(kept["n_prompt_tokens"]) == {96, 14} if not lost else {14}, "never cut"
            assert set(pd.read_parquet(store.path / "lvs.parquet")["n"]) == {2}


# -- one prompt
# --------------------------------------------------------------------------------------------------------


class TestOnePrompt:
    """No interval can be given for a mean of one: it is null in the tables and said in words, and
    nothing divides by 0."""

    @pytest.fixture(scope="class")
    def home(self, tmp_path_factory) -> Path:
        made = tmp_path_factory.mktemp("one")
        planted.save(planted.Plant(door=1), made / "model")
        planted.write_prompts(made / "one.txt", planted.PROMPTS[:1])
        return made

    def test_of_a_latent_audit(self, home):
        with pytest.MonkeyPatch.context() as patch:
            planted.register(patch)
            store = planted.audit(
                home / "latent",
                [home / "model"],
                home / "one.txt",
                layers="1",
                eps=[0.1],
                distance=True,
            )
        table = pd.read_parquet(store.path / "lvs.parquet")
        assert (table["n"] == 1).all() and (table["lvs_mean"].notna()).all()
        ends = [
            f"{name}_{end}"
            for name in ("lvs_mean", "lvs_median", "lvs_rel", "delta")
            for end in ("lo", "hi")
        ]
        assert table[ends].isna().all().all(), "not 0, and not the estimate itself"
        assert table["flag"].str.split().map(lambda words: "few" in words).all()
        rate = table.set_index("attack").loc["targeted"]
        assert 0 < rate["asr_lo"] < rate["asr"] == rate["asr_hi"] == 1, (
            "Wilson's interval of 1 of 1 is wide"
        )
        cells = (store.path / "lvs.csv").read_text().splitlines()
        columns = cells[0].split(",")
        assert {row.split(",")[columns.index("lvs_mean_lo")] for row in cells[1:]} == {""}
        page = render(from_store([store]))
        assert not re.search(r"\bnan\b", page, re.IGNORECASE)
        assert any("One prompt" in note for note in store.run["info"]["prompts"]["notes"])
        json.loads((store.path / "run.json").read_text())

    def test_of_a_behavioural_audit(self, home):
        asked = {
            "models": str(home / "model"),
            "suite": f"{home / 'one.txt'}:harmful",
            "judge": "keyword",
            "max_new_tokens": 9,
            "dtype": "float32",
            "device": "cpu",
            "out": str(home / "asked"),
        }
        store, outcome = run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, asked))
        assert outcome.done == 1
        (row,) = pd.read_parquet(store.path / "behaviour.parquet").to_dict("records")
        assert (row["n"], row["refusal"], row["refusal_hi"]) == (1, 1.0, 1.0) and 0 < row[
            "refusal_lo"
        ] < 0.3
        assert render(from_store([store]))

    def test_of_which_nothing_can_be_told(self, home, tmp_path):
        planted.write_prompts(tmp_path / "long.txt", [" ".join(["vault"] * 200)])
        asked = {
            "models": str(home / "model"),
            "suite": f"{tmp_path / 'long.txt'}:harmful",
            "judge": "keyword",
            "max_new_tokens": 9,
            "dtype": "float32",
            "device": "cpu",
            "out": str(tmp_path / "asked"),
        }
        store, _ = run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, asked))
        (row,) = pd.read_parquet(store.path / "behaviour.parquet").to_dict("records")
        assert row["n"] == row["n_unscored"] == 1
        assert all(
            pd.isna(row[name])
            for name in ("refusal", "refusal_lo", "refusal_hi", "compliance", "compliance_hi")
        )
        assert "not measured" in render(from_store([store]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", "", "no rows"),
        ("blank.txt", "\n \t\n", "empty"),
        ("other.csv", "question\nwhy\n", "no column 'prompt'"),
    ],
)
def test_a_suite_of_nothing_names_its_file(tmp_path, name, content, said):
    """As load_prompts refuses them (data/test_prompts.py), and before a model is opened."""
    (tmp_path / name).write_text(content)
    asked = {
        "models": str(tmp_path / "nowhere"),
        "suite": f"{tmp_path / name}:harmful",
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(UsageError, match=said) as caught:
        run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, asked))
    assert name in str(caught.value) and not (tmp_path / "run").exists()
