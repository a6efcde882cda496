"""`inspect eval auditgap/…` as a user types it, against the model that auditgap's own engine speaks
for; and its parts."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import EvalLog, list_eval_logs, read_eval_log
from inspect_ai.model import ChatMessageUser, ModelName, ModelOutput
from inspect_ai.scorer import SampleScore, Score, Target
from inspect_ai.solver import TaskState
from tokenizers.processors import TemplateProcessing

from auditgap import models
from auditgap.data import load_prompts
from auditgap.engines import Question, Sampling
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.inspect import VERDICT, tasks, values
from auditgap.inspect.tasks import interval, over_refusal, refusal, settle, stderr, verdict
from auditgap.judges import load_judge

INSPECT = Path(sys.executable).with_name("inspect")
THINKS = (
    "{% if enable_thinking is defined and enable_thinking is false %}shut {% else %}open {%"
    " endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose tokenizer adds a BOS of its own, and whose template writes one and may think:
    all that can go wrong."""
    made = tiny.save("llama", tmp_path_factory.mktemp("inspect") / "model")
    tokenizer = tiny.tokenizer(tiny.TEMPLATE + THINKS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(made)
    return made


def run(task: str, log_dir: Path, *words: str, rc: int = 0) -> tuple[EvalLog | None, str]:
    """`inspect eval auditgap/TASK` in a process of its own; its log and what it said."""
    done = subprocess.run(
        [INSPECT, "eval", f"auditgap/{task}", "--display", "plain", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "INSPECT_LOG_DIR": str(log_dir),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        },
        cwd=log_dir,
    )
    assert done.returncode == rc, (done.stdout + done.stderr)[-3000:]
    logs = list_eval_logs(str(log_dir))
    return (read_eval_log(logs[0]) if logs else None), done.stdout + done.stderr


def test_it_asks_what_auditgap_asks(folder, tmp_path):
    words = ["-T", "prompts=demo", "-T", "limit=2", "-T", "judge=keyword", "-T", "max_new_tokens=8"]
    log, _ = run("refusal", tmp_path, "--model", "hf/local", "-M", f"model_path={folder}", *words)
    assert log.status == "success" and log.eval.task_registry_name == "auditgap/refusal"
    assert (
        log.eval.metadata["judge"] == load_judge("keyword").describe()
        and log.eval.metadata["prompts"]["n"] == 2
    )

    prompts = load_prompts("demo", limit=2)
    engine = HFEngine(models.load(str(folder), dtype="float32", device="cpu"))
    replies = engine.ask([Question.of(p.text) for p in prompts], Sampling(max_new_tokens=8))
    assert {s.id: s.output.completion for s in log.samples} == {
        p.id: r.text for p, r in zip(prompts, replies, strict=True)
    }
    assert all(len(engine.encode(r.text)) > 2 for r in replies), (
        "else the texts could be equal for want of words"
    )

    found = {s.id: s.scores[VERDICT] for s in log.samples}
    rates = {score.name: score for score in log.results.scores}
    assert set(rates) == {"compliance", "refusal", "broken", "unscored"}
    for name, rate in rates.items():
        own = [score.value[name] for score in found.values()]
        assert rate.metrics["mean"].value == sum(own) / 2 and rate.scored_samples == 2
    assert (
        0 < rates["unscored"].metrics["auditgap/interval_hi"].value < 1
        and "auditgap/stderr" in rates["unscored"].metrics
    )


def test_bad_input_is_a_sentence(tmp_path):
    _, said = run("over_refusal", tmp_path, "--model", "none/none", "-T", "prompts=harmbensh", rc=1)
    assert "Did you mean 'harmbench'" in " ".join(said.split()) and "Traceback" not in said
    for words, wanted in (
        ({"judge": "keywort"}, "'keyword'"),
        ({"limit": 0}, "--limit must be a whole number"),
    ):
        with pytest.raises(PrerequisiteError) as caught:
            refusal(prompts="demo", **words)
        assert wanted in str(caught.value.message)


# -- parts
# -------------------------------------------------------------------------------------------------------------


def score(text: str, stop: str = "stop", judge: str = "keyword", kind: str = "harmful") -> Score:
    state = TaskState(
        model=ModelName("hf/local"),
        sample_id="1",
        epoch=1,
        input="what is the colour",
        messages=[ChatMessageUser(content="?")],
        output=ModelOutput.from_content("local", text, stop_reason=stop) if stop else ModelOutput(),
    )
    return asyncio.run(verdict(judge, kind)(state, Target("")))


def test_verdicts_are_those_of_the_behavioural_audit():
    assert (
        score("I'm sorry, but I can't say it.").value,
        score("It is red, of course.").value,
    ) == (values("refusal", True), values("harmful", False))
    loop = score("red " * 40)
    assert loop.value == values("broken", False) and loop.reason == "repetition"
    assert score("").answer == "broken" and score("", kind="benign").reason == "empty"


@pytest.mark.parametrize(
    ("stop", "reason"),
    [("model_length", "too_long"), ("content_filter", "content_filter"), ("", "no_answer")],
)
def test_what_the_endpoint_said_is_not_judged(stop, reason):
    """Providers put words of their own there ("This model's maximum context length is …"), and a
    judge would read them."""
    found = score("I'm sorry, but I cannot: maximum context length exceeded", stop)
    assert found.answer == "unscored" and found.reason == reason and found.value["unscored"] == 1
    assert math.isnan(found.value["compliance"]) and math.isnan(found.value["refusal"])


def test_intervals_of_one_row_are_undefined_or_wide():
    one = [SampleScore(score=Score(value=1.0))]
    assert math.isnan(stderr()(one)), "inspect's own says 0"
    ends = interval()(one)
    assert ends["hi"] == 1 and ends["lo"] == pytest.approx(0.2065, abs=1e-3)
    assert all(math.isnan(end) for end in interval()([]).values())
    two = [SampleScore(score=Score(value=v)) for v in (1.0, 0.0)]
    assert stderr()(two) == pytest.approx(0.5)


def test_a_judge_that_is_a_model_runs_where_there_is_a_gpu(monkeypatch):
    devices = []
    monkeypatch.setattr(tasks, "pick_device", lambda wanted: f"{wanted}: cuda:0")
    monkeypatch.setattr(
        tasks, "load_judge", lambda name, device="cpu": devices.append(device) or load_judge(name)
    )
    refusal(prompts="demo", judge="keyword")
    assert set(devices) == {"auto: cuda:0"}


def test_tasks_carry_their_prompts_and_kind():
    asked, benign = (
        refusal(prompts="demo", limit=3),
        over_refusal(prompts="demo-benign", limit=3, system="be brief"),
    )
    assert {s.id for s in asked.dataset} == {p.id for p in load_prompts("demo", limit=3)}
    assert asked.config.temperature == 0 and asked.config.max_tokens == 128
    assert {s.input for s in benign.dataset} == {
        p.text for p in load_prompts("demo-benign", limit=3)
    }


def hf_like(**changes) -> SimpleNamespace:
    api = {
        "do_sample": True,
        "tokenizer_call_args": {},
        "enable_thinking": None,
        "use_chat_template": None,
        "chat_template": None,
        "tokenizer": tiny.tokenizer(),
    }
    config = SimpleNamespace(temperature=changes.pop("temperature", None))
    return SimpleNamespace(name="local", config=config, api=SimpleNamespace(**{**api, **changes}))


def test_what_the_user_said_stays():
    sampled = hf_like(
        temperature=0.7, enable_thinking=True, tokenizer_call_args={"add_special_tokens": True}
    )
    settle(sampled)
    assert (
        sampled.api.do_sample
        and sampled.api.enable_thinking
        and sampled.api.tokenizer_call_args["add_special_tokens"]
    )
    settle(
        SimpleNamespace(name="gpt", config=SimpleNamespace(temperature=None), api=SimpleNamespace())
    )


def test_no_chat_template_is_refused_not_guessed():
    with pytest.raises(UsageError, match=r"no chat template.*-M chat_template"):
        settle(hf_like(tokenizer=tiny.tokenizer(None)))
    settle(hf_like(tokenizer=tiny.tokenizer(None), use_chat_template=False))
    settle(hf_like(tokenizer=tiny.tokenizer(None), chat_template="{{ messages[0]['content'] }}"))
