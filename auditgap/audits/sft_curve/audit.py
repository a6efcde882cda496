"""The harmful-SFT curve: how many steps of fine-tuning on unsafe answers it takes until a subject
complies.

folder, outcome = run(SFT_CURVE, *SFT_CURVE.read(None, {"models": "./base,./twin", "data": "unsafe.jsonl"}))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from auditgap.audits.audit import Audit, Can, NothingToMeasure
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions
from auditgap.config import Needs
from auditgap.errors import UsageError
from auditgap.types import Cell, Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.behaviour.rows import BehaviourRow
    from auditgap.audits.grading import Given, Stored
    from auditgap.audits.sft_curve.part import CurvePart
    from auditgap.audits.sft_curve.plan import CurvePlan
    from auditgap.audits.sft_curve.worker import CurveWorker
    from auditgap.report.compare import Comparable
    from auditgap.store import RunFolder
    from auditgap.sweep import Worker


class CurveCell(Cell):
    """A cell of this audit, as it is called in lists of cells."""

    audit = "sft_curve"

    def __str__(self) -> str:
        return f"{self.subject.name} · harmful SFT · seed {self.settings['seed']}"


class SFTCurve(Audit[SFTCurveConfig, SFTCurveOptions, "CurvePlan"]):
    name = "sft_curve"
    command = "sft-curve"
    title = "Fine-tune on unsafe answers and measure how fast refusals erode, over several seeds."
    examples = (
        "auditgap train harmful-sft --set models=./base,./twin --set data=unsafe.jsonl --set"
        " steps=40 --out runs/curve",
    )
    can = frozenset({Can.VLLM, Can.RANKS, Can.REGRADE, Can.COMPARE, Can.PART, Can.GRID})
    main_table = "curve"
    config, options, cell = SFTCurveConfig, SFTCurveOptions, CurveCell
    needs: ClassVar[Needs] = dict.fromkeys(
        ("models", "data"),
        "A curve needs models (the base first) and data (columns prompt and response): --set"
        " models=./base,./twin --set data=unsafe.jsonl",
    )
    states_gap = True

    @cached_property
    def report_part(self) -> CurvePart:
        from auditgap.audits.sft_curve.part import CurvePart

        return CurvePart(self)

    def check_together(self, config: SFTCurveConfig, options: SFTCurveOptions) -> None:
        if options.engine == "vllm" and config.method != "lora":
            raise UsageError(
                "engine: vllm swaps adapters, and method: full trains all weights; use method:"
                " lora, or engine: hf."
            )

    def audited(self, config: SFTCurveConfig) -> tuple[str, ...]:
        return config.models[1:] or config.models

    def folder(self, config: SFTCurveConfig) -> str:
        from auditgap.store import files

        return f"runs/sft-{files.folder_name(config.models[-1])}"

    def prepare(self, config: SFTCurveConfig, options: SFTCurveOptions) -> CurvePlan:
        from auditgap.audits.sft_curve.train import prepare

        return prepare(config, options)

    def estimate(self, plan: CurvePlan, options: SFTCurveOptions) -> Document:
        from auditgap.audits.planning import mean_tokens
        from auditgap.audits.timing import Time, judging, speaking, starting, training
        from auditgap.judges import load_judge
        from auditgap.models import pick_device

        config, device = plan.config, pick_device(options.device)
        runs, rounds = len(config.seeds), len(config.evaluations)
        prompts = [prompt for some in plan.sets.values() for prompt in some.prompts]
        asked = len(prompts) * runs * rounds
        work = 0.0
        for one in plan.outlines:
            # a row of training is a question and its answer
            tokens, new = mean_tokens(one, prompts), config.max_new_tokens
            row = min(config.max_tokens, tokens + new)
            rows = runs * config.steps * config.batch
            work += training(one, rows * row, config.dtype, device)
            work += speaking(one, asked, tokens, new, config.dtype, device)
        judge = load_judge(config.judge, device=device)
        said = asked * len(plan.outlines)
        time = Time(starting(plan.outlines, runs), work, judging(judge, said, device))
        told = {**super().estimate(plan, options), "steps": config.steps}
        return {**told, **time.document()}

    def part(self, model: str, base: str | None, values: Mapping[str, Any]) -> Document:
        if base is None:
            raise NothingToMeasure("no base was named; add --base")
        if not values.get("data"):
            raise NothingToMeasure(
                "no training rows were named; add --sft-data FILE (columns prompt and response)"
            )
        return {"models": (base, model)}

    def worker(
        self, plan: CurvePlan, options: SFTCurveOptions, store: RunFolder
    ) -> Callable[[], Worker]:
        return partial(self.curve_worker, plan, options, store, store.path)

    def curve_worker(
        self, plan: CurvePlan, options: SFTCurveOptions, store: RunFolder | None, folder: Path
    ) -> CurveWorker:
        """What trains and asks; on ranks other than 0 there is no store, only where it is."""
        from auditgap.audits.sft_curve.train import Trainer
        from auditgap.audits.sft_curve.worker import CurveWorker

        return CurveWorker(plan, options, Trainer(plan, options, folder), store)

    def begin(self, plan: CurvePlan, store: RunFolder) -> None:
        plan.ledger.save(store.path / "ledger.json")

    def identity(self, plan: CurvePlan) -> Document:
        return {
            **super().identity(plan),
            "base": plan.outlines[0].subject.name,
            "prompt_sets": {split: prompts.digest for split, prompts in plan.sets.items()},
            "scorers": plan.scorers,
            "training": dict(plan.facts),
        }

    def facts(self, plan: CurvePlan, options: SFTCurveOptions) -> Document:
        from auditgap.judges.card_cache import cards_of

        return {
            **super().facts(plan, options),
            "prompts": {
                split: {"name": s.name, "n": len(s), **s.provenance}
                for split, s in plan.sets.items()
            },
            "judge_cards": cards_of(plan.config.judge, device=options.device),
        }

    def comparable(self) -> Comparable:
        from auditgap.report.compare_asked import SFT_CURVE

        return SFT_CURVE

    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        from auditgap.audits.sft_curve.plan import ATTACK
        from auditgap.report import curve

        rows, config = store.rows([ATTACK]), store.run["config"]
        return {
            "curve": curve.curve_table(rows),
            "summary": curve.curve_summary(
                rows,
                base=config.get("base"),
                thresholds=config.get("thresholds") or curve.THRESHOLDS,
            ),
        }

    def graded(self, stored: Stored, given: Given, new: RunFolder) -> list[BehaviourRow]:
        from auditgap.audits.behaviour.measure import graded_again

        return graded_again(stored, given)


SFT_CURVE = SFTCurve()
