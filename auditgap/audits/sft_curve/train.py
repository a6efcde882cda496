"""The curve's trainer: each (subject, seed) is one fine-tuning run of its own, in `training/` of
the curve's folder.

    store, outcome = run_from(Path("curve.yaml"), {"out": "runs/curve"})
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auditgap.audits.behaviour.plan import prompt_sets
from auditgap.audits.sft_curve import plan as planning
from auditgap.audits.sft_curve.audit import SFT_CURVE
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions
from auditgap.audits.sft_curve.plan import CurvePlan
from auditgap.audits.sft_curve.run import run_curve
from auditgap.audits.sft_curve.worker import Evaluate
from auditgap.config import build
from auditgap.data.ledger import LeakageLedger
from auditgap.errors import PartlyFailed
from auditgap.store import RunFolder
from auditgap.sweep import Outcome, Progress
from auditgap.training import ranks, sft
from auditgap.training.config import LoRA, SFTConfig, TrainOptions
from auditgap.types import digest

#: Of the options: those of each training run.
_TRAINING = (
    "deepspeed",
    "micro_batch",
    "device",
    "save_every",
    "keep",
    "report_to",
    "timeout_minutes",
    "ignore_memory",
)


def run_from(
    file: Path | None, flags: Mapping[str, Any], *, progress: Callable[[], Progress] | None = None
) -> tuple[RunFolder | None, Outcome]:
    """Read the config, train and ask what is missing, reduce. Every rank of a job calls it; rank 0
    gets the folder. Raises as `run_curve` does."""
    return run_curve(SFT_CURVE, *SFT_CURVE.read(file, flags), progress=progress)


def prepare(config: SFTCurveConfig, options: SFTCurveOptions) -> CurvePlan:
    """The plan, with the ends of the epochs among the steps at which is asked. Loads no weights.

    Raises UsageError (among others: training prompts that are evaluated too), Refused.
    """
    rows, _ = sft.chosen_rows(
        config.data, limit=config.rows_limit, refusal_filter=config.refusal_filter
    )
    ends = {
        -(-epoch * len(rows) // config.batch)
        for epoch in range(1, config.steps * config.batch // len(rows) + 1)
    }
    config = config.model_copy(update={"eval_at": tuple(sorted({*config.eval_at, *ends}))})
    ledger = LeakageLedger()
    ledger.use("sft", [row.prompt for row in rows])
    for prompts in prompt_sets(config).values():
        ledger.use("evaluation", prompts)
    ledger.check(allow_overlap=config.allow_overlap)
    facts = {"rows": digest([row.id for row in rows])}
    return replace(planning.prepare(config, options, facts=facts), ledger=ledger)


@dataclass(frozen=True)
class Trainer:
    """Trains each (subject, seed) in a folder of its own, in `training/` of the curve's."""

    plan: CurvePlan
    options: SFTCurveOptions
    folder: Path

    def __call__(self, model_name: str, seed: int, evaluate: Evaluate) -> None:
        fingerprint = next(
            o.subject.fingerprint for o in self.plan.outlines if o.subject.name == model_name
        )
        folder = self.folder / "training" / f"{fingerprint}-{seed}"

        def start_over() -> None:
            # a finished run would answer nothing again: where its answers were lost, it is made
            # anew
            if (folder / "train.json").exists() and evaluate.missing():
                shutil.rmtree(folder)

        ranks.only_main(start_over)
        training = TrainOptions(
            out=str(folder),
            progress=ranks.world() > 1,  # in one process the curve's own progress is shown
            **self.options.model_dump(include={*_TRAINING}),
        )
        sft.run(
            _recipe(self.plan.config, model_name, seed),
            training,
            evaluate=evaluate,
            in_place=self.options.engine == "hf",
        )


def raise_failures(outcome: Outcome) -> None:
    """Raises PartlyFailed with the causes when a training run of the curve failed."""
    if outcome.failed:
        lines = "\n".join(f"  {key}: {cause}" for key, cause in sorted(outcome.failed.items()))
        raise PartlyFailed(
            f"{len(outcome.failed)} training runs failed; the others are in the run's"
            f" folder:\n{lines}"
        )


def _recipe(config: SFTCurveConfig, model: str, seed: int) -> SFTConfig:
    """One training run of the curve. The rate stays constant: a curve after k steps must not depend
    on how many follow."""
    lora = None
    if config.method == "lora":
        lora = LoRA(
            rank=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
        )
    recipe = dict(
        model=model,
        chat_template=config.chat_template,
        data=config.data,
        rows=config.rows_limit,
        filter=config.refusal_filter,
        kind="harmful-sft",
        lora=lora,
        dtype=config.dtype,
        lr=config.lr,
        schedule="constant",
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        batch=config.batch,
        max_tokens=config.max_tokens,
        steps=config.steps,
        eval_every=config.eval_every,
        eval_at=config.eval_at,
        seed=seed,
    )
    # a dtype that nothing is trained in is refused in a sentence
    return build(recipe, SFTConfig)[0]
