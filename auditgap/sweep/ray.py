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

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from auditgap.errors import Interrupted, Refused, UsageError
from auditgap.store import DiskError
from auditgap.sweep.cluster import cluster
from auditgap.sweep.progress import Progress
from auditgap.sweep.state import Cells, Group, Outcome, SweepState, Worker, cause_of, interruptible

__all__ = ["cluster", "run"]

MAX_LOST_NODES = 20  #: that one group may lose before it is given up
_LOOK_AT_NODES = 5.0  #: seconds between two looks at who has joined or left
_FOUND_DEAD = 60.0  #: seconds in which Ray notices that a node is lost
# in Ray's message; a release that words it otherwise has such deaths count as attempts
_NODE_DIED = "its node has died"


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
    progress: Progress | None = None,
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
                crew = _ActorPool(ray, make_worker, store, cpus_per_worker, workers)
                numbers = count()
                queue = _Queue(
                    _Task(
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


@dataclass
class _Task:
    """A group on its way, and what has happened to it. `number` names its meter."""

    number: int
    group: Group
    gpus: float
    deaths: int = 0
    lost_nodes: int = 0


def _drive(
    crew: _ActorPool, queue: _Queue, ledger: SweepState, max_attempts: int, numbers: Iterator[int]
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


class _Queue:
    """The groups that wait, by what they need and whose they are; a group's place among its like is
    kept."""

    def __init__(self, tasks: Iterable[_Task]) -> None:
        self._waiting: dict[tuple[float, str], deque[_Task]] = {}
        self._work: defaultdict[tuple[float, str], float] = defaultdict(float)
        self._n = 0
        for task in tasks:
            self.push(task)

    def __len__(self) -> int:
        return self._n

    def sizes(self) -> list[float]:
        """The GPUs that waiting groups ask for."""
        return sorted({gpus for gpus, _ in self._waiting})

    def push(self, task: _Task) -> None:
        kind = (task.gpus, task.group.subject)
        self._waiting.setdefault(kind, deque()).append(task)
        self._work[kind] += task.group.work or 1.0
        self._n += 1

    def take(self, gpus: float, subject: str | None, held: Counter[str | None]) -> _Task | None:
        """For an actor with so many GPUs: of its own subject, else of the one with most work for
        each actor that has it."""
        kinds = [kind for kind in self._waiting if kind[0] == gpus]
        if not kinds:
            return None
        kind = max(kinds, key=lambda k: (k[1] == subject, self._work[k] / (1 + held[k[1]])))
        task = self._waiting[kind].popleft()
        self._work[kind] -= task.group.work or 1.0
        self._n -= 1
        if not self._waiting[kind]:
            del self._waiting[kind], self._work[kind]
        return task


class _Result:
    """What comes back of a group: nothing big. `error` is one that ends the sweep, `cause` one that
    fails the group."""

    def __init__(
        self,
        work: float = 0.0,
        cause: str = "",
        error: Exception | None = None,
        died: bool = False,
        node_lost: bool = False,
    ) -> None:
        self.work, self.cause, self.error, self.died, self.node_lost = (
            work,
            cause,
            error,
            died,
            node_lost,
        )


class _Actor:
    """Lives in a Ray worker process and keeps the worker, and with it the model, from group to
    group."""

    def __init__(self, make_worker: Callable[[], Worker], store: Cells) -> None:
        self.make_worker = make_worker
        self.store = store
        self.worker: Worker | None = None

    def run(self, group: Group, meter: str) -> _Result:
        try:
            worker = self.worker = self.worker or self.make_worker()
        except (UsageError, Refused, DiskError) as error:
            return _Result(error=error)
        except Exception as error:
            return _Result(cause=cause_of(error))
        work, shown = 0.0, float("-inf")

        def tick(units: float) -> None:
            nonlocal work, shown
            work += units
            # the run folder is the one thing that driver and workers share for certain
            if time.monotonic() - shown >= 1.0:
                shown = time.monotonic()
                with suppress(OSError):
                    Path(meter).write_text(repr(work), encoding="ascii")

        try:
            worker.run(group, tick)
        except (DiskError, Interrupted) as error:
            return _Result(work, error=error)
        except Exception as error:
            return _Result(work, cause=cause_of(error))
        return _Result(work)


@dataclass
class _PoolActor:
    """An actor of the crew: what it was given of the cluster, and the subject that it has
    loaded."""

    actor: Any
    gpus: float
    subject: str | None = None


class _ActorPool:
    """The actors: a free one with nothing to wait for is let go, a dead one is replaced when its
    group comes round again."""

    def __init__(
        self, ray: Any, make_worker: Callable[[], Worker], store: Cells, cpus: int, most: int | None
    ) -> None:
        self.ray, self.store, self.cpus, self.most = ray, store, cpus, most
        self._recipe = (ray.remote(_Actor), make_worker, store)
        self._busy: dict[Any, tuple[_Task, _PoolActor]] = {}  # by the result that is owed
        self._idle: list[_PoolActor] = []
        self._nodes: list[tuple[float, float]] = []
        self._nodes_seen = self._metered = float("-inf")
        # sizes for which there is none, until a node joins or an actor goes
        self._no_room: set[float] = set()
        self._under_way = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._busy)

    @property
    def groups(self) -> list[Group]:
        return [task.group for task, _ in self._busy.values()]

    def hand_out(self, queue: _Queue) -> None:
        """Give what waits to free actors, and to new ones as long as there is room for them."""
        for member in [*self._idle]:
            self._idle.remove(member)
            task = queue.take(member.gpus, member.subject, self._held())
            if task is None:
                self._let_go(member)
            else:
                self._start(member, task)
        for gpus in queue.sizes():
            while self._room(gpus) and (task := queue.take(gpus, None, self._held())) is not None:
                actor_class, make_worker, store = self._recipe
                options = actor_class.options(
                    num_cpus=self.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
                )
                self._start(_PoolActor(options.remote(make_worker, store), gpus), task)

    def _start(self, member: _PoolActor, task: _Task) -> None:
        member.subject = task.group.subject
        self._busy[member.actor.run.remote(task.group, str(self._meter(task)))] = (task, member)

    def _held(self) -> Counter[str | None]:
        return Counter(member.subject for _, member in self._busy.values())

    def finished(self, timeout: float) -> list[tuple[_Task, _Result]]:
        """Groups that ended within `timeout` seconds."""
        if not self._busy:
            time.sleep(timeout)  # every node has left: wait for one
            return []
        ended, _ = self.ray.wait(list(self._busy), num_returns=1, timeout=timeout)
        if ended:  # and all others that ended meanwhile
            ended, _ = self.ray.wait(list(self._busy), num_returns=len(self._busy), timeout=0)
        out = []
        for result in ended:
            task, member = self._busy.pop(result)
            try:
                summary = self.ray.get(result)
                self._idle.append(member)
            except self.ray.exceptions.RayError as error:
                if isinstance(error, self.ray.exceptions.ActorUnavailableError):
                    error = self._found_dead(member, error)
                # Killed before the group is given away, in case it was only out of reach: no two
                # may run one group.
                self._let_go(member)
                full = (
                    self.ray.exceptions.ObjectStoreFullError,
                    self.ray.exceptions.OutOfDiskError,
                )
                if isinstance(error, full) or isinstance(getattr(error, "cause", None), full):
                    raise DiskError(store_full(error)) from error
                summary = _Result(
                    cause=cause_of(error), died=True, node_lost=_NODE_DIED in str(error)
                )
            self._meter(task).unlink(missing_ok=True)
            out.append((task, summary))
        return out

    def _found_dead(self, member: _PoolActor, error: Exception) -> Exception:
        """What an actor that does not answer turns out to have died of; `error` where that is not
        known within a minute.

        The connection breaks at once when a node is lost; that the node is dead is found half a
        minute later.
        """
        until = time.monotonic() + _FOUND_DEAD
        while time.monotonic() < until:
            try:
                self.ray.get(member.actor.__ray_ready__.remote(), timeout=5.0)
                return error  # it is back, but what it owed is lost
            except self.ray.exceptions.ActorDiedError as died:
                return died
            except self.ray.exceptions.RayError:
                time.sleep(1.0)
        return error

    def work_under_way(self) -> float:
        """Units that busy actors have noted; read once a second."""
        if time.monotonic() - self._metered >= 1.0:
            self._metered, self._under_way = time.monotonic(), 0.0
            for task, _ in self._busy.values():
                with suppress(OSError, ValueError):
                    self._under_way += float(self._meter(task).read_text(encoding="ascii"))
        return self._under_way if self._busy else 0.0

    def dismiss(self) -> None:
        for task, member in self._busy.values():
            self._let_go(member)
            self._meter(task).unlink(missing_ok=True)
        for member in self._idle:
            self._let_go(member)

    def _meter(self, task: _Task) -> Path:
        return self.store.path / "scratch" / f"work-{task.number}.txt"

    def _let_go(self, member: _PoolActor) -> None:
        self._no_room.clear()
        with suppress(Exception):
            self.ray.kill(member.actor, no_restart=True)

    # -- room in the cluster
    # -------------------------------------------------------------------------------------------

    def _look_at_nodes(self) -> None:
        if time.monotonic() - self._nodes_seen < _LOOK_AT_NODES:
            return
        self._nodes_seen = time.monotonic()
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        nodes = sorted((float(r.get("CPU", 0.0)), float(r.get("GPU", 0.0))) for r in alive)
        if nodes != self._nodes:
            self._nodes = nodes
            self._no_room.clear()

    def check(self, gpus: float) -> None:
        """Raises UsageError when no node that is there now could ever hold a worker."""
        self._look_at_nodes()
        if not _fits(self._nodes, [(self.cpus, gpus)]):
            asked = {
                "GPU": (gpus, max(n[1] for n in self._nodes)),
                "CPU": (self.cpus, max(n[0] for n in self._nodes)),
            }
            name, (wants, there) = next(
                ((n, v) for n, v in asked.items() if v[0] > v[1]), ("GPU", asked["GPU"])
            )
            raise UsageError(
                f"Each worker asks for {wants:g} {name}(s) and the largest node of the Ray cluster"
                f" has {there:g}. Lower --{name.lower()}s-per-worker, or join a larger cluster with"
                " --address."
            )

    def _room(self, gpus: float) -> bool:
        """Whether one more actor of this size finds its place on the nodes beside all that are
        there."""
        self._look_at_nodes()
        members = [member for _, member in self._busy.values()]
        if gpus in self._no_room or (self.most is not None and len(members) >= self.most):
            return False
        if _fits(
            self._nodes, [*((self.cpus, member.gpus) for member in members), (self.cpus, gpus)]
        ):
            return True
        self._no_room.add(gpus)
        return False


def store_full(error: Exception) -> str:
    """What to say when Ray's object store, or the disk that it spills to, is full."""
    return (
        f"Ray's object store, or the disk it spills to, is full ({cause_of(error)}). Finished cells"
        " are safe in the run folder. Free space under Ray's temporary folder, or start the nodes"
        " with a larger --object-store-memory, then run the same command again."
    )


def _fits(nodes: Sequence[tuple[float, float]], workers: Iterable[tuple[float, float]]) -> bool:
    """Whether workers (CPUs, GPUs) find room on the nodes, the largest placed first, each on the
    first node with room."""
    free = [list(node) for node in nodes]
    for cpus, gpus in sorted(workers, key=lambda w: (w[1], w[0]), reverse=True):
        for node in free:
            if node[0] >= cpus and node[1] >= gpus - 1e-9:
                node[0] -= cpus
                node[1] -= gpus
                break
        else:
            return False
    return True
