"""Questions through the engine on transformers: greedy, sampled and with log-probabilities, against
one plain forward a token."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from auditgap.engines import Engine, Question, Sampling, Serving, Speaker
from auditgap.engines.answers import tokens_of
from auditgap.engines.choosing import Sampler, likeliest
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.types import Message

QUESTIONS = [
    Question.of("What colour is the vault?"),
    Question.of("And the door?", system="Answer briefly."),
    Question((Message("user", "hello"), Message("assistant", "hi"), Message("user", "again"))),
    Question(text="the vault is"),
    Question.of("What colour is the vault?", draw=1),
]


@pytest.fixture(scope="module")
def engine():
    return HFEngine(tiny.load())


def plainly(
    engine: HFEngine, question: Question, sampling: Sampling
) -> tuple[list[int], list[torch.Tensor]]:
    """One row, no cache, no padding: token ids and the log-probabilities [V] they were taken
    from."""
    ids, new, seen = list(tokens_of(engine.loaded.chat, question)), [], []
    stream = torch.Generator().manual_seed(question.seed(sampling.seed))
    for _ in range(sampling.max_new_tokens):
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids])).logits[0, -1].float()
        seen.append(logits.log_softmax(-1))
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            mass = (logits / sampling.temperature).softmax(-1).tolist()
            order, kept, total = sorted(range(len(mass)), key=lambda t: -mass[t]), [], 0.0
            for t in order:
                if total >= sampling.top_p:
                    break
                kept.append(t)
                total += mass[t]
            aim, at = torch.rand((), generator=stream).item() * total, 0.0
            for token in kept:
                at += mass[token]
                if at > aim:
                    break
        if token in engine.loaded.stop_ids:
            break
        ids.append(token)
        new.append(token)
    return new, seen


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=9, top_logprobs=4),
        Sampling(max_new_tokens=9, temperature=0.8, seed=3, top_logprobs=4),
        Sampling(max_new_tokens=9, temperature=1.5, top_p=0.6),
    ],
    ids=["greedy", "sampled", "top_p"],
)
def test_replies_are_those_of_the_plain_way(engine, sampling):
    replies = engine.ask(QUESTIONS, sampling)
    for question, reply in zip(QUESTIONS, replies, strict=True):
        new, seen = plainly(engine, question, sampling)
        assert list(reply.ids) == new and reply.stopped == (len(new) < sampling.max_new_tokens)
        assert len(reply.logprobs) == (len(seen) if sampling.top_logprobs else 0)
        for found, logprobs in zip(reply.logprobs, seen, strict=False):
            top = logprobs.topk(4)
            wanted = likeliest(
                (top.indices.tolist(), top.values.tolist()), engine.loaded.tokenizer.decode
            )
            assert found.keys() == wanted.keys() and all(
                math.isclose(found[t], wanted[t], abs_tol=1e-4) for t in wanted
            )


def test_company_and_order_change_nothing_and_draws_differ(engine):
    sampling = Sampling(max_new_tokens=12, temperature=1.2, seed=5)
    together = engine.ask(QUESTIONS, sampling)
    assert (
        together
        == engine.ask(QUESTIONS[::-1], sampling)[::-1]
        == [engine.ask([q], sampling)[0] for q in QUESTIONS]
    )
    assert together[0] != together[4] and together != engine.ask(
        QUESTIONS, Sampling(max_new_tokens=12, temperature=1.2, seed=6)
    )


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 4000
    drawn = Sampler(range(n), temperature=2.0)(logits.repeat(n, 1), range(n))
    assert torch.allclose(
        torch.bincount(drawn, minlength=4) / n, (logits / 2).softmax(-1), atol=0.03
    )
    assert set(Sampler(range(n), 2.0, top_p=0.5)(logits.repeat(n, 1), range(n)).tolist()) == {0, 1}


def test_texts_that_two_tokens_share_add_up():
    assert likeliest(
        ([1, 2, 3], [math.log(0.2), math.log(0.3), math.log(0.1)]), lambda ids: "ab"[ids[0] == 3]
    ) == pytest.approx({"a": math.log(0.5), "b": math.log(0.1)})


def test_what_does_not_fit_is_said_and_the_others_answer(engine):
    long = Question.of("vault " * 2000)
    sampling = Sampling(max_new_tokens=4)
    too_long, fine = engine.ask([long, QUESTIONS[0]], sampling)
    assert (too_long.text, too_long.problem) == ("", "too_long") and fine == engine.ask(
        QUESTIONS[:1], sampling
    )[0]
    assert engine.ask([], sampling) == []


def test_logits_that_are_no_numbers_are_a_problem(engine):
    loaded = tiny.load()
    with torch.no_grad():
        loaded.model.lm_head.weight[0] = math.nan
    assert [r.problem for r in HFEngine(loaded).ask(QUESTIONS[:2], Sampling(max_new_tokens=4))] == [
        "nonfinite_logits"
    ] * 2


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_logprobs": 21},
    ],
)
def test_sampling_refuses_nonsense(values):
    with pytest.raises(UsageError):
        Sampling(**values)


def test_serving_opens_what_it_described(tmp_path):
    folder = str(tiny.save("llama", tmp_path / "m"))
    serving = Serving(dtype="float32", device="cpu")
    with serving.open(folder) as opened:
        assert isinstance(opened, Engine) and isinstance(opened, Speaker)
        assert opened.describe() == serving.describe(folder)
    opened.close()
