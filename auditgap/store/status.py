"""Where a run stands, from its records alone: `RunFolder.load("out").status().finished`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True)
class RunStatus:
    """Counts are cells; `corrupt` counts what was set aside or is torn now; times are in seconds."""

    planned: int
    finished: int
    failed: int
    running: dict[str, Any] | None  #: the holder of the lock: pid, host, command, since
    corrupt: int
    seconds: float  #: compute of the finished cells, summed over workers
    eta_seconds: float | None  #: None: nothing left, or nothing finished to judge by
    last_write: datetime | None


def status_of(
    cells: Sequence[tuple[str, Mapping[str, Any]]], *, planned: int, running: dict[str, Any] | None, aside: int
) -> RunStatus:
    """Sum up (state, record) pairs. Time left is at this session's pace when a writer runs, else one cell at a time."""
    done = [record for state, record in cells if state == "done"]
    failed = sum(state == "failed" for state, _ in cells)
    seconds = sum(record["seconds"] for record in done)
    written = [datetime.fromisoformat(record["written"]) for record in done]
    left = max(0, planned - len(done) - failed)
    eta = None
    if done and left and running:  # the pace counts how many workers there are; a mean of seconds would not
        since = datetime.fromisoformat(running["since"])
        fresh = sum(when >= since for when in written)
        eta = left * max(0.0, (datetime.now(UTC) - since).total_seconds()) / fresh if fresh else None
    elif done and left:
        eta = left * seconds / len(done)
    return RunStatus(
        planned=planned,
        finished=len(done),
        failed=failed,
        running=running,
        corrupt=sum(state == "torn" for state, _ in cells) + aside,
        seconds=seconds,
        eta_seconds=eta,
        last_write=max(written, default=None),
    )
