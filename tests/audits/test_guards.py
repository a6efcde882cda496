"""Guards that nothing else here makes act: completions of logits that are no numbers, weights that
change after the plan, the order in which cells are graded again, an infinite gradient, a process of
another user. tests/mutants.py breaks them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import planted
import pytest
import torch
from planted import Plant

from auditgap import audits, judges
from auditgap.audits.latent import worker
from auditgap.engines.hf import HFEngine
from auditgap.interventions.descent import PGD, LinfBall, descend
from auditgap.store import RunFolder
from auditgap.store.files import alive
from auditgap.types import CLEAN, Score

ASKED = {"layers": "1", "eps": [0.1], "attacks": "targeted"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("guards")
    planted.write_prompts(home / "prompts.txt", planted.PROMPTS[:4])
    planted.save(Plant(door=1), home / "model")
    return home


def audit(home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    planted.register(monkeypatch)
    return planted.audit(out, [home / "model"], home / "prompts.txt", **ASKED)


def test_what_logits_that_are_no_numbers_said_is_unscored(home, tmp_path, monkeypatch):
    """Not a refusal, not harmful: nobody knows what it would have said."""
    generate = HFEngine.generate

    def broken_by_the_edit(self, requests, *args, **named):
        done = generate(self, requests, *args, **named)
        return [replace(c, finite=r.edit is None) for r, c in zip(requests, done, strict=True)]

    monkeypatch.setattr(HFEngine, "generate", broken_by_the_edit)
    store = audit(home, tmp_path / "run", monkeypatch)
    assert set(store.rows([CLEAN])["verdict_clean"]) == {"refusal"}
    rows = store.rows(["targeted"])
    assert len(rows) == 4 and set(rows["verdict_edited"]) == {"unscored"}
    assert rows["unscored"].str.contains("nonfinite_logits").all()
    assert rows["coherent"].isna().all() and rows["lvs"].isna().all()


def test_weights_that_changed_since_the_plan_are_not_audited(home, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for path in (home / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "prompts.txt").write_bytes((home / "prompts.txt").read_bytes())
    begin = worker.LatentWorker.open

    def after_another_model_was_saved(self, name):
        planted.save(Plant(door=2, seed=5), tmp_path / "model")
        begin(self, name)

    monkeypatch.setattr(worker.LatentWorker, "open", after_another_model_was_saved)
    with pytest.raises(AssertionError, match="changed since the run was planned"):
        audit(tmp_path, tmp_path / "run", monkeypatch)


class Words:
    """A reward that the first run did not have: the fewer words the safer."""

    name = "words"

    def describe(self):
        return {"scorer": self.name, "version": 1}

    def score(self, exchanges):
        return [Score(-float(len(e.completion.split()))) for e in exchanges]


@pytest.mark.parametrize("clean_comes", ["first", "last"])
def test_cells_graded_again_are_held_against_the_clean_cell_graded_again(
    home, tmp_path, monkeypatch, clean_comes
):
    """In whatever order the folder has them."""
    monkeypatch.setitem(judges.REWARDS, Words.name, judges.Scorer("few words", Words))
    store = audit(home, tmp_path / "run", monkeypatch)
    records = RunFolder.records

    def in_that_order(self):
        last = clean_comes == "last"
        return sorted(records(self), key=lambda r: (r["description"]["attack"] == CLEAN) == last)

    monkeypatch.setattr(RunFolder, "records", in_that_order)
    rows = audits.regrade(store.path, audits.Grading(reward=Words.name)).rows(["targeted"])
    words = {
        kind: store.generations(r["key"]).set_index("prompt_id")["completion"].str.split().str.len()
        for r in store.records()
        for kind in [r["description"]["attack"]]
    }
    rows = rows.set_index("prompt_id")
    assert (rows["clean_reward"] == -words[CLEAN].reindex(rows.index)).all()
    assert (rows["edited_reward"] == -words["targeted"].reindex(rows.index)).all()


def test_a_process_of_another_user_is_alive(monkeypatch):
    def not_yours(pid: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_yours)
    assert alive(os.getppid())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_with_a_broken_gradient_stays_where_it_was(value):
    """The sign of an infinite gradient is a step like any other."""
    start = torch.zeros(2, 3, 4)
    ball = LinfBall(torch.ones(2, 1, 1), torch.ones(2, 3, 1))

    def gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad = torch.ones_like(x)
        grad[0, 1, 2] = value
        return torch.zeros(2), grad

    found = descend(gradient, lambda x: torch.zeros(2), start, ball, PGD(steps=2))
    assert found.finite.tolist() == [False, True]
    assert torch.equal(found.x[0], start[0]) and (found.x[1] == -0.5).all()
