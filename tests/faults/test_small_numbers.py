"""Edits of nothing, and edits at the very edge of their ball."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import planted
import pytest
import tiny
import torch
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits.audit import run as run_audit
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.pages import from_store, render
from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import PGD, Ball, Goal, attack
from auditgap.models import wrap
from auditgap.types import Budget, Prompt, Subject

TEXTS = [
    "what is the colour of the vault ?",
    "please tell",
    "who can open the door of a vault now ?",
]


@pytest.fixture
def mute(tmp_path) -> Path:
    """A planted vault so sure of its opening that the target's gradient rounds to zero."""
    return planted.save(planted.Plant(door=1, sure=4000.0), tmp_path / "model")


def test_an_edit_of_norm_zero_has_a_finite_lvs_and_a_flag(mute, tmp_path):
    """No gradient, no edit: LVS divides by eta alone, every number is finite, and the row and the
    table say `degenerate`."""
    prompts = planted.write_prompts(tmp_path / "prompts.txt", planted.PROMPTS[:3])
    asked = {
        "models": str(mute),
        "prompts": str(prompts),
        "layers": "3",
        "eps": [0.02],
        "attacks": "targeted,random_matched",
        "target": planted.TARGET,
        "max_new_tokens": 4,
        "reward": "margin",
        "judge": "keyword",
        "dtype": "float32",
        "device": "cpu",
        "out": str(tmp_path / "out"),
    }
    store, outcome = run_audit(LATENT, *LATENT.read(None, asked))
    assert not outcome.failed, outcome.failed
    rows = store.rows(["targeted", "random_matched"])
    assert (rows["l2"] == 0).all(), "the premise: nothing to climb"
    assert rows["flags"].str.contains("degenerate").all()
    assert rows["lvs"].notna().all() and (rows["lvs"] == 0).all(), (
        "an edit of nothing takes nothing away"
    )
    numbers = rows.select_dtypes("number").to_numpy()
    assert not pd.isna(rows["lvs"]).any() and not (abs(numbers) == math.inf).any()
    table = pd.read_parquet(store.path / "lvs.parquet")
    assert table["flag"].str.split().map(lambda words: "degenerate" in words).all()
    assert "norm zero" in render(from_store([store]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", ["rms", "max", "absolute"])
def test_every_edit_stays_in_its_ball_in_fp32_and_in_the_models_dtype(dtype, unit):
    """|δ|∞ ≤ radius to the last bit in fp32, however odd the budget; cast to the model's dtype,
    within its one rounding."""
    engine = HFEngine(
        wrap(tiny.model("llama", dtype=dtype), tiny.tokenizer(), Subject("tiny", f"edge-{dtype}"))
    )
    rendered = [engine.render(Prompt(text)) for text in TEXTS]
    sizes = [0.0137, 0.1 + 0.2, 1 / 3]
    for name in ("embedding", "1", "last"):
        site = models.parse_sites(name, tiny.N_BLOCKS)[0]
        balls = [
            Ball.of(h, r.content)
            for h, r in zip(engine.activations(rendered, site), rendered, strict=True)
        ]
        radii = [tuple(ball.radius(Budget(size, unit)) for size in sizes) for ball in balls]
        goals = [
            Goal(r, engine.encode("Sure here"), rs) for r, rs in zip(rendered, radii, strict=True)
        ]
        for found, rs, ball in zip(
            attack(engine, goals, site, PGD(steps=5)), radii, balls, strict=True
        ):
            for one, radius, size in zip(found, rs, sizes, strict=True):
                largest = one.delta.abs().max()
                scale = {"rms": ball.rms, "max": ball.largest, "absolute": 1.0}[unit]
                assert one.delta.dtype == torch.float32 and 0 < largest.item() <= radius
                assert largest.double().item() <= size * scale * (1 + 1e-7)
                assert one.delta.to(dtype).abs().max().item() <= radius * (
                    1 + torch.finfo(dtype).eps
                )
