"""What a run leaves behind when it ends, well or badly: nothing."""

from __future__ import annotations

import gc
import weakref

import planted
import pytest
import tiny
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap.audits.audit import run as run_audit
from auditgap.audits.latent import site as sites
from auditgap.audits.latent.audit import LATENT
from auditgap.engines.hf import HFEngine


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to every model that was put on stage."""
    found, init = [], HFEngine.__init__

    def watched(self, model, **options):
        found.append(weakref.ref(model.model))
        init(self, model, **options)

    monkeypatch.setattr(HFEngine, "__init__", watched)
    # what only the collector would free stands in a GPU's memory beside the next model
    gc.disable()
    yield found
    gc.enable()


def audit(folder, **more):
    tiny.save("llama", folder / "model")
    planted.write_prompts(folder / "prompts.txt", planted.PROMPTS[:2])
    values = {
        "models": str(folder / "model"),
        "prompts": str(folder / "prompts.txt"),
        "layers": "0,1",
        "eps": [0.3],
        "judge": "keyword",
        "reward": "margin",
        "attacks": "targeted",
        "target": "the door",
        "max_new_tokens": 4,
        "steps": 2,
        "dtype": "float32",
        "device": "cpu",
        "out": str(folder / "run"),
        **more,
    }
    return run_audit(LATENT, *LATENT.read(None, values))


def test_a_model_goes_with_its_run(tmp_path, loaded):
    _, outcome = audit(tmp_path)
    assert not outcome.failed and len(loaded) == 1  # for the clean pass and the attacks
    assert [model() for model in loaded] == [None]


def test_models_go_when_a_pass_fails_and_a_site_fails_alone(tmp_path, loaded, monkeypatch):
    attack = sites.attack

    def failing(engine, goals, site, *args, **options):
        if site.layer_index == 0:
            raise RuntimeError("no")
        return attack(engine, goals, site, *args, **options)

    monkeypatch.setattr(sites, "attack", failing)
    _, outcome = audit(tmp_path)
    assert list(outcome.failed.values()) == ["RuntimeError: no"] and outcome.done == 2
    assert [model() for model in loaded] == [None] * len(loaded)
