"""The cluster that auditgap starts is behind a token of its own, has no dashboard, and needs no
home; a job ships no secrets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]

#: Starts a cluster as a sweep does and attacks it from outside; prints what it found as JSON.
PROBE = """
import http.client, json, os, stat, sys, urllib.error, urllib.request
from contextlib import suppress
from pathlib import Path
import grpc, psutil
from auditgap.sweep.cluster import cluster

found = {}
with cluster(cpus=1) as ray:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    found["mode"], found["token_file"] = os.environ["RAY_AUTH_MODE"], oct(stat.S_IMODE(token.stat().st_mode))
    found["folder"] = oct(stat.S_IMODE(token.parent.stat().st_mode))
    found["in_environment"] = "RAY_AUTH_TOKEN" in os.environ
    ports = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            ports |= {c.laddr.port for c in process.net_connections("inet") if c.status == "LISTEN"}
    found["ports"] = len(ports)

    canary = Path(sys.argv[1])
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    submit = json.dumps({"entrypoint": f"touch {canary}"}).encode()
    answers = []
    for port in sorted(ports):
        for path, body in [("/", None), ("/api/version", None), ("/api/jobs/", submit), ("/api/job_agent/jobs/", submit)]:
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"}
            )
            try:
                with no_proxy.open(asked, timeout=3) as reply:
                    kind = "a page" if b"<html" in reply.read(100_000).lower() else "no page"
                    answers.append([path, reply.status, kind])
            except urllib.error.HTTPError as error:
                answers.append([path, error.code, "refused"])
            except (OSError, http.client.HTTPException):
                pass
    found["answers"] = answers

    def alive(metadata):
        with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
            call = channel.unary_unary("/ray.rpc.JobInfoGcsService/GetAllJobInfo", lambda b: b, lambda b: b)
            try:
                call(b"", metadata=metadata, timeout=10)
                return "answered"
            except grpc.RpcError as error:
                return error.code().name
    found["without"], found["wrong"] = alive([]), alive([("authorization", "Bearer " + "0" * 64)])
    found["with"] = alive([("authorization", "Bearer " + token.read_text())])

    @ray.remote
    def inside():
        return {k: v for k, v in os.environ.items() if "AUTH" in k}

    found["works"] = ray.get(inside.remote())["RAY_AUTH_MODE"] == "token"
found["ran"] = canary.exists()
found["after"] = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}
found["gone"] = not token.parent.exists()
print(json.dumps(found))
"""

SETTINGS = {
    "nothing set, no home": {"HOME": "/dev/null/nowhere"},
    "turned off for other clusters": {"RAY_AUTH_MODE": "disabled"},
    "a token of another cluster": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "canary" * 8},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_nobody_gets_in_without_the_token(case, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "ran")],
        env={**environment, **SETTINGS[case]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (
        found["mode"] == "token" and found["token_file"] == "0o600" and found["folder"] == "0o700"
    )
    assert found["ports"] >= 3 and found["with"] == "answered", "the oracle reaches the cluster"
    assert found["without"] == found["wrong"] == "UNAUTHENTICATED"
    assert not [a for a in found["answers"] if a[1] < 400 and "job" in a[0]] and not found["ran"]
    assert "a page" not in [kind for *_, kind in found["answers"]], (
        "no dashboard; what answers is Ray's gauges, in numbers"
    )
    assert found["works"] and not found["in_environment"] and found["gone"]
    assert found["after"] == {
        k: v for k, v in SETTINGS[case].items() if k.startswith("RAY_AUTH")
    }, "put back as it was"


def test_auditgap_never_asks_for_a_dashboard():
    source = (ROOT / "auditgap" / "sweep" / "cluster.py").read_text(encoding="utf-8")
    assert "include_dashboard=False" in source and "dashboard_host" not in source


def test_a_job_ships_the_code_and_nothing_private(tmp_path):
    """What `ray job submit --working-dir .` packs, by Ray's own packer, from a checkout with
    everything in it."""
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    for name in (".rayignore", ".gitignore"):
        checkout.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    private = (
        ".git/config",
        ".git/objects/ab/cdef",
        ".env",
        ".env.local",
        ".env.production",
        ".venv/bin/python",
        "runs/a/run.json",
        "runs/a/generations/x.parquet",
        "auditgap/__pycache__/x.pyc",
        "sub/.env",
        ".netrc",
        "server.pem",
        "id_rsa.key",
    )
    code = (
        "auditgap/cli/__init__.py",
        "ray_jobs/lvs_grid.py",
        "grid.yaml",
        "auditgap/report/templates/report.html.j2",
    )
    for name in (*private, *code):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("canary")
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as packed:
        names = {n for n in packed.namelist() if not n.endswith("/")}
    assert not names & set(private), names & set(private)
    assert set(code) <= names
