"""A sweep of an audit's passes where its options say: in this process, or on Ray with what the
machine has for a worker.

    outcome = run_passes([plan.clean, plan.groups], make_worker, store, options, progress)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from auditgap import sweep
from auditgap.audits.options import AuditOptions
from auditgap.sweep import Group, Outcome, Progress, Worker
from auditgap.sweep.state import Cells


def run_passes(
    passes: Sequence[Sequence[Group]],
    make_worker: Callable[[], Worker],
    store: Cells,
    options: AuditOptions,
    progress: Callable[[], Progress] | None = None,
    after_pass: Callable[[], None] | None = None,
) -> Outcome:
    """Run what is missing of the groups, a pass after the one before it; call it with
    `store.lock()` held.

    In this process groups run in order, so one worker serves all passes (unless something is done
    `after_pass`). On Ray a pass is over before the next begins, and all share one cluster.
    """
    on_ray = options.executor == "ray"
    if not on_ray and after_pass is None:
        passes = [[group for groups in passes for group in groups]]
    early = {cell.key for groups in passes[:-1] for group in groups for cell in group.cells}
    several = on_ray and len(store.scan(early)[0]) < len(early)
    outcomes = []
    with sweep.ray.cluster(options.address, cpus=options.workers) if several else nullcontext():
        for groups in passes:
            outcomes.append(_sweep(groups, make_worker, store, options, progress))
            if after_pass is not None:
                after_pass()
    return Outcome(
        done=sum(one.done for one in outcomes),
        failed={key: cause for one in outcomes for key, cause in one.failed.items()},
        skipped=sum(one.skipped for one in outcomes),
    )


def _sweep(
    groups: Sequence[Group],
    make_worker: Callable[[], Worker],
    store: Cells,
    options: AuditOptions,
    progress: Callable[[], Progress] | None,
) -> Outcome:
    shown = None if progress is None else progress()
    if options.executor == "local":
        return sweep.local.run(
            groups, make_worker, store, progress=shown, retry_failed=options.retry_failed
        )
    return sweep.ray.run(
        _with_gpus(groups, options),
        make_worker,
        store,
        workers=options.workers,
        address=options.address,
        progress=shown,
        retry_failed=options.retry_failed,
    )


def _with_gpus(groups: Sequence[Group], options: AuditOptions) -> list[Group]:
    """The groups, each with the GPUs that its worker needs where it does not say so itself."""
    from auditgap.models import pick_device

    device = pick_device(options.device)
    return [
        replace(group, gpus=options.gpus_of(group.cells[0].subject.name, device))
        if group.gpus is None
        else group
        for group in groups
    ]
