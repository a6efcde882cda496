"""A grid of audits: what it plans, that its tables do not depend on who computed the cells, and
folders joined afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import run_folders
import tiny
import torch
import yaml

from auditgap.audits import grid
from auditgap.audits.latent import plan
from auditgap.cli import main
from auditgap.errors import Refused, UsageError
from auditgap.models import outlines
from auditgap.store import RunFolder, merge, tables
from auditgap.training.tracking import read_log

pytestmark = pytest.mark.minutes

COMMON = {
    "layers": "embedding,1",
    "max_new_tokens": 4,
    "steps": 2,
    "judge": "keyword",
    "reward": "margin",
    "target": "Sure , here is",
    "attacks": ["targeted", "random_matched"],
    "device": "cpu",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two models, two prompt sets, and a grid of them; each prompt set is a case, and a unit of its
    own is one more."""
    folder = tmp_path_factory.mktemp("grid")
    tiny.save("llama", folder / "a")
    tiny.save("qwen2", folder / "b")
    for name, words in (
        ("vault", ("red", "blue", "green", "sun")),
        ("door", ("open", "shut", "key")),
    ):
        (folder / f"{name}.txt").write_text(
            "\n".join(f"please tell the colour of the vault {w} {name}" for w in words)
        )
    values = {
        **COMMON,
        "models": [str(folder / "a"), {"name": str(folder / "b"), "gpus_per_worker": 0}],
        "prompts": [str(folder / "vault.txt"), str(folder / "door.txt")],
        "budgets": {"rms": [0.05, 0.2]},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """As in a Ray worker with one CPU: with another number of threads a sum's last digits may
    differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(bench: Path, **changes) -> grid.Grid:
    return grid.make_grid(grid.read_grid(bench / "grid.yaml", changes))


def content(out: Path) -> str:
    """SHA-256 of what the joined table says."""
    table = pd.read_parquet(out / "lvs.parquet")
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# planning


def test_a_cell_is_planned_once_however_it_is_written(bench):
    a = str(bench / "a")
    planned = made(
        bench,
        models=[a, {"name": a}, a],
        budgets={"rms": ["1e-3", 0.001, 0.0010]},
        prompts=[str(bench / "door.txt")],
    )
    (case,) = planned.cases
    assert case.config.models == (a,) and case.config.eps == (0.001,)
    assert len(planned.cells) == 1 + 2 * 2
    keys = [cell.key for group in planned.groups for cell in group.cells]
    assert sorted(keys) == sorted(planned.cells)


def test_cases_share_the_clean_pass_and_nothing_else(bench):
    planned = made(bench, budgets={"rms": [0.05], "max": [0.01]})
    assert len(planned.cases) == 4, "two prompt sets, two units"
    assert sum(len(g.cells) for g in planned.passes[0]) == 2 * 2, (
        "one clean cell a model and prompt set, whatever the unit"
    )
    assert sum(len(case.plan.cells) for case in planned.cases) == len(planned.cells) + 4
    assert {cell.attack for group in planned.passes[0] for cell in group.cells} == {"clean"}


def test_groups_of_a_subject_stand_together_and_the_dear_ones_first(bench):
    planned = made(bench, layers="all")
    subjects = [group.subject for group in planned.passes[1]]
    assert sum(x != y for x, y in pairwise(subjects)) == 1
    of_a_case = [
        g.work
        for g in planned.passes[1]
        if (g.subject, g.case) == (subjects[0], planned.passes[1][0].case)
    ]
    assert of_a_case == sorted(of_a_case, reverse=True) and len(set(of_a_case)) > 1


def test_a_model_may_have_its_own_dtype_layers_and_gpus(bench):
    own = {"name": str(bench / "b"), "dtype": "bfloat16", "layers": "2", "gpus_per_worker": 0.25}
    planned = made(bench, models=[str(bench / "a"), own], prompts=[str(bench / "door.txt")])
    assert [(case.config.dtype, case.config.layers) for case in planned.cases] == [
        ("float32", "embedding,1"),
        ("bfloat16", "2"),
    ]
    assert {(Path(g.cells[0].subject.name).name, g.gpus) for g in planned.groups} == {
        ("a", None),
        ("b", 0.25),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": []}, "Which models"),
        ({"models": [{"dtype": "float32"}]}, "with `name`"),
        ({"models": [{"name": "a", "epss": 1}]}, "epss"),
        ({"models": [{"name": "a", "prompts": "x"}]}, "may not have"),
        ({"models": [{"name": "a", "gpus_per_worker": -1}]}, "gpus_per_worker"),
        ({"budgets": {"rmss": [0.1]}}, "rmss"),
        ({"budgets": {"rms": ["nan"]}}, "nan"),
        ({"eps": [0.1]}, "not both"),
        ({"stepss": 3}, "steps"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(bench, changes, said):
    with pytest.raises(UsageError, match=said):
        grid.read_grid(bench / "grid.yaml", changes)


def test_foreign_code_is_refused(bench):
    for changes in (
        {"trust_remote_code": True},
        {"models": [{"name": "a", "trust_remote_code": True}]},
    ):
        with pytest.raises(Refused):
            grid.read_grid(bench / "grid.yaml", changes)


def test_a_dry_run_shows_the_plan_and_runs_nothing(bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "grid",
                "--config",
                str(bench / "grid.yaml"),
                "--out",
                str(tmp_path / "out"),
                "--dry-run",
                "--json",
            ]
        )
    shown = json.loads(capsys.readouterr().out)
    planned = made(bench)
    assert (
        stop.value.code == 0 and shown["cells"] == len(planned.cells) and len(shown["cases"]) == 2
    )
    assert (
        sum(group["cells"] for group in shown["groups"]) == len(planned.cells)
        and shown["repeated"] == {}
    )
    assert sum(one["work"] for one in shown["order"]) == pytest.approx(1.0)
    assert [one["model"] for one in shown["order"]] == list(
        dict.fromkeys(g.cells[0].subject.name for g in planned.passes[1])
    )
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_was_asked_twice(bench, tmp_path, capsys):
    """By the file (`1e-3` and `0.001`, a model twice) and by content (two names of one model)."""
    a, twin = str(bench / "a"), shutil.copytree(bench / "a", tmp_path / "twin")
    values = {
        **COMMON,
        "models": [a, a, str(twin)],
        "prompts": [str(bench / "door.txt")],
        "budgets": {"rms": ["1e-3", 0.001, 0.5]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    assert grid.repeated(tmp_path / "grid.yaml", {}) == {f"models: {a}": 2, "budgets.rms: 0.001": 2}
    assert grid.repeated(None, {**values, "models": a, "budgets": {}, "eps": "0.1,1e-1"}) == {
        "budgets.rms: 0.1": 2
    }
    with pytest.raises(SystemExit) as stop:
        main(["grid", "--config", str(tmp_path / "grid.yaml"), "--dry-run"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        stop.value.code == 0 and "budgets.rms: 0.001 is asked for 2 times and counts once" in said
    )
    assert "has the weights of another model" in said
    assert "9 cells" in said and "on one worker" in said and "In this order" in said


def test_a_model_is_fingerprinted_once_however_many_cases_it_is_in(bench, monkeypatch):
    """Weights of many gigabytes take minutes to hash; so do prompts and a judge's own weights."""
    seen, read = [], []
    fingerprint, load_prompts = outlines.fingerprint, plan.load_prompts
    monkeypatch.setattr(
        outlines,
        "fingerprint",
        lambda folder, **how: seen.append(folder.name) or fingerprint(folder, **how),
    )
    monkeypatch.setattr(
        plan,
        "load_prompts",
        lambda *which, **how: read.append(which) or load_prompts(*which, **how),
    )
    planned = made(bench, budgets={"rms": [0.05], "max": [0.01], "absolute": [0.1]})
    assert len(planned.cases) == 6 and sorted(seen) == ["a", "b"] and len(read) == 2


# -------------------------------------------------------------------------------------------------------------
# running


@pytest.fixture(scope="module")
def local(bench):
    torch.set_num_threads(1)
    planned = made(bench, out=str(bench / "local"))
    outcome = grid.run(planned)
    assert (outcome.done, outcome.failed) == (len(planned.cells), {})
    return bench / "local"


def test_every_case_is_a_run_folder_with_its_own_report(bench, local):
    planned = made(bench)
    table = pd.read_parquet(local / "lvs.parquet")
    assert set(table["case"]) == {case.name for case in planned.cases}
    for case in planned.cases:
        own = pd.read_parquet(local / case.name / "lvs.parquet")
        assert (local / case.name / "report.html").exists() and len(own) == 2 * 2 * 2 * 2
        assert set(own["n"]) == {len(case.plan.prompts.prompts)}
    again = grid.run(made(bench, out=str(local)))
    assert (again.done, again.skipped, again.failed) == (0, len(planned.cells), {})


@pytest.mark.parametrize("workers", [1, 4])
def test_on_ray_the_table_is_the_local_one(bench, local, tmp_path, workers):
    pytest.importorskip("ray")
    there = {"out": str(tmp_path / "out"), "executor": "ray", "workers": workers}
    outcome = grid.run(made(bench, **there, report_to="tensorboard"))
    assert outcome.failed == {} and outcome.done == len(made(bench).cells)
    # what the actors finished is told by the process that hands out their work
    told = read_log(tmp_path / "out" / "log.jsonl")
    assert told[-1]["step"] == told[-1]["cells/done"] == outcome.done
    cases = {case.name for case in made(bench).cases}
    assert cases == {name.split("/")[0] for name in told[-1] if "/asr/" in name}
    assert any((tmp_path / "out" / "tensorboard").iterdir())
    assert content(tmp_path / "out") == content(local)


KILLED = """
import os, signal, sys
from auditgap.cli import main
from auditgap.store import RunFolder
left = int(sys.argv[1])
write = RunFolder.write
def counting(self, *args, **named):
    global left
    write(self, *args, **named)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.write = counting
main(sys.argv[2:])
"""


def test_killed_and_resumed_the_table_is_that_of_an_unbroken_run(bench, local, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        KILLED,
        "9",
        "grid",
        "--config",
        str(bench / "grid.yaml"),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (out / "lvs.parquet").exists()
    planned = made(bench, out=str(out))
    outcome = grid.run(planned)
    assert (
        outcome.skipped >= 9
        and outcome.done + outcome.skipped == len(planned.cells)
        and not outcome.failed
    )
    assert content(out) == content(local)


def test_a_grid_that_has_grown_computes_what_is_new(bench, tmp_path):
    small = made(
        bench,
        models=[str(bench / "a")],
        prompts=[str(bench / "door.txt")],
        out=str(tmp_path / "out"),
    )
    grid.run(small)
    grown = made(
        bench,
        prompts=[str(bench / "door.txt")],
        budgets={"rms": [0.05, 0.2], "max": [0.01]},
        out=str(tmp_path / "out"),
    )
    outcome = grid.run(grown)
    assert (
        outcome.skipped == len(small.cells)
        and outcome.done == len(grown.cells) - len(small.cells)
        and not outcome.failed
    )
    assert set(pd.read_parquet(tmp_path / "out" / "lvs.parquet")["case"]) == {
        case.name for case in grown.cases
    }


# -------------------------------------------------------------------------------------------------------------
# joining


@pytest.fixture(scope="module")
def halves(bench):
    """One audit of two models, and the same by two machines with a model each."""
    folders = []
    for name, subjects in (("whole", ["a", "b"]), ("one", ["a"]), ("two", ["b"])):
        values = {
            **COMMON,
            "models": [str(bench / m) for m in subjects],
            "prompts": [str(bench / "door.txt")],
            "eps": [0.05],
        }
        planned = grid.make_grid(grid.read_grid(None, {**values, "out": str(bench / name)}))
        torch.set_num_threads(1)
        grid.run(planned)
        folders.append(bench / name / planned.cases[0].name)
    return folders


def test_merged_halves_are_the_whole(bench, halves, tmp_path, capsys):
    whole, one, two = halves
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(one), str(two), "--out", str(tmp_path / "merged")])
    assert stop.value.code == 0 and "10 of 10 cells, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "merged" / "lvs.parquet").read_bytes() == (
        whole / "lvs.parquet"
    ).read_bytes()
    joined = RunFolder.load(tmp_path / "merged")
    assert [r["sha256"] for r in joined.records()] == [
        r["sha256"] for r in RunFolder.load(whole).records()
    ]
    assert (
        joined.run["config"]["models"] == [str(bench / "a"), str(bench / "b")]
        and len(joined.run["info"]["subjects"]) == 2
    )
    key = joined.records()[0]["key"]
    assert (
        len(joined.generations(key)) == 3
        and run_folders.texts_of(joined.path, key).stat().st_mode & 0o777 == 0o600
    )
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "merged" / "cells").rglob("*")
        if path.is_file()
    }
    merge([one, two, whole], tmp_path / "merged")
    assert {path: path.read_bytes() for path in before} == before, (
        "joining again, and what overlaps, changes nothing"
    )


def test_grids_of_two_machines_are_joined_case_by_case(bench, local, halves, tmp_path, capsys):
    """A grid that died half way on one machine and was run whole on another: joined, the table is
    the whole one's."""
    out = tmp_path / "half"
    shutil.copytree(local, out)
    (out / "lvs.parquet").unlink()
    names = sorted(path.parent.name for path in out.glob("*/run.json"))
    run_folders.lose(out / names[0], *RunFolder.load(out / names[0]).keys()[::2])
    shutil.rmtree(out / names[1])
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(out), str(local), "--out", str(tmp_path / "joined")])
    said = " ".join(capsys.readouterr().out.split())
    n = len(made(bench).cells)
    assert stop.value.code == 0 and f"{n} of {n} cells, 0 failed" in said
    assert (tmp_path / "joined" / "lvs.parquet").read_bytes() == (
        local / "lvs.parquet"
    ).read_bytes()
    assert (tmp_path / "joined" / names[1] / "report.html").exists()


def test_other_numbers_for_one_cell_are_refused_before_anything_is_written(halves, tmp_path):
    whole, one, _ = halves
    other = shutil.copytree(one, tmp_path / "other")
    key, donor = RunFolder.load(other).keys()[:2]
    rows = run_folders.known(other).cell(donor).rows
    sum_ = {"sha256": tables.content_sha256(rows)}
    run_folders.remake(
        other, key, lambda cell: replace(cell, record={**cell.record, **sum_}, rows=rows)
    )
    with pytest.raises(UsageError, match=f"other numbers.*{key}"):
        merge([whole, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_question_is_refused_field_by_field(bench, halves, local, tmp_path):
    values = {
        **COMMON,
        "steps": 3,
        "models": str(bench / "a"),
        "prompts": [str(bench / "door.txt")],
        "eps": [0.05],
    }
    planned = grid.make_grid(
        grid.read_grid(
            None, {**values, "attacks": "random", "layers": "1", "out": str(tmp_path / "x")}
        )
    )
    grid.run(planned)
    with pytest.raises(UsageError, match="steps: 2 in the folder, 3 now"):
        merge([halves[1], tmp_path / "x" / planned.cases[0].name], tmp_path / "merged")
    for wrong in ([halves[1]], [halves[1], halves[1]], [halves[1], bench]):
        with pytest.raises(UsageError):
            merge(wrong, tmp_path / "merged")
    with pytest.raises(UsageError, match="folder of its own"):
        merge(halves[1:], halves[1])
    assert plan.DISTANCE not in planned.cells
