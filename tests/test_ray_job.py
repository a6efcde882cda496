"""A grid submitted to a real cluster is followed and brought home, and gives the cells of a local
run."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import yaml

from auditgap.audits.audit import run as run_audit
from auditgap.audits.latent.audit import LATENT
from auditgap.store import RunFolder
from auditgap.types import ATTACKS

pytest.importorskip("ray", reason="the Ray extra is not installed")
ROOT = Path(__file__).parents[1]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _started(ray: list[str], folder: Path, env: dict[str, str]) -> tuple[subprocess.Popen, int]:
    """A head node whose dashboard answers, and the dashboard's port. A port that was free when it
    was drawn may be taken when it is used, so that a head that ends is started again."""
    for _ in range(3):
        port, dashboard, client, agent = (_free_port() for _ in range(4))
        head = subprocess.Popen(
            [
                *ray,
                "start",
                "--head",
                "--block",
                f"--port={port}",
                "--node-ip-address=127.0.0.1",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
                f"--temp-dir={folder}/ray",
                # else a fixed one, which another cluster of this machine may have
                f"--dashboard-agent-listen-port={agent}",
                "--num-cpus=2",
                "--object-store-memory=100000000",
            ],
            env=env,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + 180
        while time.monotonic() < until and head.poll() is None:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", dashboard)) == 0:
                    return head, dashboard
            time.sleep(0.5)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
    raise AssertionError("no head node's dashboard answered")


@pytest.fixture
def cluster():
    """A head node of its own: ports, folder, token. Yields the environment and the dashboard's
    address."""
    # short: Ray's sockets live below it
    with tempfile.TemporaryDirectory(prefix="ag-", dir="/tmp") as folder:
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        env = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        env.pop("RAY_ADDRESS", None)
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        head, dashboard = _started(ray, Path(folder), env)
        try:
            yield env, f"http://127.0.0.1:{dashboard}", ray
        finally:
            head.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                head.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A grid file of one tiny model on six prompts."""
    model = tiny.save("llama", tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "\n".join(
            f"what is the colour of the vault {w}"
            for w in ("red", "blue", "green", "sun", "moon", "star")
        )
    )
    values = {
        "models": [str(model)],
        "prompts": str(prompts),
        "layers": "embedding,1,last",
        "eps": [0.05, 0.2],
        "max_new_tokens": 4,
        "steps": 3,
        "judge": "keyword",
        "reward": "margin",
        "target": "Sure , here is",
        "distance": True,
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "grid.yaml"


def test_a_submitted_grid_gives_the_cells_of_a_local_run(
    cluster, grid: Path, tmp_path: Path
) -> None:
    """`ray_jobs/submit.py` ships this checkout, follows the job, and brings the table home."""
    env, address, _ = cluster
    command = [
        sys.executable,
        "ray_jobs/submit.py",
        "--config",
        str(grid),
        "--out",
        str(tmp_path / "ray"),
        "--workers",
        "2",
        "--address",
        address,
        "--fetch",
        str(tmp_path / "here"),
    ]
    job = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert "39 of 39 cells done" in job.stdout and job.stdout.count("40 cells") == 1, (
        "the job's log is followed, each line once"
    )

    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, outcome = run_audit(LATENT, *LATENT.read(grid, {"out": str(tmp_path / "local")}))
    finally:
        torch.set_num_threads(threads)
    assert not outcome.failed and outcome.done == 3 * (2 * len(ATTACKS) + 1) + 1 == 40

    def sums(folder: Path) -> dict[str, str]:
        return {r["key"]: r["sha256"] for r in RunFolder.load(folder).records()}

    (case,) = [path.parent for path in (tmp_path / "ray").glob("*/run.json")]
    assert sums(case) == sums(tmp_path / "local")
    assert (case / "lvs.parquet").read_bytes() == (tmp_path / "local" / "lvs.parquet").read_bytes()
    assert (case / "report.html").exists()
    for name in ("lvs.parquet", "lvs.csv"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()

    grid.write_text(grid.read_text().replace("prompts.txt", "nothing.txt"))
    job = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    said = job.stdout.replace("\n", "")  # a terminal breaks a long path in its name
    assert job.returncode == 2 and "nothing.txt" in said, (
        "the job's exit code is the command's" + job.stderr[-2000:]
    )


def test_what_is_wrong_with_a_grid_is_said_before_it_is_submitted(grid: Path, capsys) -> None:
    from auditgap.cli import main

    for words, said in (
        (["--set", "stepss=3"], "steps"),
        (["--address", f"http://127.0.0.1:{_free_port()}"], "No Ray dashboard answers"),
        (["--working-dir", "/nowhere"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["submit", "--config", str(grid), "--out", "/tmp/none", *words])
        assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_what_never_travels_with_a_job(tmp_path: Path) -> None:
    """What Ray would pack of a folder with secrets and history in it, by its own packing."""
    from ray._private.runtime_env.packaging import create_package

    from auditgap.sweep import jobs

    for name in (
        ".env",
        ".env.local",
        ".git/config",
        "id.pem",
        ".venv/x.py",
        "model.safetensors",
        "runs/out.csv",
        "sub/.env",
    ):
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).write_text("CANARY")
    (tmp_path / "w" / "job.py").write_text("pass")
    ours = tmp_path / "w" / "auditgap" / "judges" / "builtin.safetensors"
    ours.parent.mkdir(parents=True)
    ours.write_text("numbers")
    create_package(
        str(tmp_path / "w"),
        tmp_path / "w.zip",
        include_gitignore=True,
        excludes=list(jobs.EXCLUDED),
    )
    with zipfile.ZipFile(tmp_path / "w.zip") as archive:
        sent = {name for name in archive.namelist() if not name.endswith("/")}
        assert sent == {"job.py", "auditgap/judges/builtin.safetensors"}
