"""A process that is talked to: one that hangs is ended with a sentence, one that works is waited
for."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from auditgap.engines.child import Child
from auditgap.errors import AuditgapError

CHILD = """
import sys, time
from multiprocessing.connection import Connection
from auditgap.engines.child import receive, send

connection = Connection(int(sys.argv[1]))
print("reading weights", flush=True)
while True:
    message, _ = receive(connection)
    if message["do"] == "hang":
        time.sleep(600)
    for step in range(message.get("steps", 0)):
        time.sleep(0.5)
        send(connection, {"done": step, "total": message["steps"]})
    send(connection, {"said": "ready"})
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "one_that_hangs.py").write_text(CHILD)
    return {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}


def test_a_child_that_hangs_is_ended_with_a_sentence(environment: dict[str, str]) -> None:
    child = Child("one_that_hangs", {"do": "start"}, environment, patience=20)
    child._patience = 2.0  # it has started
    began, seen = time.monotonic(), []
    answer = child.tell({"do": "work", "steps": 6}, progress=lambda done, _: seen.append(done))
    assert answer["said"] == "ready" and time.monotonic() - began > 2.5  # it was heard all along
    assert seen == list(range(6))
    with pytest.raises(AuditgapError, match=r"said nothing for 2 seconds.*reading weights"):
        child.tell({"do": "hang"}, [bytes(1 << 20)])  # more than a pipe holds
    assert child.closed and not psutil.pid_exists(child.pid)


def test_a_child_that_never_starts_is_ended_with_a_sentence(environment: dict[str, str]) -> None:
    with pytest.raises(AuditgapError, match="said nothing for 3 seconds and was ended"):
        Child("one_that_hangs", {"do": "hang"}, environment, patience=3)
