"""The sweep on Ray: actors that keep their model, one group at a time each, results straight to the run folder.

    outcome = run(groups, make_worker, store, workers=8, gpus_per_worker=1, cpus_per_worker=4, address=None)

Without an `address` it joins the cluster that it was submitted to (`ray job submit`, RAY_ADDRESS), else it starts one
on this machine, bounded in memory, without a dashboard and behind a token of its own, and ends it afterwards. The run
folder has to be on a disk that all nodes see. Nothing but a few numbers travels through Ray's object store.

An actor that dies takes its group with it: the group goes to a fresh actor, where `store` and `store.remember` give back
what was done, and after `max_attempts` deaths its open cells are failed and the others go on.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from auditgap.errors import Interrupted, Refused, UsageError
from auditgap.store import DiskError, RunFolder
from auditgap.sweep.ledger import Group, Ledger, Outcome, Worker, cause_of, interruptible
from auditgap.sweep.progress import Progress

OBJECT_STORE_BYTES = 150_000_000  #: of a local cluster; summaries are all that goes through it
_JOINED = ("RAY_ADDRESS", "RAY_JOB_ID")


def run(
    groups: Sequence[Group],
    make_worker: Callable[[], Worker],
    store: RunFolder,
    *,
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    cpus_per_worker: int = 1,
    address: str | None = None,
    max_attempts: int = 3,
    progress: Progress | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Run every group that has something left to do on `workers` actors (None: as many as fit); hold `store.lock()`.

    `make_worker` is cloudpickled (a lambda travels whole, an importable function by name) and called once in each actor.
    A worker's exception fails its group at once (it would come again); a worker's death counts towards `max_attempts`.
    UsageError and Refused from `make_worker` go through.
    Raises UsageError (no Ray, nothing that big in the cluster), Interrupted, DiskError.
    """
    with progress or nullcontext(), interruptible():
        ledger = Ledger(groups, store, progress, retry_failed)
        if ledger.groups:
            with cluster(address, cpus=None if workers is None else workers * cpus_per_worker) as ray:
                options = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
                fit = _fit(ray.cluster_resources(), gpus_per_worker, cpus_per_worker)
                crew = _Crew(ray, options, make_worker, store)
                try:
                    with interruptible():  # again: ray.init has put its own SIGTERM handler over ours
                        _drive(crew, ledger, min(workers or fit, len(ledger.groups)), max_attempts)
                finally:
                    crew.dismiss()
        return ledger.outcome()


def _drive(crew: _Crew, ledger: Ledger, workers: int, max_attempts: int) -> None:
    """Hand groups out until none is left. Every pass settles a group, puts it back after a death, or just waits."""
    waiting = deque(enumerate(ledger.groups))
    deaths: Counter[int] = Counter()
    work_done = 0.0
    while waiting or crew.busy:
        while waiting and len(crew.busy) < workers:
            crew.start(*waiting.popleft())
        for index, group, result in crew.finished(timeout=1.0):
            work_done += result.work
            if isinstance(result.error, (UsageError, Refused, DiskError, Interrupted)):
                raise result.error
            if not result.died:
                ledger.close(group, result.cause or "the worker came back without this cell")
            else:
                deaths[index] += 1
                cause = f"the worker died {deaths[index]} time(s): {result.cause}"
                if deaths[index] < max_attempts and ledger.open_cells(group):
                    for cell in ledger.open_cells(group):
                        ledger.store.fail(cell, cause, retry=True)
                    waiting.append((index, group))
                else:
                    ledger.close(group, cause)
            ledger.look(group, work_done + crew.work_under_way())
        for _, group in crew.busy.values():
            ledger.look(group, work_done + crew.work_under_way(), every=1.0)


class _Result:
    """What comes back of a group: nothing big. `error` is one that ends the sweep, `cause` one that fails the group."""

    def __init__(self, work: float = 0.0, cause: str = "", error: Exception | None = None, died: bool = False) -> None:
        self.work, self.cause, self.error, self.died = work, cause, error, died


class _Actor:
    """Lives in a Ray worker process and keeps the worker, and with it the model, from group to group."""

    def __init__(self, make_worker: Callable[[], Worker], store: RunFolder) -> None:
        self.make_worker = make_worker
        self.store = store
        self.worker: Worker | None = None

    def run(self, group: Group, meter: str) -> _Result:
        try:
            self.worker = self.worker or self.make_worker()
        except (UsageError, Refused, DiskError) as error:
            return _Result(error=error)
        except Exception as error:
            return _Result(cause=cause_of(error))
        work, shown = 0.0, float("-inf")

        def tick(units: float) -> None:
            nonlocal work, shown
            work += units
            if time.monotonic() - shown >= 1.0:  # the run folder is the one thing that driver and workers share for certain
                shown = time.monotonic()
                with suppress(OSError):
                    Path(meter).write_text(repr(work), encoding="ascii")

        try:
            self.worker.run(group, tick)
        except (DiskError, Interrupted) as error:
            return _Result(work, error=error)
        except Exception as error:
            return _Result(work, cause=cause_of(error))
        return _Result(work)


class _Crew:
    """The actors: idle ones wait with their model, each busy one has a group, dead ones are replaced."""

    def __init__(self, ray: Any, options: dict[str, Any], make_worker: Callable[[], Worker], store: RunFolder) -> None:
        self.ray = ray
        self.store = store
        self.busy: dict[Any, tuple[int, Group]] = {}
        self._actors: dict[Any, Any] = {}  # by the result that they owe
        self._idle: list[Any] = []
        self._recipe = (ray.remote(_Actor).options(**options, max_restarts=0, max_task_retries=0), make_worker, store)

    def start(self, index: int, group: Group) -> None:
        actor_class, make_worker, store = self._recipe
        actor = self._idle.pop() if self._idle else actor_class.remote(make_worker, store)
        result = actor.run.remote(group, str(self._meter(index)))
        self.busy[result], self._actors[result] = (index, group), actor

    def finished(self, timeout: float) -> list[tuple[int, Group, _Result]]:
        """Groups that ended within `timeout` seconds."""
        ended, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=timeout)
        out = []
        for result in ended:
            (index, group), actor = self.busy.pop(result), self._actors.pop(result)
            try:
                summary = self.ray.get(result)
                self._idle.append(actor)
            except self.ray.exceptions.RayError as error:
                # Killed before the group is given away, in case it was only out of reach: no two may run one group.
                self._kill(actor)
                summary = _Result(cause=cause_of(error), died=True)
            self._meter(index).unlink(missing_ok=True)
            out.append((index, group, summary))
        return out

    def work_under_way(self) -> float:
        total = 0.0
        for index, _ in self.busy.values():
            with suppress(OSError, ValueError):
                total += float(self._meter(index).read_text(encoding="ascii"))
        return total

    def dismiss(self) -> None:
        for actor in [*self._idle, *self._actors.values()]:
            self._kill(actor)
        for index, _ in self.busy.values():
            self._meter(index).unlink(missing_ok=True)

    def _meter(self, index: int) -> Path:
        return self.store.path.absolute() / "scratch" / f"work-{index}.txt"

    def _kill(self, actor: Any) -> None:
        with suppress(Exception):
            self.ray.kill(actor, no_restart=True)


def _fit(resources: dict[str, float], gpus: float, cpus: int) -> int:
    """How many workers the cluster holds at once."""
    have = {"GPU": (resources.get("GPU", 0.0), gpus), "CPU": (resources.get("CPU", 0.0), cpus)}
    for name, (there, asked) in have.items():
        if asked > there:
            raise UsageError(
                f"Each worker asks for {asked:g} {name}(s) and the whole Ray cluster has {there:g}. "
                f"Lower --{name.lower()}s-per-worker, or join a larger cluster with --address."
            )
    return max(1, int(min(there // asked for there, asked in have.values() if asked > 0) if gpus or cpus else 1))


@contextmanager
def cluster(address: str | None = None, *, cpus: int | None = None) -> Iterator[Any]:
    """The `ray` module, connected: to `address`, to the cluster of this job, or to a local one that ends with the block.

    A connection that is open already is used and left open. `cpus`: what a local cluster offers (None: all cores).
    """
    if (loaded := sys.modules.get("ray")) is not None and loaded.is_initialized():
        yield loaded
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError("This needs Ray, which is not installed. Type: pip install 'ray[default]'  (or leave Ray out).")
    if address is None and any(os.environ.get(name) for name in _JOINED):
        address = "auto"
    with nullcontext() if address else _local_cluster_environment() as folder:
        import ray  # after the environment is set: Ray reads its security settings when it is imported

        _read_settings_again()
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if address:
            with _connection_errors(address):
                ray.init(address=address, **quiet)
        else:
            ray.init(
                num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
                _temp_dir=folder, **quiet,
            )  # fmt: skip
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _connection_errors(address: str) -> Iterator[None]:
    """A sentence instead of a traceback, and within seconds: Ray itself waits minutes for an address where nobody is."""
    target = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    try:
        if host_and_port := re.fullmatch(r"(?:ray://)?([^/:]+|\[.+\]):(\d+)", target):
            socket.create_connection((host_and_port[1].strip("[]"), int(host_and_port[2])), timeout=10).close()
        yield
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"No Ray cluster answers at {target or address} ({cause_of(error)}). Check the address and "
            "RAY_AUTH_TOKEN_PATH, or leave the address out to start a cluster on this machine."
        ) from error


@contextmanager
def _local_cluster_environment() -> Iterator[str]:
    """A short temporary folder of our own (socket paths may not exceed 107 bytes) and a token of our own.

    Left to itself Ray writes a token to ~/.ray, which later clusters of this user would then enforce.
    """
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ag-", dir=base if len(base) <= 30 else "/tmp")
    ours = {}
    if "RAY_AUTH_MODE" not in os.environ:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_settings_again()
        shutil.rmtree(folder, ignore_errors=True)


def _read_settings_again() -> None:
    """Ray caches RAY_AUTH_MODE and the token for good, so an earlier import or cluster in this process would decide."""
    if "ray" in sys.modules:
        with suppress(ImportError, AttributeError):  # not public: where a release moves them, only a second cluster fails
            from ray._raylet import AuthenticationTokenLoader, Config

            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
