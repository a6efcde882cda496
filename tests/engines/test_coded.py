"""Edits by the byte are the same edits, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from auditgap import models
from auditgap.engines.coded import Coded
from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.types import Prompt, Site


def is_same(rows: torch.Tensor, kept: Coded) -> bool:
    back = Coded.read(kept.arrays("x"), "x").rows()
    return rows.dtype == back.dtype and rows.numpy().tobytes() == back.numpy().tobytes()


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 600)),
        elements=st.sampled_from([0.0, -0.0, 1e-38, 0.5, -0.5, 3.25, float("inf"), float("nan")]),
    )
)
def test_whatever_the_rows_are(rows):
    kept = Coded.of(torch.from_numpy(rows))
    assert is_same(torch.from_numpy(rows), kept) and kept.codes.dtype == torch.uint8


def test_rows_of_more_values_than_a_byte_tells_stay_as_they_are():
    rows = torch.randn(3, 700)
    kept = Coded.of(rows)
    assert is_same(rows, kept) and kept.codes.nbytes + kept.book.nbytes == rows.nbytes
    rows = rows[:, :1].repeat(1, 700)
    rows[1, -1] = 7.0  # seen by the second look alone
    kept = Coded.of(rows)
    assert is_same(rows, kept) and kept.book.shape == (3, 2)


@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
def test_the_edits_of_both_attacks_fit_a_byte(tmp_path, schedule):
    folder = tiny.save("llama", tmp_path / "m", hidden_size=256, intermediate_size=64)
    engine = HFEngine(models.load(str(folder), dtype="float32"))
    goal = Goal(engine.render(Prompt("What colour is the vault?")), (5, 6, 7), (0.05, 0.2))
    (found,) = attack(engine, [goal], Site(0), PGD(steps=10, schedule=schedule))
    for one in found:
        kept = Coded.of(one.delta)
        assert is_same(one.delta, kept) and kept.codes.dtype == torch.uint8
        assert kept.book.shape[1] <= (32 if schedule == "constant" else 128)
