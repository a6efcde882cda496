"""The intervention audit from end to end: plan, open the folder, sweep, reduce.

folder, outcome = run(config, options, progress=Progress)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from auditgap import models, sweep
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.audits.intervene.plan import ATTACK, IntervenePlan, make_plan
from auditgap.audits.intervene.worker import InterveneWorker
from auditgap.audits.sweeps import run_sweep
from auditgap.judges.card_cache import cards_of
from auditgap.models.provenance import provenance
from auditgap.report import correction, page
from auditgap.report import intervene as tables
from auditgap.store import RunFolder, files
from auditgap.store.remote import needs_disk
from auditgap.sweep import Outcome, Progress


def prepare(
    config: InterveneConfig, options: InterveneOptions
) -> tuple[InterveneConfig, IntervenePlan]:
    """The config with `auto` resolved for this machine, and its plan. Loads no weights."""
    dtype = models.pick_dtype(config.dtype, models.pick_device(options.device))
    config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return config, make_plan(config, device=options.device, judge_serving=options.judge_serving)


def run(
    config: InterveneConfig,
    options: InterveneOptions,
    *,
    plan: IntervenePlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of the audit and reduce it. The same call again resumes.

    Raises UsageError, Refused, Interrupted; cells that fail are in the outcome, with their causes.
    """
    needs_disk(options.out, "An intervention audit")
    if plan is None:
        config, plan = prepare(config, options)
    out = options.out or f"runs/interventions-{files.folder_name(config.models[0])}"
    store = RunFolder.open(
        out, config=_identity(plan), info=_info(plan, options), break_lock=options.break_lock
    )
    make_worker = partial(InterveneWorker, plan.config, options, str(store.path))
    with store.lock():
        store.plan(plan.cells)
        on_ray = options.executor == "ray" and any(
            not store.is_finished(cell.key) for cell in plan.cells
        )
        # one cluster for both passes
        with sweep.ray.cluster(options.address) if on_ray else nullcontext():
            # in this process groups run in order, so one worker serves all; elsewhere the clean
            # pass has to be over first
            passes = (plan.clean, plan.groups) if on_ray else ((*plan.clean, *plan.groups),)
            outcomes = [
                run_sweep(groups, make_worker, store, options, progress) for groups in passes
            ]
        if all(store.is_finished(cell.key) for cell in plan.cells):
            # a kill between writing a cell and forgetting its packs leaves some behind
            store.forget()
        reduce(store, allow_raw=options.allow_raw)
    done, skipped = sum(o.done for o in outcomes), sum(o.skipped for o in outcomes)
    return store, Outcome(
        done=done,
        failed={k: cause for o in outcomes for k, cause in o.failed.items()},
        skipped=skipped,
    )


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """The finished cells' rows as `interventions.parquet|csv|md`, and the report. Deterministic,
    and safe on a partial run."""
    table = tables.interventions_table(
        store.rows([ATTACK]), correction=correction.of_runs([store])["harmful"]
    )
    for form in ("parquet", "csv", "md"):
        store.write_table(f"interventions.{form}", table)
    page.write([store], allow_raw=allow_raw)


def _identity(plan: IntervenePlan) -> dict[str, Any]:
    """What makes two runs the same run; also what the report's method section is made from."""
    return {
        "audit": "intervene",
        **plan.config.model_dump(mode="json"),
        "subjects": {o.subject.name: o.subject.fingerprint for o in plan.outlines},
        "base_fingerprint": plan.base and plan.base.subject.fingerprint,
        "prompt_set": plan.halves.prompts.digest,
        "halves": plan.halves.digest,
        "scorers": plan.scorers,
    }


def _info(plan: IntervenePlan, options: InterveneOptions) -> dict[str, Any]:
    halves = plan.halves
    sets = {
        "prompts": (halves.prompts, halves.fit),
        "control_prompts": (halves.controls, halves.contrast),
    }
    prompts = {
        what: {"name": s.name, "n": len(s), "n_fit": len(fit), **s.provenance}
        for what, (s, fit) in sets.items()
    }
    return {
        **provenance(
            [*plan.outlines, *([plan.base] if plan.base else [])], dtype=plan.config.dtype
        ),
        "prompts": prompts,
        "warnings": [],
        "judge_cards": cards_of(
            plan.config.judge, device=options.device, serving=options.judge_serving
        ),
    }
