"""The latent audit from end to end: plan, open the folder, sweep, reduce; and judging again what a
run has said.

    folder, outcome = run(config, options, progress=Progress())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from auditgap import models
from auditgap.audits import audit
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.latent.plan import LatentPlan, make_plan
from auditgap.audits.planning import with_dtype
from auditgap.errors import UsageError
from auditgap.judges.card_cache import cards_of
from auditgap.models.provenance import provenance
from auditgap.store import RunFolder
from auditgap.sweep import Outcome, Progress


def prepare(
    config: LatentConfig, options: RunOptions, known: dict[tuple[Any, ...], Any] | None = None
) -> tuple[LatentConfig, LatentPlan]:
    """The config with `auto` resolved for this machine, and its plan (`known`: see `make_plan`).
    Loads no weights."""
    config = with_dtype(config, options.device)
    plan = make_plan(
        config,
        device=options.device,
        judge_serving=options.judge_serving,
        known=known,
        joined=options.engine == "vllm",
    )
    for outline in plan.outlines:
        _check_shard(outline, config, options)
    return config, plan


def _check_shard(outline: models.Outline, config: LatentConfig, options: RunOptions) -> None:
    """Raises UsageError when the subject cannot lie over devices as asked: now, and not when a
    worker has begun."""
    shard, device = options.shard_of(outline.subject.name), models.pick_device(options.device)
    shard.check(outline)
    if shard.kind != "whole" and config.compile:
        raise UsageError(
            f"--compile is for whole models, and {outline.subject.name} has --shard {shard}; leave"
            " one of them out."
        )
    if options.executor == "local":
        shard.check_devices(device)
    elif (
        shard.kind != "whole"
        and device.startswith("cuda")
        and options.gpus_of(outline.subject.name, device) < shard.n
    ):
        raise UsageError(
            f"--shard {shard} wants {shard.n} GPUs a worker, and gpus_per_worker is"
            f" {options.gpus_per_worker:g}; leave it out."
        )


def run(
    config: LatentConfig,
    options: RunOptions,
    *,
    plan: LatentPlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of the audit and reduce it. The same call again resumes.

    Raises UsageError, Refused, Interrupted; cells that fail are in the outcome, with their causes.
    """
    return audit.run(LATENT, config, options, plan=plan, progress=progress)


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """Reduce the rows of the finished cells into tables, figures and the report. Deterministic, and
    safe on a partial run."""
    LATENT.reduce(store, allow_raw=allow_raw)


def identity(plan: LatentPlan) -> dict[str, Any]:
    """What makes two runs the same run; also what the report's method section is made from."""
    return {
        "subjects": {o.subject.name: o.subject.fingerprint for o in plan.outlines},
        "prompt_set": plan.prompts.digest,
        "scorers": plan.scorers,
    }


def facts(plan: LatentPlan, options: RunOptions) -> dict[str, Any]:
    """What a reader wants to know besides: machine, versions, command, models' sizes, where the
    prompts come from."""
    return {
        **provenance(plan.outlines, dtype=plan.config.dtype),
        "prompts": {
            "name": plan.prompts.name,
            "n": len(plan.prompts.prompts),
            **plan.prompts.provenance,
        },
        "judge_cards": cards_of(
            plan.config.judge, device=options.device, serving=options.judge_serving
        ),
        "warnings": (
            [
                "δ is added in fp32 and the sum rounded to the model's dtype; effective norms are"
                " in the rows."
            ]
            if plan.config.dtype != "float32"
            else []
        ),
    }
