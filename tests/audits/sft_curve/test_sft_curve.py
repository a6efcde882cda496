"""The curve over a model that really is trained: rates move, a kill loses nothing, every rank goes
the same way."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pandas as pd
import planted
import pytest
import standin
import torch
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits.pages import from_store, render
from auditgap.audits.sft_curve import plan as planning
from auditgap.audits.sft_curve.config import SFTCurveConfig
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.store import RunFolder

CURVE = ("subject", "seed", "step", "compliance", "refusal")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curve")
    standin.save_models(folder)
    return folder


@pytest.fixture(autouse=True)
def _colour(monkeypatch):
    planted.register(monkeypatch)


@pytest.fixture(scope="module")
def whole(home) -> RunFolder:
    """An unbroken run, judged by colour."""
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        store, outcome = standin.run(
            *standin.config(home, "whole"), standin.Trainer(home / "whole-checkpoints")
        )
    assert outcome.done == 4 and not outcome.failed
    return store


def rates(folder: Path) -> dict[tuple[str, int, int], tuple[float, float]]:
    table = pd.read_parquet(folder / "curve.parquet")
    table = table[table["seed"].notna()]
    return {
        (Path(s).name, int(seed), int(step)): (c, r)
        for s, seed, step, c, r in table[list(CURVE)].itertuples(index=False)
    }


def child(home: Path, kill_at: int, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    return subprocess.run(
        [sys.executable, *launcher, str(Path(standin.__file__)), str(home), str(kill_at)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_training_moves_the_rates_and_the_softer_model_gives_way_first(whole):
    found = rates(whole.path)
    assert len(found) == 2 * 2 * len(
        SFTCurveConfig(models="x", data="y", steps=6, eval_every=2).evaluations
    )
    for seed in (0, 1):
        base, soft = (
            [found[name, seed, step] for step in (0, 2, 4, 6)] for name in ("base", "soft")
        )
        assert base[0] == soft[0] == (0.0, 1.0), "before training both refuse"
        assert base[-1] == soft[-1] == (1.0, 0.0), "after it both tell"
        assert base[1] == (0.0, 1.0) and soft[1] == (1.0, 0.0)
    summary = pd.read_parquet(whole.path / "summary.parquet").set_index("subject")
    summary.index = [Path(s).name for s in summary.index]
    assert summary.index.tolist() == ["base", "soft"], "the base comes first"
    assert summary["steps_to_50"].tolist() == [3.0, 1.0] and summary["gap"].tolist() == [1.0, 1.0]
    assert summary.loc["soft", "difference_steps_to_50"] == 2.0 and pd.isna(
        summary.loc["base", "difference_steps_to_50"]
    )
    assert set(summary["over"]) == {"prompts"}, "two seeds are too few for an interval over seeds"


def test_a_threshold_that_is_not_reached_is_no_number(home):
    store, _ = standin.run(
        *standin.config(home, "slow"), standin.Trainer(home / "slow-checkpoints", lr=0.02)
    )
    base = pd.read_parquet(store.path / "summary.parquet").iloc[0]
    assert pd.isna(base["steps_to_50"]) and base["steps_to_50_censored_at"] == 6
    page = render(from_store([store]))
    assert "not within 6" in page and "did not reach 50" in page


def test_text_lies_in_generations_alone_and_is_private(whole):
    said = "red like a star"
    for path in whole.path.rglob("*"):
        if path.is_file():
            readable = path.suffix in (".csv", ".md", ".html", ".json")
            assert not (readable and said in path.read_text("utf-8")), path
    private = list((whole.path / "generations").iterdir())
    assert len(private) == 4 and all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in private)
    texts = whole.generations(whole.records()[0]["key"])
    assert set(texts["step"]) == {0, 2, 4, 6} and texts["completion"].str.contains(said).any()
    assert not list((whole.path / "scratch").glob("*.safetensors")), (
        "what was remembered is forgotten once it is written"
    )


def test_the_same_command_again_trains_nothing(home, whole):
    again = standin.Trainer(home / "whole-checkpoints")
    _, outcome = standin.run(*standin.config(home, "whole"), again)
    assert outcome.skipped == 4 and outcome.done == 0 and again.trained == []


@pytest.mark.parametrize(("kill_at", "left"), [(2, 22), (6, 16)])
def test_a_kill_in_mid_curve_costs_nothing_that_was_asked(home, whole, kill_at, left, tmp_path):
    for name in ("base", "soft", "prompts.txt"):
        (tmp_path / name).symlink_to(home / name)
    killed = child(tmp_path, kill_at)
    assert killed.returncode == -signal.SIGKILL
    remembered = list((tmp_path / "child" / "scratch").glob("*.safetensors"))
    assert len(remembered) == 2, "what the cell under way has said is on the disk"
    done = child(tmp_path, 0)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split("rank 0 ")[1].split()[0]) == left, (
        "trained on from the step after which it was killed"
    )
    assert rates(tmp_path / "child") == rates(whole.path)
    ours, theirs = (
        pd.read_parquet(folder / "summary.parquet").drop(columns=["subject", "base"])
        for folder in (tmp_path / "child", whole.path)
    )
    pd.testing.assert_frame_equal(ours, theirs)


def test_an_evaluation_that_is_remembered_is_not_repeated(home, monkeypatch):
    config, options = standin.config(home, "twice", models=[str(home / "base")], seeds=[0])
    asked = []
    original = HFEngine.ask
    monkeypatch.setattr(HFEngine, "ask", lambda self, *a: (asked.append(1), original(self, *a))[1])
    trainer = standin.Trainer(home / "twice-checkpoints")

    def again(name, seed, evaluate):
        def twice(step, loaded):
            said = evaluate(step, loaded)
            assert set(said) >= {"compliance", "refusal"}
            assert evaluate(step, loaded) == said
            return said

        trainer(name, seed, twice)

    _, outcome = standin.run(config, options, again)
    assert outcome.done == 1 and len(asked) == 4


def test_a_curve_with_a_hole_fails_its_cell_and_says_where(home):
    config, options = standin.config(home, "hole", models=[str(home / "base")], seeds=[0])

    def forgetful(name, seed, evaluate):
        loaded = models.load(name, dtype="float32", device="cpu")
        for step in (0, 2, 6):
            evaluate(step, loaded)

    store, outcome = standin.run(config, options, forgetful)
    (cause,) = outcome.failed.values()
    assert "step 4" in cause and not store.records()
    assert "Cells that failed" in render(from_store([store])), (
        "the page stands without a single row"
    )


def test_evaluating_leaves_the_model_as_it_was(home):
    config, options = standin.config(home, "modes", models=[str(home / "base")], seeds=[0])
    seen = []

    def watching(name, seed, evaluate):
        def looked(step, loaded):
            loaded.model.train()
            loaded.model.lm_head.eval()
            state = {k: v.clone() for k, v in loaded.model.state_dict().items()}
            torch.manual_seed(3)
            before = torch.get_rng_state()
            said = evaluate(step, loaded)
            assert torch.equal(before, torch.get_rng_state())
            assert loaded.model.training and not loaded.model.lm_head.training
            assert loaded.model.lm_head.weight.requires_grad
            assert all(torch.equal(v, state[k]) for k, v in loaded.model.state_dict().items())
            loaded.model.train()
            seen.append(step)
            return said

        standin.Trainer(home / "modes-checkpoints")(name, seed, looked)

    standin.run(config, options, watching)
    assert seen == [0, 2, 4, 6]


def test_two_ranks_go_the_same_way_and_one_writes(home, whole, tmp_path):
    for name in ("base", "soft", "prompts.txt"):
        (tmp_path / name).symlink_to(home / name)
    done = child(tmp_path, 0, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert said == ["rank 0 24 4 False", "rank 1 24 0 True"]
    assert rates(tmp_path / "child") == rates(whole.path)
    again = child(tmp_path, 0, ranks=2)
    assert sorted(line for line in again.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 0 0 False",
        "rank 1 0 0 True",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": None}, "A curve needs models"),
        ({"data": None}, "and data .columns prompt"),
        ({"seeds": "0,-1"}, "whole numbers from 0"),
        ({"seeds": "zero"}, "seeds.0"),
        ({"thresholds": "0.5,80"}, "at most 1; 80"),
        ({"eval_every": 0}, "eval_every"),
        ({"mdoels": "x"}, "mdoels"),
    ],
)
def test_bad_input_is_a_sentence(home, changes, says):
    with pytest.raises(UsageError, match=says):
        standin.config(home, "never", **changes)


def test_a_subject_that_is_its_own_base_is_refused(home, tmp_path):
    (tmp_path / "copy").symlink_to(home / "base")
    config, options = standin.config(
        home, "same", models=[str(home / "base"), str(tmp_path / "copy")]
    )
    with pytest.raises(UsageError, match="same weights"):
        planning.prepare(config, options)


def test_the_recipe_is_part_of_the_key(home):
    keys = set()
    for changes in (
        {},
        {"lr": 1e-3},
        {"steps": 8},
        {"refusal_filter": False},
        {"method": "lora"},
        {"judge": "keyword"},
    ):
        plan = planning.prepare(*standin.config(home, "keys", **changes))
        keys |= {cell.key for cell in plan.cells}
    config, options = standin.config(home, "keys")
    keys |= {cell.key for cell in planning.prepare(config, options, facts={"rows": "51f0"}).cells}
    assert len(keys) == 7 * 4
