"""The sweep in this process, one group after another, on one worker that is made when the first
group needs it.

outcome = run(groups, lambda: LatentWorker(config, store), store, progress=Progress())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

from auditgap.errors import Interrupted, interruptible
from auditgap.store import DiskError
from auditgap.sweep.state import Cells, Follower, Group, Outcome, SweepState, Worker, cause_of


def run(
    groups: Sequence[Group],
    make_worker: Callable[[], Worker],
    store: Cells,
    *,
    progress: Follower | None = None,
    max_attempts: int = 1,
    retry_failed: bool = False,
) -> Outcome:
    """Run every group that has something left to do; call it with `store.lock()` held.

    An exception in a group fails its unfinished cells after `max_attempts` tries and the next group
    goes on. What `make_worker` raises goes through. Cells that failed in an earlier run stay failed
    unless `retry_failed`. Raises Interrupted (Ctrl-C, SIGTERM) and DiskError (every cell would
    fail: better to stop).
    """
    with progress or nullcontext(), interruptible(), ExitStack() as stack:
        ledger = SweepState(groups, store, progress, retry_failed)
        worker: Worker | None = None
        work = 0.0
        stack.callback(lambda: getattr(worker, "close", lambda: None)())

        for group in ledger.groups:
            worker = worker or make_worker()

            def tick(units: float, group: Group = group) -> None:
                nonlocal work
                work += units
                ledger.look([group], work, every=1.0)

            cause = "the worker came back without this cell"
            for attempt in range(1, max_attempts + 1):
                try:
                    worker.run(group, tick)
                    break
                except (DiskError, Interrupted):
                    raise
                except Exception as error:
                    cause = cause_of(error)
                    if attempt < max_attempts:
                        for cell in ledger.open_cells(group):
                            store.fail(cell, cause, retry=True)
            ledger.close(group, cause)
            ledger.look([group], work)
        return ledger.outcome()
