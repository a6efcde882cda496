"""The harmful-SFT curve from end to end: plan, open the folder, train and ask cell by cell, reduce.

folder, outcome = run(config, options, train, facts={"rows": digest_of_the_training_rows})
# steps to 50 % and 80 %, area, audit gap, base − subject
folder.path / "summary.csv"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from auditgap import sweep
from auditgap.audits.behaviour.run import about
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions
from auditgap.audits.sft_curve.plan import ATTACK, CurvePlan, prepare
from auditgap.audits.sft_curve.worker import CurveWorker, Train
from auditgap.errors import Interrupted
from auditgap.report import curve, page
from auditgap.store import DiskError, RunFolder, files
from auditgap.store.remote import needs_disk
from auditgap.sweep import Outcome, Progress
from auditgap.sweep.state import SweepState, cause_of
from auditgap.training import ranks


def run(
    config: SFTCurveConfig,
    options: SFTCurveOptions,
    train: Train,
    *,
    facts: Mapping[str, Any] | None = None,
    plan: CurvePlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder | None, Outcome]:
    """Train and ask whatever (subject, seed) is missing, and reduce. The same call again resumes.

    Every process of a `deepspeed`, `accelerate` or `torchrun` job calls this, inside
    `ranks.joined`; the folder is rank 0's, and the others get None for it. Raises UsageError,
    Refused, Interrupted. With one process, cells that fail are in the outcome with their causes;
    with several a failure ends the job.
    """
    if plan is None:
        config, plan = prepare(config, options, facts=facts)
    needs_disk(options.out, "A fine-tuning curve")
    out = Path(
        options.out or f"runs/sft-{files.folder_name(plan.outlines[-1].subject.name)}"
    ).absolute()
    if ranks.world() > 1:
        return _together(plan, options, train, out, progress)
    store = _open(plan, options, out)
    with store.lock():
        store.plan(plan.cells)
        shown = None if progress is None else progress()
        make = partial(CurveWorker, plan, options, train, store)
        outcome = sweep.local.run(
            plan.groups, make, store, progress=shown, retry_failed=options.retry_failed
        )
        reduce(store, allow_raw=options.allow_raw)
    return store, outcome


def _together(
    plan: CurvePlan,
    options: SFTCurveOptions,
    train: Train,
    out: Path,
    progress: Callable[[], Progress] | None,
) -> tuple[RunFolder | None, Outcome]:
    """All ranks through the same cells in the same order; rank 0 holds the folder and decides which
    are left."""
    store: RunFolder | None = None
    books: SweepState | None = None
    worker: CurveWorker | None = None
    with ExitStack() as stack:

        def begin() -> None:
            nonlocal store, books, worker
            store = _open(plan, options, out)
            stack.enter_context(store.lock())
            store.plan(plan.cells)
            shown = None if progress is None else stack.enter_context(progress())
            books = SweepState(plan.groups, store, shown, options.retry_failed)
            worker = stack.enter_context(closing(CurveWorker(plan, options, train, store)))

        ranks.only_main(begin)
        mine = worker or CurveWorker(plan, options, train, None)
        left = (
            set() if books is None else {cell.key for group in books.groups for cell in group.cells}
        )
        work = 0.0
        for group in plan.groups:
            if not ranks.decided(lambda group=group: any(cell.key in left for cell in group.cells)):
                continue

            def tick(units: float, group: Any = group) -> None:
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
                reduce(store, allow_raw=options.allow_raw)

        ranks.only_main(end)
        return store, Outcome(done=0, failed={}, skipped=0) if books is None else books.outcome()


def _open(plan: CurvePlan, options: SFTCurveOptions, out: Path) -> RunFolder:
    return RunFolder.open(
        out,
        config={
            "audit": ATTACK,
            **plan.config.model_dump(mode="json"),
            "base": plan.outlines[0].subject.name,
            "subjects": {o.subject.name: o.subject.fingerprint for o in plan.outlines},
            "prompt_sets": {split: prompts.digest for split, prompts in plan.sets.items()},
            "scorers": plan.scorers,
            "training": dict(plan.facts),
        },
        info=about(plan.config, plan.sets, plan.outlines, options.device),
        break_lock=options.break_lock,
    )


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """The finished cells' rows as `curve.*` and `summary.*`, and the report. Deterministic, and
    safe on a partial run."""
    rows = store.rows([ATTACK])
    config = store.run["config"]
    tables = {
        "curve": curve.curve_table(rows),
        "summary": curve.curve_summary(
            rows, base=config.get("base"), thresholds=config.get("thresholds") or curve.THRESHOLDS
        ),
    }
    for name, table in tables.items():
        for form in ("parquet", "csv", "md"):
            store.write_table(f"{name}.{form}", table)
    page.write([store], allow_raw=allow_raw)
