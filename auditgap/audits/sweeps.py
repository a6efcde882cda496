"""A sweep of an audit's groups where its options say: in this process, or on Ray with what the
machine has for a worker.

    outcome = run_sweep(groups, partial(InterveneWorker, config, options, folder), store, options, progress)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from auditgap import models, sweep
from auditgap.store import RunFolder
from auditgap.sweep import Group, Outcome, Progress, Worker


class Sitting(Protocol):
    """What of an audit's options says where its sweep runs."""

    @property
    def executor(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def workers(self) -> int | None: ...
    @property
    def gpus_per_worker(self) -> float | None: ...
    @property
    def address(self) -> str | None: ...
    @property
    def retry_failed(self) -> bool: ...


def run_sweep(
    groups: Sequence[Group],
    make_worker: Callable[[], Worker],
    store: RunFolder,
    options: Sitting,
    progress: Callable[[], Progress] | None = None,
) -> Outcome:
    """Run what is missing of the groups; call it with `store.lock()` held. On Ray a worker has a
    GPU where there are any."""
    shown = None if progress is None else progress()
    if options.executor == "local":
        return sweep.local.run(
            groups, make_worker, store, progress=shown, retry_failed=options.retry_failed
        )
    gpus = 1.0 if models.pick_device(options.device).startswith("cuda") else 0.0
    return sweep.ray.run(
        groups,
        make_worker,
        store,
        workers=options.workers,
        address=options.address,
        progress=shown,
        gpus_per_worker=options.gpus_per_worker if options.gpus_per_worker is not None else gpus,
        retry_failed=options.retry_failed,
    )
