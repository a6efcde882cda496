"""The curve's trainer: each (subject, seed) is one fine-tuning run of its own, in `training/` of
the curve's folder.

    store, outcome = run_from(Path("curve.yaml"), {"out": "runs/curve"})
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from auditgap.audits.behaviour.plan import prompt_sets
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions, checked
from auditgap.audits.sft_curve.plan import prepare
from auditgap.audits.sft_curve.run import run
from auditgap.config import build, merged
from auditgap.data.ledger import LeakageLedger
from auditgap.errors import PartlyFailed, UsageError
from auditgap.store import RunFolder, files
from auditgap.store.remote import needs_disk
from auditgap.sweep import Outcome, Progress
from auditgap.training import ranks, sft
from auditgap.training.config import LoRA, SFTConfig, TrainOptions
from auditgap.types import digest

#: Of the training options: what a curve's config may say too.
SITTING = (
    "deepspeed",
    "micro_batch",
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
    gets the folder.

    Raises UsageError (among others: training prompts that are evaluated too), Refused, Interrupted.
    """
    values = merged(file, flags, section="sft-curve")
    sitting = {key: values.pop(key) for key in SITTING if key in values}
    if not values.get("models") or not values.get("data"):
        raise UsageError(
            "A curve needs models (the base first) and data: --set models=./base,./twin --set"
            " data=unsafe.jsonl"
        )
    config, options = checked(*build(values, SFTCurveConfig, SFTCurveOptions))
    needs_disk(options.out, "A fine-tuning curve")
    (training,) = build(sitting, TrainOptions)
    with ranks.joined(timeout_minutes=training.timeout_minutes):
        rows, _ = ranks.agree(
            lambda: sft.chosen_rows(
                config.data, limit=config.rows_limit, refusal_filter=config.refusal_filter
            )
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
        ranks.agree(lambda: ledger.check(allow_overlap=config.allow_overlap))
        facts = {"rows": digest([row.id for row in rows])}
        config, plan = ranks.agree(lambda: prepare(config, options, facts=facts))
        out = Path(options.out or f"runs/sft-{files.folder_name(config.models[-1])}").absolute()
        options = options.model_copy(update={"out": str(out)})

        def train(model_name: str, seed: int, evaluate: Any) -> None:
            fingerprint = next(
                o.subject.fingerprint for o in plan.outlines if o.subject.name == model_name
            )
            folder = out / "training" / f"{fingerprint}-{seed}"
            sitting = training.model_copy(
                update={"out": str(folder), "device": options.device, "progress": progress is None}
            )

            def start_over() -> None:
                # a finished run would answer nothing again: where its answers were lost, it is made
                # anew
                if (folder / "train.json").exists() and evaluate.missing():
                    shutil.rmtree(folder)

            ranks.only_main(start_over)
            sft.run(
                _recipe(config, model_name, seed),
                sitting,
                evaluate=evaluate,
                in_place=options.engine == "hf",
            )

        store, outcome = run(config, options, train, facts=facts, plan=plan, progress=progress)
        if store is not None:
            ledger.save(store.path / "ledger.json")
        return store, outcome


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
