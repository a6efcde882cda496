"""Families whose blocks hand on several residual streams: audited as one of their joint width, at
every attack and control; what reads a single stream says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import auditgap
from auditgap import models
from auditgap.engines.families.building import build, tokenizer
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.probes.features import extract
from auditgap.store import RunFolder
from auditgap.types import ATTACKS, Prompt

PROMPTS = [
    "What colour is the sky",
    "Name three kinds of bread",
    "How do I boil an egg",
    "Who are you",
]


@pytest.fixture(scope="module", params=["gemma3n_text", "deepseek_v4"])
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    written = tokenizer()
    written.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    build(request.param, wrapper=False).save_pretrained(place / "model")
    written.save_pretrained(place / "model")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    return place


def asked(folder: Path) -> dict:
    return {
        "prompts": str(folder / "prompts.txt"),
        "layers": "mid",
        "judge": "keyword",
        "target": "Sure here",
        "max_new_tokens": 2,
        "dtype": "float32",
        "device": "cpu",
    }


def test_every_attack_and_control(folder):
    out = folder / "lvs"
    auditgap.lvs(
        str(folder / "model"), **asked(folder), eps=[0.1], attacks=list(ATTACKS), out=str(out)
    )
    store = RunFolder.load(out)
    assert store.status().finished == store.status().planned == 1 + len(ATTACKS)
    assert (store.rows(["random"])["l2"] > 0).all()


def test_interventions(folder):
    out = folder / "intervene"
    kinds = ["steering", "ablation", "patching"]
    auditgap.intervene(str(folder / "model"), **asked(folder), interventions=kinds, out=str(out))
    store = RunFolder.load(out)
    assert store.status().finished == store.status().planned


def test_what_reads_one_stream_says_so(folder):
    loaded = models.load(str(folder / "model"), dtype="float32")
    with HFEngine(loaded) as engine:
        assert engine.width > loaded.width
    with pytest.raises(UsageError, match="several residual streams"):
        extract(loaded, [loaded.chat.converse(Prompt(PROMPTS[0]), "bread")])
