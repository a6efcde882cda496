"""The actors of a sweep on Ray: who has which model, what each is at work on, and how many more the
cluster has room for.

    pool = ActorPool(ray, make_worker, store, cpus=4, most=8)
    pool.hand_out(queue)                       # to free actors, and to new ones where there is room
    for task, result in pool.finished(timeout=1.0): ...

`ray` is what `auditgap.sweep.cluster` gives. Nothing but a few numbers travels through its object
store: a group goes there, a `Result` comes back.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auditgap.errors import Interrupted, Refused, UsageError
from auditgap.store import DiskError
from auditgap.sweep.state import Cells, Group, Worker, cause_of
from auditgap.sweep.tasks import Queue, Task

_LOOK_AT_NODES = 5.0  #: seconds between two looks at who has joined or left
_FOUND_DEAD = 60.0  #: seconds in which Ray notices that a node is lost
# in Ray's message; a release that words it otherwise has such deaths count as attempts
_NODE_DIED = "its node has died"


@dataclass(frozen=True, slots=True)
class Result:
    """What comes back of a group: nothing big."""

    work: float = 0.0  #: units that its worker did
    cause: str = ""  #: of a group that failed
    error: Exception | None = None  #: that ends the sweep
    died: bool = False  #: its actor, and of what is `cause`
    node_lost: bool = False  #: with its whole node


class _Actor:
    """Lives in a Ray worker process and keeps the worker, and with it the model, from group to
    group."""

    def __init__(self, make_worker: Callable[[], Worker], store: Cells) -> None:
        self.make_worker = make_worker
        self.store = store
        self.worker: Worker | None = None

    def run(self, group: Group, meter: str) -> Result:
        try:
            worker = self.worker = self.worker or self.make_worker()
        except (UsageError, Refused, DiskError) as error:
            return Result(error=error)
        except Exception as error:
            return Result(cause=cause_of(error))
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
            return Result(work, error=error)
        except Exception as error:
            return Result(work, cause=cause_of(error))
        return Result(work)


@dataclass
class _PoolActor:
    """An actor of the crew: what it was given of the cluster, and the subject that it has
    loaded."""

    actor: Any
    gpus: float
    subject: str | None = None


class ActorPool:
    """The actors: a free one with nothing to wait for is let go, a dead one is replaced when its
    group comes round again."""

    def __init__(
        self, ray: Any, make_worker: Callable[[], Worker], store: Cells, cpus: int, most: int | None
    ) -> None:
        self.ray, self.store, self.cpus, self.most = ray, store, cpus, most
        self._recipe = (ray.remote(_Actor), make_worker, store)
        self._busy: dict[Any, tuple[Task, _PoolActor]] = {}  # by the result that is owed
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

    def hand_out(self, queue: Queue) -> None:
        """Give what waits to free actors, and to new ones as long as there is room for them. Raises
        DiskError: what they are given does not fit Ray's object store."""
        try:
            self._hand_out(queue)
        except self._full as error:
            raise DiskError(store_full(error)) from error

    @property
    def _full(self) -> tuple[type[Exception], ...]:
        """What Ray raises where its object store, or the disk that it spills to, is full."""
        return self.ray.exceptions.ObjectStoreFullError, self.ray.exceptions.OutOfDiskError

    def _hand_out(self, queue: Queue) -> None:
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

    def _start(self, member: _PoolActor, task: Task) -> None:
        member.subject = task.group.subject
        self._busy[member.actor.run.remote(task.group, str(self._meter(task)))] = (task, member)

    def _held(self) -> Counter[str | None]:
        return Counter(member.subject for _, member in self._busy.values())

    def finished(self, timeout: float) -> list[tuple[Task, Result]]:
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
                if any(isinstance(e, self._full) for e in (error, getattr(error, "cause", None))):
                    raise DiskError(store_full(error)) from error
                summary = Result(
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

    def _meter(self, task: Task) -> Path:
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
                f" --address.{_over_nodes(wants, there) if name == 'GPU' else ''}"
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


def _over_nodes(wants: float, there: float) -> str:
    """What is to be said where several nodes together might have what one has not."""
    if wants <= 1 or there < 1:
        return ""
    return (
        " A worker's GPUs are those of one node, so a model lies over at most"
        f" {math.floor(there)} of them here: --shard layers:{math.floor(there)}, or"
        f" --tensor-parallel-size {math.floor(there)} in vLLM."
    )


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
