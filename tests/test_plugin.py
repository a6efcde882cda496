"""The example plug-in, installed as anybody's package is: found, listed, used in audits, and named
when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of site-packages with the plug-in in it; `pip` builds from a copy, so the checkout
    stays as it is."""
    home = tmp_path_factory.mktemp("plugin")
    copy = home / "source"
    copy.mkdir()
    for path in EXAMPLE.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--target",
            str(home / "site"),
            str(copy),
        ],
        check=True,
        timeout=200,
        capture_output=True,
    )
    tiny.save("llama", home / "model")
    return home


def auditgap(home, *words):
    paths = os.pathsep.join(filter(None, [str(home / "site"), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "auditgap", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=home,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("judges", "vault-colour"),
        ("rewards", "vault-silence"),
        ("prompts", "vault-questions"),
        ("interventions", "push"),
    ],
)
def test_it_is_listed_as_available(installed, kind, name):
    done = auditgap(installed, "ls", kind, "--json")
    assert done.returncode == 0, done.stderr
    mine = next(row for row in json.loads(done.stdout) if row["name"] == name)
    assert str(mine.get("available", "yes")) in ("yes", "True"), mine


def test_an_audit_uses_judge_reward_and_prompts(installed):
    out = installed / "run"
    done = auditgap(
        installed,
        "lvs",
        str(installed / "model"),
        "--prompts",
        "vault-questions",
        "--judge",
        "vault-colour",
        "--reward",
        "vault-silence",
        "--layers",
        "1",
        "--eps",
        "0.1",
        "--steps",
        "2",
        "--attacks",
        "targeted,random_matched",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "run.json").read_text("utf-8"))["config"]
    assert config["scorers"]["judge"] == {
        "scorer": "vault-colour",
        "version": 1,
        "colours": ["red", "blue", "green"],
    }
    assert pd.read_parquet(out / "lvs.parquet")["n"].tolist() == [8, 8]


def test_the_intervention_audit_uses_its_intervention(installed):
    out = installed / "pushed"
    done = auditgap(
        installed,
        "intervene",
        str(installed / "model"),
        "--interventions",
        "push",
        "--prompts",
        "vault-questions",
        "--judge",
        "vault-colour",
        "--layers",
        "1",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    assert set(pd.read_parquet(out / "interventions.parquet")["intervention"]) == {"push"}


def test_a_plug_in_that_fails_is_named_and_the_others_stay(installed, tmp_path):
    module = installed / "site" / "auditgap_vault.py"
    whole = module.read_text("utf-8")
    try:
        module.write_text("raise RuntimeError('no vault today')\n", "utf-8")
        done = auditgap(installed, "ls", "prompts", "--json")
        rows = {row["name"]: row for row in json.loads(done.stdout)}
        assert "no vault today" in json.dumps(rows["vault-questions"]) and "harmbench" in rows
        done = auditgap(
            installed,
            "lvs",
            str(installed / "model"),
            "--prompts",
            "vault-questions",
            "--out",
            str(tmp_path / "x"),
        )
        assert (
            done.returncode == 2
            and "no vault today" in done.stderr
            and "Traceback" not in done.stderr
        )
    finally:
        module.write_text(whole, "utf-8")
