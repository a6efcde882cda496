"""The sweep on Ray: actors that keep their model, one group at a time each, results straight to the
run folder.

    outcome = run(groups, make_worker, store, workers=8, gpus_per_worker=1, cpus_per_worker=4, address=None)

Without an `address` it joins the cluster that it was submitted to (`ray job submit`, RAY_ADDRESS),
else it starts one on this machine, and ends it afterwards. The run folder has to be on a disk that
all nodes see. Nothing but a few numbers travels through Ray's object store.

Groups wait in one queue. An actor that is free takes one of the subject that it has loaded, else
one of the subject with the most work waiting, so that at the end of a grid all actors help with
what is left. Actors are made while there is room in the cluster and let go when nothing waits for
them: nodes may join and leave.

An actor that dies takes its group with it: the group goes to a fresh actor, where `store` and
`store.remember` give back what was done. The last of `max_attempts` is made cell by cell, so that a
cell that kills its worker fails alone. The loss of a whole node is nobody's fault and is counted
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count

from auditgap.errors import Interrupted, Refused, UsageError, interruptible
from auditgap.store import DiskError
from auditgap.sweep.cluster import cluster
from auditgap.sweep.pool import ActorPool
from auditgap.sweep.state import Cells, Follower, Group, Outcome, SweepState, Worker
from auditgap.sweep.tasks import Queue, Task

__all__ = ["cluster", "run"]

MAX_LOST_NODES = 20  #: that one group may lose before it is given up


def run(
    groups: Sequence[Group],
    make_worker: Callable[[], Worker],
    store: Cells,
    *,
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    cpus_per_worker: int = 1,
    address: str | None = None,
    max_attempts: int = 3,
    progress: Follower | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Run every group that has something left to do on at most `workers` actors (None: as many as
    fit); hold `store.lock()`.

    `make_worker` is cloudpickled (a lambda travels whole, an importable function by name) and
    called once in each actor. A worker's exception fails its group at once (it would come again); a
    worker's death counts towards `max_attempts`. UsageError and Refused from `make_worker` go
    through. Raises UsageError (no Ray, nothing that big in the cluster), Interrupted, DiskError
    (also of Ray's own store and disk).
    """
    with progress or nullcontext(), interruptible():
        ledger = SweepState(groups, store, progress, retry_failed)
        if ledger.groups:
            with cluster(
                address, cpus=None if workers is None else workers * cpus_per_worker
            ) as ray:
                crew = ActorPool(ray, make_worker, store, cpus_per_worker, workers)
                numbers = count()
                queue = Queue(
                    Task(
                        next(numbers), group, gpus_per_worker if group.gpus is None else group.gpus
                    )
                    for group in ledger.groups
                )
                for gpus in queue.sizes():
                    crew.check(gpus)
                try:
                    # again: ray.init has put its own SIGTERM handler over ours
                    with interruptible():
                        _drive(crew, queue, ledger, max_attempts, numbers)
                finally:
                    crew.dismiss()
        return ledger.outcome()


def _drive(
    crew: ActorPool, queue: Queue, ledger: SweepState, max_attempts: int, numbers: Iterator[int]
) -> None:
    """Hand groups out until none is left. Every pass settles a group, puts it back after a death,
    or just waits."""
    work_done = 0.0
    while queue or crew.busy:
        crew.hand_out(queue)
        ended = crew.finished(timeout=1.0)
        for task, result in ended:
            group = task.group
            work_done += result.work
            if isinstance(result.error, (UsageError, Refused, DiskError, Interrupted)):
                raise result.error
            if not result.died:
                ledger.close(group, result.cause or "the worker came back without this cell")
                continue
            if result.node_lost:
                task.lost_nodes += 1
                cause = f"{task.lost_nodes} node(s) were lost under it: {result.cause}"
                give_up = task.lost_nodes >= MAX_LOST_NODES
            else:
                task.deaths += 1
                cause = f"the worker died {task.deaths} time(s): {result.cause}"
                give_up = task.deaths >= max_attempts
            left = ledger.open_cells(group)
            if give_up:
                ledger.close(group, cause)
                continue
            for cell in left:
                ledger.store.fail(cell, cause, retry=True)
            if left and task.deaths == max_attempts - 1:
                for cell in left:  # one of them may be the one that kills: it shall fail alone
                    alone = replace(group, cells=(cell,), work=group.work / len(group.cells))
                    queue.push(replace(task, number=next(numbers), group=alone))
            elif left:
                queue.push(task)
        settled = [task.group for task, _ in ended]
        ledger.look(
            settled or crew.groups, work_done + crew.work_under_way(), every=0.0 if settled else 1.0
        )
