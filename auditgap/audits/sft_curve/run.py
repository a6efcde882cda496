"""A harmful-SFT curve on one process or on several ranks: train and ask cell by cell, reduce.

folder, outcome = run_curve(SFT_CURVE, config, options)
# steps to 50 % and 80 %, area, audit gap, base − subject
folder.path / "summary.csv"
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from auditgap.audits.audit import run
from auditgap.audits.sft_curve.audit import SFTCurve
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions
from auditgap.audits.sft_curve.plan import CurvePlan
from auditgap.audits.sft_curve.worker import CurveWorker
from auditgap.errors import Interrupted
from auditgap.store import DiskError, RunFolder
from auditgap.sweep import Group, Outcome, Progress
from auditgap.sweep.state import SweepState, cause_of
from auditgap.training import ranks


def run_curve(
    audit: SFTCurve,
    config: SFTCurveConfig,
    options: SFTCurveOptions,
    *,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder | None, Outcome]:
    """Train and ask whatever (subject, seed) is missing, and reduce. The same call again resumes.

    Every process of a `deepspeed`, `accelerate` or `torchrun` job calls this; the folder is rank
    0's, and the others get None for it. Raises UsageError, Refused, Interrupted. With one process,
    cells that fail are in the outcome with their causes; with several a failure ends the job.
    """
    audit.check(options)
    with ranks.joined(timeout_minutes=options.timeout_minutes):
        plan = ranks.agree(lambda: audit.prepare(config, options))
        if ranks.world() == 1:
            return run(audit, config, options, plan=plan, progress=progress)
        return _together(audit, plan, options, progress)


def _together(
    audit: SFTCurve,
    plan: CurvePlan,
    options: SFTCurveOptions,
    progress: Callable[[], Progress] | None,
) -> tuple[RunFolder | None, Outcome]:
    """All ranks through the same cells in the same order; rank 0 holds the folder and decides which
    are left."""
    out = Path(options.out or audit.folder(plan.config)).absolute()
    store: RunFolder | None = None
    books: SweepState | None = None
    worker: CurveWorker | None = None
    with ExitStack() as stack:

        def begin() -> None:
            nonlocal store, books, worker
            store = audit.open(plan, options, out)
            stack.enter_context(store.lock())
            store.plan(plan.cells)
            audit.begin(plan, store)
            shown = None if progress is None else stack.enter_context(progress())
            books = SweepState(plan.groups, store, shown, options.retry_failed)
            worker = stack.enter_context(closing(audit.curve_worker(plan, options, store, out)))

        ranks.only_main(begin)
        mine = worker or audit.curve_worker(plan, options, None, out)
        left = (
            set() if books is None else {cell.key for group in books.groups for cell in group.cells}
        )
        work = 0.0
        for group in plan.groups:
            if not ranks.decided(lambda group=group: any(cell.key in left for cell in group.cells)):
                continue

            def tick(units: float, group: Group = group) -> None:
                nonlocal work
                work += units
                if books is not None:
                    books.look([group], work, every=1.0)

            try:
                mine.run(group, tick)
            except (DiskError, Interrupted):
                raise  # no failure of the cell: the same command goes on with it
            except Exception as error:
                if books is not None:
                    books.close(group, cause_of(error))
                raise
            if books is not None:
                books.look([group], work)

        def end() -> None:
            if store is not None:
                audit.reduce(store, allow_raw=options.allow_raw)

        ranks.only_main(end)
        return store, Outcome(done=0, failed={}, skipped=0) if books is None else books.outcome()
