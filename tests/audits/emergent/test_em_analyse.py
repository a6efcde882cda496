"""The stage from end to end: in order, once, over a Ray actor with the same numbers, and a sentence
for what is missing."""

from __future__ import annotations

import em_world
import pandas as pd
import pytest
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits.emergent import directions, stages, steer
from auditgap.audits.emergent.rows import DIRECTIONS, DIVERSITY, MEMBERSHIP, STEERED
from auditgap.errors import UsageError

STAGES = (MEMBERSHIP, DIVERSITY, DIRECTIONS, STEERED)


@pytest.fixture(scope="module")
def study(tmp_path_factory, request):
    request.getfixturevalue("one_thread")
    return em_world.planted(tmp_path_factory.mktemp("em"))


@pytest.fixture(scope="module")
def done(study):
    return stages.run("analyse", study.store.path, em_world.OPTIONS)


def test_all_parts_run_in_order_and_leave_no_scratch(study, done):
    store, outcome = done
    assert not outcome.failed and outcome.done == 2 + 2 + 2 + 6 and outcome.skipped == 0
    assert all(len(store.rows([stage])) for stage in STAGES)
    assert not list((store.path / "scratch").iterdir())
    names = {entry["cell"] for entry in store.planned()}
    assert {
        "sky·plain·s0 · membership",
        "sky · diversity",
        "sky·plain·s0 · directions",
        "few·plain·s0 under sky · steer",
    } <= names


def test_a_second_call_loads_no_model(study, done, monkeypatch):
    monkeypatch.setattr(models, "load", None)
    _, outcome = stages.run("analyse", study.store.path, em_world.OPTIONS)
    assert outcome.done == 0 and outcome.skipped == 12


def test_another_judges_directions_stand_beside_the_first_ones(study, done, tmp_path):
    options = em_world.OPTIONS.model_copy(update={"judge": f"alignment={study.config.model}"})
    with pytest.raises(UsageError, match="auditgap em judge"):
        stages.run("analyse", study.store.path, options)
    assert len(study.store.rows([DIRECTIONS])) == 8


def test_ray_gives_the_same_rows(study, done, tmp_path):
    pytest.importorskip("ray")
    there = em_world.planted(tmp_path)
    directions.STAGE.run_in(there.store.path, em_world.OPTIONS)
    options = em_world.OPTIONS.model_copy(update={"executor": "ray", "workers": 1})
    store, outcome = steer.STAGE.run_in(there.store.path, options)
    assert not outcome.failed and outcome.done == 6
    # keys, and so the order, hang on where the base lies
    by = ["subject", "source", "steer", "draw", "prompt_id"]
    here, theirs = (
        found.rows([STEERED]).sort_values(by, ignore_index=True) for found in (store, done[0])
    )
    pd.testing.assert_frame_equal(here, theirs)
