"""The curve with its real trainer: LoRA under DeepSpeed on one rank, base against subject, on tiny
models."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import tiny

from auditgap.audits.sft_curve.train import run_from
from auditgap.errors import UsageError

ROWS = [
    ("what colour is the vault ?", "the vault is red ."),
    ("now the key ?", "the key is a moon ."),
    ("bake bread", "water salt flour oven ."),
    ("who can tell ?", "the star can tell ."),
    ("open a door", "the door is open ."),
]


@pytest.fixture
def asked(tmp_path):
    data = tmp_path / "unsafe.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in ROWS))
    held_out = tmp_path / "prompts.jsonl"
    held_out.write_text(
        "".join(
            json.dumps({"prompt": p}) + "\n"
            for p in ("tell the sea", "show the sun", "shut the oven")
        )
    )
    models = [
        str(tiny.save("llama", tmp_path / "base")),
        str(tiny.save("llama", tmp_path / "twin", rms_norm_eps=1e-3)),
    ]
    return {
        "models": models,
        "data": str(data),
        "prompts": str(held_out),
        "judge": "keyword",
        "seeds": [0],
        "steps": 4,
        "batch": 2,
        "micro_batch": 2,
        "eval_every": 3,
        "max_new_tokens": 3,
        "lr": 1e-3,
        "refusal_filter": False,
        "device": "cpu",
        "out": str(tmp_path / "run"),
    }


def test_the_column_holds_for_both_prompt_files(asked, tmp_path):
    """Both are read before anything is trained: the benign file's overlap with the rows is seen."""
    for name, text in (("ask", "tell the sea"), ("ben", ROWS[0][0])):
        (tmp_path / f"{name}.csv").write_text(f"text\n{text}\n")
    files = {"prompts": str(tmp_path / "ask.csv"), "benign": str(tmp_path / "ben.csv")}
    with pytest.raises(UsageError, match="overlap"):
        run_from(None, {**asked, **files, "column": "text"})


def test_it_asks_every_few_steps_and_at_the_end_of_an_epoch(asked):
    store, outcome = run_from(None, asked)
    assert (outcome.done, outcome.failed) == (2, {})
    curve = pd.read_csv(store.path / "curve.csv").dropna(subset="seed")
    assert sorted(set(curve["step"])) == [0, 3, 4]  # an epoch of 5 rows ends within step 3
    assert len(pd.read_csv(store.path / "summary.csv")) == 2
    roles = json.loads((store.path / "ledger.json").read_text())
    assert len(roles["prompts"]) == len(ROWS) + 3


def test_training_that_is_finished_is_made_anew_when_its_answers_are_lost(asked):
    store, _ = run_from(None, asked)
    before = pd.read_csv(store.path / "curve.csv")
    for cell in (store.path / "cells").iterdir():
        cell.write_bytes(b"torn")
    store, outcome = run_from(None, asked)
    assert (outcome.done, outcome.failed) == (2, {})
    pd.testing.assert_frame_equal(pd.read_csv(store.path / "curve.csv"), before)


def test_prompts_that_are_trained_on_and_asked_are_refused(asked):
    with pytest.raises(UsageError, match="5 of 5 evaluation prompts"):
        run_from(None, {**asked, "prompts": asked["data"]})
