"""A sweep of an audit's passes where its options say: in this process, or on Ray with what the
machine has for a worker; and the phases of an audit, a sweep each.

    outcome = run_passes([plan.clean, plan.groups], make_worker, store, options, progress)
    store, outcome = run_phases([TRAIN, GENERATE], RunFolder.load("runs/em"), options, progress)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from auditgap import sweep
from auditgap.audits.options import AuditOptions
from auditgap.store import RunFolder
from auditgap.sweep import Group, Outcome, Progress, Worker
from auditgap.types import Cell

if TYPE_CHECKING:
    from auditgap.audits.audit import Audit, Plan
    from auditgap.audits.following import SeveralFolders

OptionsT = TypeVar("OptionsT", bound=AuditOptions)
PlanT = TypeVar("PlanT", bound="Plan")


def run_passes(
    passes: Sequence[Sequence[Group]],
    make_worker: Callable[[], Worker],
    store: RunFolder | SeveralFolders,
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
    return Outcome.total(outcomes)


def _sweep(
    groups: Sequence[Group],
    make_worker: Callable[[], Worker],
    store: RunFolder | SeveralFolders,
    options: AuditOptions,
    progress: Callable[[], Progress] | None,
) -> Outcome:
    from auditgap.audits.following import followed

    follower = followed(None if progress is None else progress(), store, options)
    if options.executor == "local":
        return sweep.local.run(
            groups, make_worker, store, progress=follower, retry_failed=options.retry_failed
        )
    return sweep.ray.run(
        _with_gpus(groups, options),
        make_worker,
        store,
        workers=options.workers,
        address=options.address,
        progress=follower,
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


class Phase(ABC, Generic[OptionsT]):
    """Cells of an audit that are planned together: all that it has or, where what was found decides
    what is asked next, those that can be planned once the phases before are done."""

    name: str

    def prepare(self, store: RunFolder, options: OptionsT) -> None:
        """What comes before the folder is locked. Raises UsageError where the phase cannot
        begin."""

    @abstractmethod
    def passes(self, store: RunFolder, options: OptionsT) -> Sequence[Sequence[Group]]:
        """Its groups, as in `Plan.passes`. Raises UsageError where what they need is missing."""

    @abstractmethod
    def worker(self, store: RunFolder, options: OptionsT) -> Callable[[], Worker]:
        """What makes its worker, as `Audit.worker`."""

    def finish(self, store: RunFolder, cells: Sequence[Cell]) -> None:
        """What is left to do when its sweep is over."""

    def run(
        self, store: RunFolder, options: OptionsT, progress: Callable[[], Progress] | None
    ) -> Outcome:
        """Compute what is missing of it; call it with `store.lock()` held."""
        passes = self.passes(store, options)
        cells = [cell for groups in passes for group in groups for cell in group.cells]
        store.plan(cells)
        outcome = run_passes(passes, self.worker(store, options), store, options, progress)
        self.finish(store, cells)
        return outcome


class WholePlan(Phase[OptionsT]):
    """The only phase of an audit whose plan has all of its cells."""

    def __init__(self, audit: Audit[Any, OptionsT, PlanT], plan: PlanT) -> None:
        self.name, self.audit, self.plan = audit.command, audit, plan

    def passes(self, store: RunFolder, options: OptionsT) -> Sequence[Sequence[Group]]:
        return self.plan.passes

    def worker(self, store: RunFolder, options: OptionsT) -> Callable[[], Worker]:
        return self.audit.worker(self.plan, options, store)


def run_phases(
    phases: Sequence[Phase[OptionsT]],
    store: RunFolder,
    options: OptionsT,
    progress: Callable[[], Progress] | None = None,
    *,
    begin: Callable[[], None] | None = None,
    end: Callable[[Outcome], None] | None = None,
    after: Callable[[str, RunFolder], None] | None = None,
) -> Outcome:
    """Run what is missing of the phases, one after the other, the folder locked during each.
    `begin` and `end` are called while it is locked for the first and the last; `after` each, with
    its name and the folder."""
    outcomes: list[Outcome] = []
    for phase in phases:
        phase.prepare(store, options)
        with store.lock():
            if begin is not None and phase is phases[0]:
                begin()
            outcomes.append(phase.run(store, options, progress))
            if end is not None and phase is phases[-1]:
                end(Outcome.total(outcomes))
        if after is not None:
            after(phase.name, store)
    return Outcome.total(outcomes)
