"""Dockerfile, devcontainer, Slurm script and KubeRay job name nothing that does not exist."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from cli_tree import faults

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_image_installs_extras_that_exist():
    [extras] = re.findall(r"^ARG EXTRAS=(.+)$", text("Dockerfile"), re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    [python] = re.findall(r"^FROM python:(\d+)\.(\d+)", text("Dockerfile"), re.MULTILINE)
    [floor] = re.findall(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert tuple(map(int, python)) >= tuple(map(int, floor))
    left_out = text(".dockerignore").split()
    assert ".git" in left_out and "constraints.txt" not in left_out


def test_the_devcontainer_makes_what_the_makefile_has():
    told = json.loads(text(".devcontainer/devcontainer.json"))
    made, target = told["postCreateCommand"].split()
    assert made == "make" and re.search(rf"^{target}:", text("Makefile"), re.MULTILINE)


@pytest.mark.parametrize(
    "name", ["Dockerfile", "launchers/slurm.sbatch", "examples/cluster/kuberay.yaml"]
)
def test_every_command_of_ours_exists(name):
    joined = text(name).replace("\\\n", " ")
    lines = re.findall(r"(?:^|exec |&& |: |\) )(auditgap (?!with)[a-z].*)", joined, re.MULTILINE)
    lines = [re.split(r" \\| &&|;", line)[0] for line in lines]
    assert lines and not [fault for line in lines for fault in faults(line)]


def test_the_job_is_read_as_yaml_and_uses_one_image():
    job = yaml.safe_load(text("examples/cluster/kuberay.yaml"))["spec"]
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert len(images) == 1 and job["entrypoint"].startswith("auditgap grid ")


def test_a_slurm_task_asks_for_its_own_model(tmp_path):
    """The script with a shell and an `auditgap` that says what it was told."""
    (tmp_path / "auditgap").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "auditgap").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1", "OUT": "runs/s"}
    script = ["bash", str(ROOT / "launchers/slurm.sbatch")]
    said = subprocess.run(
        [*script, "grid.yaml", "./base", "./tuned"], env=env, capture_output=True, text=True
    ).stdout.split()
    assert "models=[./tuned]" in said and said[-1] == "runs/s/task1"
    for task in ("task0", "task1"):
        (tmp_path / "runs/s" / task).mkdir(parents=True)
    joined = subprocess.run(
        [*script, "merge"], env=env, cwd=tmp_path, capture_output=True, text=True
    ).stdout.split()
    assert joined == ["merge", "runs/s/task0", "runs/s/task1", "--out", "runs/s/all"]


def test_a_slurm_job_starts_the_training_on_each_of_its_nodes(tmp_path):
    """The script with a shell, an `srun` that is one node's, and a `torchrun` that says what it was
    told."""
    for name, does in {
        "scontrol": "printf 'node-a\\nnode-b\\n'",
        "srun": 'shift; SLURM_NODEID=1 SLURM_GPUS_ON_NODE=4 "$@"',
        "torchrun": "printf '%s\\n' \"$@\"",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node-[a-b]"}
    words = ["dissociate", "--config", "twin.yaml", "--out", "runs/the twin"]
    said = subprocess.run(
        ["bash", str(ROOT / "launchers/train.sbatch"), *words],
        env={**env, "SLURM_NNODES": "2"},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    told = dict(zip(said[:10:2], said[1:10:2], strict=True))
    assert told == {
        "--nnodes": "2",
        "--node_rank": "1",
        "--nproc_per_node": "4",
        "--master_addr": "node-a",
        "--master_port": "29500",
    }
    assert said[10:] == ["launchers/dissociate.py", *words[1:]]
    assert (ROOT / said[10]).exists()
