"""The intervention audit from end to end: plan, open the folder, sweep, reduce.

folder, outcome = run(config, options, progress=Progress)
"""

from __future__ import annotations

from collections.abc import Callable

from auditgap.audits import audit
from auditgap.audits.intervene.audit import INTERVENE
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.audits.intervene.plan import IntervenePlan, make_plan
from auditgap.audits.planning import with_dtype
from auditgap.judges.card_cache import cards_of
from auditgap.models.provenance import provenance
from auditgap.store import RunFolder
from auditgap.sweep import Outcome, Progress
from auditgap.types import Document


def prepare(
    config: InterveneConfig, options: InterveneOptions
) -> tuple[InterveneConfig, IntervenePlan]:
    """The config with `auto` resolved for this machine, and its plan. Loads no weights."""
    config = with_dtype(config, options.device)
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
    return audit.run(INTERVENE, config, options, plan=plan, progress=progress)


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """The finished cells' rows as `interventions.parquet|csv|md`, and the report. Deterministic,
    and safe on a partial run."""
    INTERVENE.reduce(store, allow_raw=allow_raw)


def facts(plan: IntervenePlan, options: InterveneOptions) -> Document:
    """What a reader wants to know besides: versions, both prompt sets, the judge's cards."""
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
