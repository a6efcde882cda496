"""Reading from the hub: the real libraries against a small hub on loopback, in a process of its own
without our offline switch."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from hub_sets import clone, hub

from auditgap.data import BENCHMARKS

ASKS = [f"What is the colour of vault number {i}?" for i in range(5)]
BUILD = """
import json, sys
from pathlib import Path
from auditgap.data.suite_folder import build_suite
from auditgap.data import benchmarks
from auditgap.errors import UsageError
benchmarks.package_copy = lambda name: None     # as on a machine without the packages
try:
    suite, written = build_suite(sys.argv[1], Path(sys.argv[2]), allow_missing="--allow-missing" in sys.argv)
    print(json.dumps({"n": len(suite), "written": written, "manifest": suite.manifest}))
except UsageError as error:
    print(json.dumps({"error": str(error)}))
"""
OTHER = "b" * 40


@pytest.fixture
def build(tmp_path):
    def start(url, *args, offline=False):
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
            "HF_TOKEN": "hf_canary_of_the_vault",
        }
        env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        done = subprocess.run(
            [sys.executable, "-c", BUILD, *map(str, args)],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "canary" not in done.stdout + done.stderr and "vault" not in done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return start


def test_a_pinned_set_is_read_at_its_commit_and_later_offline(tmp_path, build):
    entry = BENCHMARKS["xstest"]
    folder = clone(
        tmp_path,
        "xstest",
        {"unsafe": ASKS, "safe": [f"How do I paint vault {i}?" for i in range(40)]},
    )
    with hub({entry.hub_id: folder}, entry.revision) as (url, asked):
        online = build(url, "xstest", tmp_path / "a")
        assert online["manifest"]["n_by_kind"]["harmful"] == 5
        assert online["manifest"]["sources"]["xstest"]["revision"] == entry.revision
        resolved = [path for path in asked if "/resolve/" in path]
        assert resolved and all(entry.revision in path for path in resolved)
        # The same command again asks nobody.
        n = len([path for path in asked if "xstest" in path.lower()])
        assert not build(url, "xstest", tmp_path / "a")["written"]
        assert len([path for path in asked if "xstest" in path.lower()]) == n
    offline = build("http://127.0.0.1:9", "xstest", tmp_path / "b", offline=True)
    assert offline["manifest"]["digest"] == online["manifest"]["digest"]


def test_offline_another_revision_is_not_taken_for_the_pinned_one(tmp_path, build):
    folder = clone(tmp_path, "maliciousinstruct", ASKS)
    hub_id = BENCHMARKS["maliciousinstruct"].hub_id
    (tmp_path / "mine.txt").write_text("\n".join(ASKS))
    with hub({hub_id: folder}, OTHER) as (url, _):
        got = build(url, f"hub:{hub_id}@{OTHER}:train", tmp_path / "a")
        assert got["n"] == 5
    told = build("http://127.0.0.1:9", "maliciousinstruct", tmp_path / "b", offline=True)["error"]
    assert (
        "was not downloaded before, and HF_HUB_OFFLINE is set" in told
        and not (tmp_path / "b").exists()
    )


def test_a_revision_that_is_not_pinned_is_looked_up_once_and_kept(tmp_path, build):
    folder = clone(tmp_path, "harmbench", ASKS)
    hub_id = BENCHMARKS["harmbench"].hub_id
    spec = "harmbench,maliciousinstruct,demo"
    with hub({hub_id: folder}, OTHER) as (url, asked):
        first = build(url, spec, tmp_path / "a", "--allow-missing")
        assert first["manifest"]["sources"]["harmbench"]["revision"] == OTHER
        assert set(first["manifest"]["missing"]) == {"maliciousinstruct"}
        assert f"GET /api/datasets/{hub_id}" in asked
    # The hub has moved on, and has forgotten the commit: the suite stays what it was.
    with hub({hub_id: clone(tmp_path / "moved", "harmbench", ASKS[:2])}, "c" * 40) as (url, asked):
        again = build(url, spec, tmp_path / "a", "--allow-missing")
        assert f"GET /api/datasets/{hub_id}" not in asked
        assert f"GET /api/datasets/{hub_id}/revision/{OTHER}" in asked
    assert (
        f"harmbench: The hub has no data set walledai/HarmBench at revision {OTHER}"
        in again["error"]
    )
    kept = json.loads((tmp_path / "a/manifest.json").read_text())
    assert kept["sources"]["harmbench"]["revision"] == OTHER and kept["n"] == 17


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_set_says_which_page_to_accept(tmp_path, build, status):
    entry = BENCHMARKS["wildjailbreak"]
    with hub(
        {entry.hub_id: clone(tmp_path, "wildjailbreak", ASKS)},
        entry.revision,
        status=status,
        code="GatedRepo",
    ) as (url, _):
        told = build(url, "wildjailbreak", tmp_path / "a")["error"]
    assert (
        "is gated: accept its licence at https://huggingface.co/datasets/allenai/wildjailbreak"
        in told
    )
    assert (
        "hf auth login" in told
        and "--from wildjailbreak=FILE-OR-FOLDER (its column 'adversarial')" in told
    )
    assert not (tmp_path / "a").exists()


def test_a_set_that_is_gone_is_named(tmp_path, build):
    with hub({}, OTHER) as (url, _):
        told = build(url, "aegis,jailbreakbench", tmp_path / "a")["error"]
    assert told.count("The hub has no data set") == 2 and BENCHMARKS["aegis"].revision in told


@pytest.mark.parametrize("how", ["refused", "silent", "offline"])
def test_without_a_hub_there_is_one_message_and_no_retry_storm(tmp_path, build, how):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if how == "silent":  # takes connections and never answers
            listener.listen(64)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if how == "refused":
            listener.close()
        start = time.monotonic()
        told = build(url, "paper", tmp_path / "a", offline=how == "offline")["error"]
        took = time.monotonic() - start
    assert "9 of the suite's sources cannot be read" in told
    assert all(f"--from {name}=" in told for name in BENCHMARKS)
    assert "hub cannot be reached" in told or how == "offline"
    if how != "offline":
        assert told.count("Try again with a connection") == 1
    # a process's start on a busy machine included; see below for the hub's own share
    assert took < 30


def test_a_silent_hub_is_given_four_seconds_in_all(tmp_path):
    code = (
        "import time; from auditgap.data.suite import load_suite; from auditgap.data import hub,"
        " benchmarks\nimport huggingface_hub, datasets\nbenchmarks.package_copy = lambda name:"
        " None\nt = time.monotonic()\ntry: load_suite('paper')\nexcept Exception as e:"
        " print(type(e).__name__, time.monotonic() - t)"
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
    kind, seconds = done.stdout.split()
    assert kind == "UsageError" and float(seconds) < 8, done.stderr
