"""Where a run or a grid stands, from its records alone.

RunFolder.load("out").status().finished
each, total = grid_status({name: RunFolder.load(place) for name, place in
cases_of("runs/grid").items()})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from auditgap.store.remote import Place, mirror_of, within
from auditgap.types import Document

if TYPE_CHECKING:
    from auditgap.store.folder import RunFolder


@dataclass(frozen=True, slots=True)
class CellState:
    """How one cell stands: `done`, `failed`, `retrying` or `torn` (it has lost a file); its seconds
    and when it was written."""

    state: str
    seconds: float = 0.0
    written: str = ""


@dataclass(frozen=True)
class RunStatus:
    """Counts are cells; `corrupt` counts files that are damaged or were set aside; times are in
    seconds."""

    planned: int
    finished: int
    failed: int
    running: Document | None  #: the holder of the lock: pid, host, command, since
    corrupt: int
    seconds: float  #: compute of the finished cells, summed over workers
    eta_seconds: float | None  #: None: nothing left, or nothing finished to judge by
    last_write: datetime | None

    @property
    def missing(self) -> int:
        """Planned cells that are neither finished nor failed."""
        return max(0, self.planned - self.finished - self.failed)


def status_of(
    cells: Iterable[CellState], *, planned: int, running: Document | None, corrupt: int
) -> RunStatus:
    """Sum up. Time left is at this session's pace when a writer runs, else one cell at a time."""
    cells = list(cells)
    done = [cell for cell in cells if cell.state == "done"]
    failed = sum(cell.state == "failed" for cell in cells)
    seconds = sum(cell.seconds for cell in done)
    written = [datetime.fromisoformat(cell.written) for cell in done]
    left = max(0, planned - len(done) - failed)
    eta = None
    # the pace counts how many workers there are; a mean of seconds would not
    if done and left and running:
        since = datetime.fromisoformat(running["since"])
        fresh = sum(when >= since for when in written)
        eta = (
            left * max(0.0, (datetime.now(UTC) - since).total_seconds()) / fresh if fresh else None
        )
    elif done and left:
        eta = left * seconds / len(done)
    return RunStatus(
        planned=planned,
        finished=len(done),
        failed=failed,
        running=running,
        corrupt=corrupt,
        seconds=seconds,
        eta_seconds=eta,
        last_write=max(written, default=None),
    )


def cases_of(place: Place) -> dict[str, Place]:
    """The run folders that a grid's folder holds, by name; none when it is a run folder itself, or
    something else."""
    mirror = mirror_of(place)
    if mirror is not None:
        names = mirror.folders_with("run.json") if mirror.read("run.json") is None else []
        return {name: within(place, name) for name in names}
    folder = Path(place)
    if not folder.is_dir() or (folder / "run.json").exists():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "run.json").is_file()}


def grid_status(cases: Mapping[str, RunFolder]) -> tuple[dict[str, RunStatus], RunStatus]:
    """Each case's status and the grid's, in which a cell that several cases share counts once."""
    each: dict[str, RunStatus] = {}
    cells: dict[str, CellState] = {}
    planned: set[str] = set()
    for name, store in cases.items():
        cell_states, asked = store.cell_states(), [entry["key"] for entry in store.planned()]
        each[name] = status_of(
            cell_states.values(), planned=len(asked), running=store.holder(), corrupt=store.aside()
        )
        planned.update(asked)
        cells |= {
            key: cell
            for key, cell in cell_states.items()
            if key not in cells or cells[key].state != "done"
        }
    running = min(
        (s.running for s in each.values() if s.running),
        key=lambda note: str(note.get("since")),
        default=None,
    )
    corrupt = sum(status.corrupt for status in each.values())
    return each, status_of(cells.values(), planned=len(planned), running=running, corrupt=corrupt)
