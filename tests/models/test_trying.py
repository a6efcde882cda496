"""What opens last is tried first: weights that are not those of their config, a judge without a
trained head. No honest model is refused, and no weight is read."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

import auditgap
from auditgap import models
from auditgap.errors import UsageError
from auditgap.judges import load_judge
from auditgap.models import trying
from auditgap.store.files import DiskError, read_json, to_json

HEAD = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def without_a_weight(tmp_path_factory) -> Path:
    folder = tiny.save("llama", tmp_path_factory.mktemp("lacks") / "lacks")
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_honest_model_opens(family, tmp_path):
    models.outline(str(tiny.save(family, tmp_path / family))).check_opens()


def test_tied_weights_are_not_missing(tmp_path):
    folder = tiny.save("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    models.outline(str(folder)).check_opens()


def test_the_second_subject_is_tried_before_the_first_is_audited(without_a_weight, tmp_path):
    (tmp_path / "asked.txt").write_text("say red now\n")
    whole = tiny.save("llama", tmp_path / "whole")
    with pytest.raises(UsageError, match=r"lacks: .*do not fit its config.*up_proj"):
        auditgap.evaluate(
            str(whole),
            str(without_a_weight),
            suite=f"{tmp_path / 'asked.txt'}:harmful",
            judge="keyword",
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("judge", ["guard={}", "hf:{}", "majority(keyword,guard={},builtin)"])
def test_a_judge_that_cannot_be_opened_is_refused_before_anything_is_asked(
    judge, without_a_weight, tmp_path
):
    (tmp_path / "asked.txt").write_text("say red now\n")
    whole = tiny.save("llama", tmp_path / "whole")
    if judge.startswith("hf"):  # a causal LM, whose head as a classifier is nobody's
        told = read_json(without_a_weight / "config.json") or {}
        (without_a_weight / "config.json").write_bytes(to_json({**told, "num_labels": 1}))
    with pytest.raises(UsageError, match=r"do not fit its config|no trained sequence classifier"):
        auditgap.evaluate(
            str(whole),
            suite=f"{tmp_path / 'asked.txt'}:harmful",
            judge=judge.format(without_a_weight),
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_no_classifier_at_all_is_a_sentence(tmp_path):
    folder = tiny.save("olmo2", tmp_path / "m", num_labels=1)
    with pytest.raises(UsageError, match="sequence classifier"):
        load_judge(f"hf:{folder}", device="cpu").describe()


def test_no_weight_is_read(tmp_path):
    """A file of 60 GB with a true header and nothing behind it."""
    folder = tiny.save("llama", tmp_path / "m")
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 32}
    told = {**(read_json(folder / "config.json") or {}), **sizes, "num_key_value_heads": 4}
    (folder / "config.json").write_bytes(to_json({**told, "head_dim": 2048}))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header, at = {}, 0
    for name, weight in model.state_dict().items():
        end = at + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [at, end]}
        at = end
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + at)
    assert at > 60e9
    started = time.monotonic()
    trying.check_fits(folder, "m")
    assert time.monotonic() - started < 20


def test_an_output_that_cannot_be_written_is_said_before_a_model_is_looked_at(tmp_path):
    (tmp_path / "file").write_text("x")
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    asked = {"suite": f"{tmp_path / 'none.txt'}:harmful", "judge": "keyword"}
    with pytest.raises(UsageError, match="file is a file; a run needs a folder"):
        auditgap.evaluate("/no/such/model", **asked, out=tmp_path / "file" / "run")
    if os.geteuid():  # who may write anywhere is refused by no mode
        with pytest.raises(DiskError, match=r"Could not write .*run.*permissions"):
            auditgap.evaluate("/no/such/model", **asked, out=shut / "run")
    assert not list(shut.iterdir())
