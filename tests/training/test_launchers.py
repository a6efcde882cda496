"""The same training under every launcher: real processes, compared step by step and weight by
weight."""

from __future__ import annotations

import re
import runpy
import sys

import jobs
import pytest
import safetensors.torch
import torch
import warm
import yaml

from auditgap.cli import main

RANKS = {"deepspeed": 2, "torchrun": 2, "accelerate": 2}


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def plain(world):
    recipe = world.sft("plain")
    words = jobs.sets({key: value for key, value in recipe.items() if key != "out"})
    with warm.cold():  # as users start it
        done = jobs.run("python", 1, [jobs.LAUNCHERS / "sft.py", *words, "--out", recipe["out"]])
    assert done.rc == 0, done.tail
    assert "Done:" in done.out
    return world.folder / "plain"


@pytest.mark.parametrize("launcher", RANKS)
def test_every_launcher_trains_the_same(world, plain, launcher):
    recipe = world.sft(launcher)
    out = recipe.pop("out")
    done = jobs.run(
        launcher, RANKS[launcher], [jobs.LAUNCHERS / "sft.py", *jobs.sets(recipe), "--out", out]
    )
    assert done.rc == 0, done.tail
    assert not done.left
    assert_same(plain, world.folder / launcher)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_train_the_same(world, plain, tmp_path, launcher):
    recipe = world.sft(f"nodes-{launcher}")
    out = recipe.pop("out")
    words = [jobs.LAUNCHERS / "sft.py", *jobs.sets(recipe), "--out", out]
    for done in jobs.nodes(launcher, 2, words, tmp_path):
        assert done.rc == 0, done.tail
        assert not done.left
    assert_same(plain, world.folder / f"nodes-{launcher}")


def assert_same(one, other):
    assert len(jobs.curve(other)) == 6
    assert jobs.curve(other) == pytest.approx(jobs.curve(one), abs=1e-5)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


def test_the_command_line_trains_the_same(world, plain, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(world.sft("ignored")))
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "train",
                "sft",
                "--config",
                str(file),
                "--set",
                "report_to=none",
                "--out",
                str(world.folder / "twin"),
            ]
        )
    assert ended.value.code == 0
    assert "Model:" in capsys.readouterr().out
    assert_same(plain, world.folder / "twin")


def test_the_comparison_sees_a_training(plain, world):
    """What was trained is not what was loaded, and the losses fall: else the comparison above would
    compare nothing."""
    base = safetensors.torch.load_file(world.model / "model.safetensors")
    assert max(float((base[name] - w).abs().max()) for name, w in weights(plain).items()) > 1e-3
    losses = jobs.curve(plain)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("name", ["sft", "dissociate", "harmful_sft", "fit_monitor"])
def test_help_has_an_example(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"launchers/{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(jobs.LAUNCHERS / f"{name}.py"), run_name="__main__")
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert ended.value.code == 0
    assert (
        f"launchers/{name}.py --" in shown and "Example:" in shown and "--deepspeed-config" in shown
    )
