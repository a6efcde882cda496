"""The engine on vLLM against the one on transformers, on SmolLM2 in fp32; and what becomes of its
process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import engine_processes
import psutil
import pytest
import tiny
import torch
import warm
from safetensors.torch import load_file, save_file

from auditgap import models
from auditgap.engines import Question, Request, Sampling, Serving
from auditgap.engines.hf import HFEngine
from auditgap.engines.vllm import VLLMEngine
from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.models import template
from auditgap.types import Edit, Message, Prompt, Site

pytest.importorskip("vllm")
pytestmark = [pytest.mark.minutes, pytest.mark.real]

#: vLLM's CPU kernels want heads of 32, 64, …
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
}
PROMPTS = [
    "What colour is the sky?",
    "Name three kinds of bread.",
    "How do I boil an egg?",
    "Write a line about the sea.",
    "Who wrote Hamlet?",
    "Why is salt used in baking? Answer in one sentence, please.",
    "Count to five.",
    "What is a vault?",
]


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def save_tiny(folder: Path, **changes: object) -> Path:
    return tiny.save("llama", folder, **{**SHAPE, **changes})


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether the process ended (a zombie has) within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def lora(
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    targets: tuple[str, ...] = ("q_proj", "down_proj"),
    base: str = "smollm2",
):
    """A PEFT adapter of random weights, large enough that answers change."""
    loaded = models.load(base, dtype="float32")
    adapted = models.with_lora(loaded.model, rank=rank, alpha=2 * rank, targets=targets, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    adapted.save_pretrained(folder)
    return folder


# -- its process
# -------------------------------------------------------------------------------------------------------


def test_its_process_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    template.fill("{{ 1 }}", {})  # its child is this process's own, and stays
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    engine = VLLMEngine(str(folder), Serving(engine="vllm", dtype="float32"))
    pid, log = engine.child.pid, engine.child.log
    assert log.stat().st_mode & 0o777 == 0o600 and log.parent.stat().st_mode & 0o777 == 0o700
    family = [p.pid for p in psutil.Process(pid).children(recursive=True)]
    assert engine.window == 256  # the model's own
    assert [
        r.problem
        for r in engine.ask(
            [Question(text="red " * 250), Question(text="red blue"), Question(text="")],
            Sampling(max_new_tokens=8),
        )
    ] == ["too_long", "", "empty"]
    engine.close()
    engine.close()
    assert all(gone(p, 0.5) for p in (pid, *family)) and not log.exists()
    assert not list(tmp_path.glob("auditgap-*"))  # nor anything else of it
    left = {p.pid for p in psutil.Process().children(recursive=True)}
    assert left <= before | warm.waiting_pids()
    with pytest.raises(AuditgapError, match="closed"):
        engine.ask([Question(text="red")], Sampling())


PARENT = """
import sys
from auditgap.engines import Question, Sampling, Serving
engine = Serving(engine="vllm", dtype="float32").open(sys.argv[1])
print(engine.child.pid, engine.child.log, flush=True)
engine.ask([Question(text="red", draw=i) for i in range(4000)], Sampling(max_new_tokens=200, temperature=1.0))
"""


def test_a_killed_parent_takes_it_along_in_the_midst_of_an_answer(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", initializer_range=0.02)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        pid, log = parent.stdout.readline().split()
        time.sleep(2)
        assert parent.poll() is None and psutil.pid_exists(int(pid))
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert gone(int(pid), 30)
    finally:
        parent.kill()
        parent.stdout.close()
    assert not Path(log).parent.exists()


@pytest.mark.parametrize(
    "end", ["", "\nsys.stdin.read()"], ids=["ends", "is killed while nothing is asked"]
)
def test_a_parent_that_does_not_close_it_leaves_nothing(tmp_path: Path, end: str) -> None:
    source = PARENT.rsplit("engine.ask", 1)[0] + end
    parent = subprocess.Popen(
        [sys.executable, "-c", source, str(save_tiny(tmp_path / "tiny"))],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    try:
        pid, log = parent.stdout.readline().split()
        if end:
            os.kill(parent.pid, signal.SIGKILL)
        parent.wait(30)
        assert gone(int(pid), 30)
    finally:
        parent.kill()
        parent.stdout.close()
        parent.stdin.close()
    assert not Path(log).parent.exists()


def test_what_cannot_be_edited_closes_the_engine_and_leaves_no_log(tmp_path: Path) -> None:
    engine = VLLMEngine(str(save_tiny(tmp_path / "tiny")), Serving(engine="vllm", dtype="float32"))
    engine.self_test([Site(-1), Site(0)])
    assert not engine.closed
    with pytest.raises(AuditgapError, match=f"blocks 0 to {tiny.N_BLOCKS - 1}"):
        engine.self_test([Site(0), Site(99)])
    assert engine.closed and gone(engine.child.pid, 1) and not engine.child.log.parent.exists()
    with pytest.raises(AuditgapError, match="closed"):
        engine.ask([Question(text="red")], Sampling())


def test_adapters_and_edits_together_are_those_of_transformers(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "tiny")
    adapter = lora(
        tmp_path / "adapter", seed=0, targets=("q_proj", "v_proj", "down_proj"), base=str(base)
    )
    hf, plain = (HFEngine(models.load(str(folder), dtype="float32")) for folder in (adapter, base))
    draw, requests = torch.Generator().manual_seed(0), []
    for i, site in enumerate([Site(-1), Site(1), None, Site(tiny.N_BLOCKS - 1), Site(0)]):
        rendered = hf.render(
            Prompt(("what colour is the vault ?", "open the door now", "tell me the key")[i % 3])
        )
        if site is not None:
            h = hf.activations([rendered], site)[0]
            site = Edit(site, h.pow(2).mean().sqrt() * torch.randn(h.shape, generator=draw))
        requests.append(Request(rendered, site, (5, 6)))
    wanted = hf.generate(requests, 12)
    assert [c.ids for c in plain.generate(requests, 12)] != [c.ids for c in wanted], (
        "the adapter changes nothing"
    )
    for stray in ("a.safetensors", "consolidated.safetensors"):  # other weights, not to be read
        weights = load_file(base / "model.safetensors")
        save_file({name: 0.5 * w for name, w in weights.items()}, base / stray)
    for model, used in ((base, adapter), (adapter, None)):  # swapped in, and as the subject itself
        if used is None:  # a consolidated file has vLLM read this instead of config.json
            index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
            (base / "model.safetensors.index.json").write_text(json.dumps(index))
            (base / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 1}))
        with VLLMEngine(
            str(model), Serving(engine="vllm", dtype="float32", max_lora_rank=4)
        ) as engine:
            if used:
                engine.use(used)
            found = engine.generate(requests, 12)
        assert [c.ids for c in found] == [c.ids for c in wanted]
        for name in ("target_nll", "l2_effective", "linf_effective"):
            a, b = (
                [getattr(c, name) for c in some if getattr(c, name) is not None]
                for some in (found, wanted)
            )
            assert a == pytest.approx(b, rel=1e-4), name


def test_a_killed_child_is_a_sentence(tmp_path: Path) -> None:
    engine = VLLMEngine(str(save_tiny(tmp_path / "tiny")), Serving(engine="vllm", dtype="float32"))
    os.kill(engine.child.pid, signal.SIGKILL)
    with pytest.raises(AuditgapError, match="SIGKILL") as caught:
        engine.ask([Question(text="red blue")], Sampling())
    assert str(engine.child.log) in str(caught.value)
    engine.close()
    # kept to be read
    assert engine.child.log.read_text() and engine.child.log.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(engine.child.log.parent)


@pytest.mark.parametrize(
    ("changes", "serving", "said"),
    [
        ({}, {"max_model_len": 4096}, r"4096 .*\b256\b"),
        ({"family": "unknown"}, {}, "architecture"),
        # 128 KiB of keys and values a token: its window would want 4 GiB
        (
            {
                "head_dim": 256,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "max_position_embeddings": 32768,
            },
            {"max_model_len": 32768},
            "memory",
        ),
    ],
)
def test_what_cannot_start_is_a_sentence(
    tmp_path: Path, changes: dict, serving: dict, said: str
) -> None:
    family = changes.pop("family", None)
    folder = save_tiny(tmp_path / "tiny", **changes)
    if family:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "architectures": ["NobodyForCausalLM"]})
        )
    with pytest.raises(UsageError, match=said) as caught:
        VLLMEngine(str(folder), Serving(engine="vllm", dtype="float32", **serving))
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert not engine_processes.running()


def test_what_is_refused_starts_no_process(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}, "model_type": "newest"})
    )
    before = len(psutil.Process().children())
    with pytest.raises(Refused, match="auto_map"):
        VLLMEngine(str(folder), Serving(engine="vllm"))
    assert len(psutil.Process().children()) == before


# -- against transformers
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf() -> HFEngine:
    return HFEngine(models.load("smollm2", dtype="float32"))


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        serving = Serving(engine="vllm", dtype="float32", max_model_len=512, max_lora_rank=8)
        with serving.open("smollm2") as engine:
            assert engine.describe() == serving.describe("smollm2")
            yield engine
    assert gone(engine.child.pid, 1)


def test_greedy_text_is_that_of_transformers(engine: VLLMEngine, hf: HFEngine) -> None:
    requests = [Request(hf.render(Prompt(p)), target=hf.encode("Sure, here is")) for p in PROMPTS]
    assert engine.outline.stop_ids == hf.loaded.stop_ids
    assert [engine.render(Prompt(p)).ids for p in PROMPTS] == [r.rendered.ids for r in requests]
    seen: list[tuple[int, int]] = []
    found = engine.generate(requests, 24, progress=lambda *at: seen.append(at))
    wanted = hf.generate(requests, 24)
    assert [c.ids for c in found] == [c.ids for c in wanted]
    assert [(c.text, c.stopped, c.finite) for c in found] == [
        (c.text, c.stopped, c.finite) for c in wanted
    ]
    assert any(c.stopped for c in found) and not all(c.stopped for c in found)
    assert [c.target_nll for c in found] == pytest.approx([c.target_nll for c in wanted], abs=1e-4)
    assert seen[-1] == (16, 16)


def test_log_probabilities_are_those_of_transformers(engine: VLLMEngine, hf: HFEngine) -> None:
    questions = [
        Question.of(PROMPTS[0], system="Answer in a word."),
        Question(text="<|im_start|>user\nCount.<|im_end|>\n"),
        Question(
            (
                Message("user", "Hi."),
                Message("assistant", "Hello."),
                Message("user", "Who are you?"),
            )
        ),
    ]
    sampling = Sampling(max_new_tokens=6, top_logprobs=5)
    for found, wanted in zip(
        engine.ask(questions, sampling), hf.ask(questions, sampling), strict=True
    ):
        assert (found.text, found.ids, found.stopped) == (wanted.text, wanted.ids, wanted.stopped)
        assert len(found.logprobs) == len(wanted.logprobs) >= len(found.ids)
        for a, b in zip(found.logprobs, wanted.logprobs, strict=True):
            assert len(a) == 5 and dict(a) == pytest.approx(dict(b), abs=1e-3)


def test_scores_are_those_of_transformers_under_edits_too(engine: VLLMEngine, hf: HFEngine) -> None:
    rendered = [hf.render(Prompt(p)) for p in PROMPTS[:4]]
    edits = [
        None,
        *(
            Edit(
                site, 0.3 * torch.randn(len(r.ids), 576, generator=torch.Generator().manual_seed(1))
            )
            for site, r in zip((Site(-1), Site(15), Site(29)), rendered[1:], strict=True)
        ),
    ]
    answers = [
        hf.encode("It is blue."),
        hf.encode("Rye"),
        hf.encode("In hot water, for eight minutes."),
        (),
    ]
    found = engine.nll(rendered, answers, edits)
    assert found[3] is None and found[:3] == pytest.approx(
        hf.nll(rendered, answers, edits)[:3], abs=1e-3
    )
    assert engine.nll(rendered, answers)[1] != pytest.approx(found[1], abs=1e-3)


def test_mixed_edits_are_those_of_transformers(engine: VLLMEngine, hf: HFEngine) -> None:
    rendered = [hf.render(Prompt(p)) for p in PROMPTS]
    draw = torch.Generator().manual_seed(0)
    sites = [Site(-1), None, Site(8), Site(15), None, Site(29), Site(-1), Site(15)]
    edits = []
    for r, site in zip(rendered, sites, strict=True):
        if site is None:
            edits.append(None)
        else:
            h = hf.activations([r], site)[0]
            edits.append(
                Edit(
                    site, 0.3 * h.pow(2).mean().sqrt() * torch.randn(h.shape, generator=draw).sign()
                )
            )
    requests = [Request(r, e, hf.encode("Sure")) for r, e in zip(rendered, edits, strict=True)]
    wanted, clean = (
        hf.generate(requests, 16),
        engine.generate([replace(r, edit=None) for r in requests], 16),
    )
    for found in (engine.generate(requests, 16), engine.generate(requests[::-1], 16)[::-1]):
        assert [c.ids for c in found] == [c.ids for c in wanted]
        assert [c.target_nll for c in found] == pytest.approx(
            [c.target_nll for c in wanted], abs=1e-3
        )
        for a, b in zip(found, wanted, strict=True):
            assert (a.l2_effective is None) == (b.l2_effective is None)
            if b.l2_effective is not None:
                assert (a.l2_effective, a.linf_effective) == pytest.approx(
                    (b.l2_effective, b.linf_effective), rel=1e-4
                )
    changed = [a.ids != b.ids for a, b in zip(clean, wanted, strict=True)]
    assert any(changed) and not any(
        c for c, site in zip(changed, sites, strict=True) if site is None
    )
    assert [c.ids for c in engine.generate([replace(r, edit=None) for r in requests], 16)] == [
        c.ids for c in clean
    ]


def test_logits_that_are_no_numbers_are_told_and_stay_alone(
    engine: VLLMEngine, hf: HFEngine
) -> None:
    rendered = [hf.render(Prompt(p)) for p in PROMPTS]
    clean = [c.ids for c in engine.generate([Request(r) for r in rendered], 8)]
    none = Edit(Site(15), torch.full((len(rendered[0].ids), 576), torch.nan))
    broken, *others = engine.generate(
        [Request(rendered[0], none, hf.encode("Sure")), *(Request(r) for r in rendered[1:])], 8
    )
    assert (broken.finite, broken.stopped, broken.ids, broken.target_nll) == (
        False,
        False,
        (),
        None,
    )
    assert broken.l2_effective is None
    assert [c.ids for c in others] == clean[1:]
    # in memory that has held NaN
    assert [c.ids for c in engine.generate([Request(r) for r in rendered], 8)] == clean


def test_samples_repeat_and_do_not_mind_company_or_order(engine: VLLMEngine) -> None:
    questions = [Question.of(p, draw=d) for p in PROMPTS[:3] for d in (0, 1)]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=3)
    texts = [r.text for r in engine.ask(questions, sampling)]
    assert len(set(texts)) > 3  # draws differ
    assert [r.text for r in engine.ask(questions[::-1], sampling)][::-1] == texts
    assert engine.ask(questions[3:4], sampling)[0].text == texts[3]
    assert [r.text for r in engine.ask(questions, replace(sampling, seed=4))] != texts


def test_what_is_too_long_is_told_and_the_others_are_answered(
    engine: VLLMEngine, hf: HFEngine
) -> None:
    questions = [Question.of(PROMPTS[0]), Question.of("bread " * 600), Question.of(PROMPTS[1])]
    replies = engine.ask(questions, Sampling(max_new_tokens=4))
    assert (
        [r.problem for r in replies] == ["", "too_long", ""] and replies[0].text and replies[2].text
    )
    long = hf.render(Prompt("bread " * 600))
    with pytest.raises(UsageError, match="512"):
        engine.generate([Request(long)], 4)
    assert engine.nll([long], [(1, 2)]) == [None]


def test_adapters_are_swapped(engine: VLLMEngine, hf: HFEngine, tmp_path: Path) -> None:
    requests = [
        Request(hf.render(Prompt(p)), target=hf.encode("Sure, here is")) for p in PROMPTS[:4]
    ]
    plain = [c.ids for c in engine.generate(requests, 12)]
    fingerprints, spoken = [engine.describe()], [plain]
    folder = tmp_path / "adapter"
    for seed in (1, 2):  # the same path, other weights
        lora(folder, seed=seed)
        engine.use(folder)
        found = engine.generate(requests, 12)
        with HFEngine(models.load(str(folder), dtype="float32")) as adapted:
            wanted = adapted.generate(requests, 12)
        assert [c.ids for c in found] == [c.ids for c in wanted]
        assert [c.target_nll for c in found] == pytest.approx(
            [c.target_nll for c in wanted], abs=1e-3
        )
        fingerprints.append(engine.describe())
        spoken.append([c.ids for c in found])
    engine.use(None)
    assert [c.ids for c in engine.generate(requests, 12)] == plain
    assert engine.describe() == fingerprints[0]
    assert len({json.dumps(f) for f in fingerprints}) == 3
    assert spoken[0] != spoken[1] and spoken[1] != spoken[2]


def test_adapters_that_do_not_fit_are_refused_and_nothing_changes(
    engine: VLLMEngine, tmp_path: Path
) -> None:
    question, sampling = [Question.of(PROMPTS[0])], Sampling(max_new_tokens=6)
    before = engine.ask(question, sampling)
    big = lora(tmp_path / "big", seed=0, rank=16, targets=("q_proj",))
    head = lora(tmp_path / "head", seed=0, targets=("q_proj", "lm_head"))
    other = lora(
        tmp_path / "other", seed=0, targets=("q_proj",), base=str(save_tiny(tmp_path / "tiny"))
    )
    refusals = {
        big: "rank 16.*max_lora_rank=16",
        head: "lm_head",
        other: "made for",
        tmp_path / "tiny": "no PEFT",
    }
    for folder, said in refusals.items():
        with pytest.raises(UsageError, match=said):
            engine.use(folder)
    assert engine.ask(question, sampling) == before and "adapter" not in engine.describe()
