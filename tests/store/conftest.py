"""Puts the helpers of other folders on the path, and starts one S3 server for all tests of
storage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
for folder in (TESTS, TESTS / "sweep", TESTS / "audits", TESTS / "faults"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@pytest.fixture(scope="session")
def server():
    pytest.importorskip("moto", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    import s3_server

    with s3_server.serving() as made:
        yield made


@pytest.fixture
def another(monkeypatch, tmp_path):
    """`another("node2")` makes this process another machine, as far as caches go."""
    return lambda machine="another": monkeypatch.setenv(
        "AUDITGAP_CACHE", str(tmp_path / "caches" / machine)
    )


@pytest.fixture
def s3(server, monkeypatch, another):
    """The server, this process pointed at it, and a cache folder of this machine's own."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    another("here")
    server.requests.clear()
    return server
