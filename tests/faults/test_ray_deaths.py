"""The whole cluster dies: head, agents and workers at once, by real kills. The same command does
the rest.

Workers killed once, always or after writing, stopped and killed drivers and Ctrl-C stand in
tests/sweep/test_ray.py; a node of several that leaves in tests/sweep/test_crew.py.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import children
import pytest
import toys

from auditgap.sweep import local

pytest.importorskip("ray", reason="the Ray extra is not installed")


@pytest.fixture
def home():
    made = children.Home()
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def test_head_and_workers_killed_at_half_way_the_same_command_does_the_rest(home, tmp_path):
    """Every process of the cluster dies at once; the driver does not hang, and what was finished is
    finished."""
    port, log, out = free_port(), tmp_path / "log", tmp_path / "out"
    start = [
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        f"--temp-dir={home.folder}/r",
        "--num-cpus=1",
        "--object-store-memory=80000000",
    ]
    quick = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", **home.token}
    head = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            *start,
            f"--ray-client-server-port={free_port()}",
        ],
        env=children.environment(**quick),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    driver = None
    try:
        children.until(lambda: any("raylet" in name for name in home.processes().values()), head)
        given = children.environment(
            TMPDIR=str(home.folder), RAY_ADDRESS=f"127.0.0.1:{port}", **quick
        )
        driver = children.python(
            children.RAY_SWEEP, str(out), str(log), repr({(2, 0.02): "hang"}), "1", env=given
        )
        children.until(lambda: "block2/0.02" in toys.counts(log), driver)
        killed = time.monotonic()
        for pid in [head.pid, *(p for p in home.processes() if p != driver.pid)]:
            children.kill(pid)
        said, _ = driver.communicate(timeout=90)
        assert driver.returncode != 0, said
        assert time.monotonic() - killed < 60
        assert not home.left()
    finally:
        for process in (head, driver):
            if process is not None:
                process.kill()
                process.wait()

    store = toys.open_folder(out)
    assert store.failures() == {}, "a kill is nobody's failure"
    with store.lock():
        outcome = local.run(toys.groups(), lambda: toys.Toy(store, log), store)
    assert (outcome.done, outcome.skipped, outcome.failed) == (5, 7, {})
    whole = toys.open_folder(tmp_path / "whole")
    local.run(toys.groups(), lambda: toys.Toy(whole, tmp_path / "other"), whole)
    assert toys.digests(store) == toys.digests(whole), "the rows are an unbroken run's"
    counted = toys.counts(log)
    counted.pop("made")
    assert counted.pop("block2/0.02") == 2 and set(counted.values()) == {1}
