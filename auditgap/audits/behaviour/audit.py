"""The behavioural audit: what a subject says when it is asked, as rates of refusal and compliance.

folder, outcome = run(BEHAVIOUR, *BEHAVIOUR.read(None, {"models": "smollm2", "limit": 50}))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar

from auditgap.audits.audit import Audit, Can
from auditgap.audits.behaviour.config import BehaviourConfig, BehaviourOptions
from auditgap.config import Needs
from auditgap.types import Cell, Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.behaviour.part import BehaviourPart
    from auditgap.audits.behaviour.plan import BehaviourPlan
    from auditgap.audits.behaviour.rows import BehaviourRow
    from auditgap.audits.grading import Given, Stored
    from auditgap.report.compare import Comparable
    from auditgap.store import RunFolder
    from auditgap.sweep import Worker


class AskCell(Cell):
    """A cell of this audit, as it is called in lists of cells."""

    audit = "behaviour"

    def __str__(self) -> str:
        return f"{self.subject.name} · {self.settings['source']} ({self.settings['kind']})"


class Behaviour(Audit[BehaviourConfig, BehaviourOptions, "BehaviourPlan"]):
    name = "behaviour"
    command = "evaluate"
    title = (
        "Measure refusal and compliance on harmful prompts and jailbreaks, and over-refusal on"
        " harmless ones."
    )
    examples = (
        "auditgap evaluate smollm2 --limit 50",
        "auditgap evaluate ./base ./twin --suite paper --judge ensemble --engine vllm",
        "auditgap evaluate gpt-4.1-mini --endpoint https://api.openai.com/v1 --suite"
        " xstest,mine.jsonl:benign --judge refusal=gpt-4.1",
    )
    can = frozenset({Can.RAY, Can.VLLM, Can.STORAGE, Can.REGRADE, Can.COMPARE, Can.PART, Can.GRID})
    main_table = "behaviour"
    config, options, cell = BehaviourConfig, BehaviourOptions, AskCell
    needs: ClassVar[Needs] = {
        "models": "Which model? Name at least one, for example: auditgap evaluate smollm2"
    }

    @cached_property
    def report_part(self) -> BehaviourPart:
        from auditgap.audits.behaviour.part import BehaviourPart

        return BehaviourPart(self)

    def folder(self, config: BehaviourConfig) -> str:
        from auditgap.store import files

        return f"runs/behaviour-{files.folder_name(config.models[0])}"

    def prepare(self, config: BehaviourConfig, options: BehaviourOptions) -> BehaviourPlan:
        from auditgap.audits.behaviour.plan import prepare

        return prepare(config, options)

    def estimate(self, plan: BehaviourPlan, options: BehaviourOptions) -> Document:
        asked = {"prompts": len(plan.suite), "judge": plan.config.judge}
        told = {**asked, **super().estimate(plan, options)}
        if not plan.outlines:  # how fast an endpoint answers is not to be known
            return told
        from auditgap.audits.planning import chain_tokens, mean_tokens
        from auditgap.audits.timing import Time, judging, speaking, starting
        from auditgap.judges import load_judge
        from auditgap.models import pick_device

        config, n, device = plan.config, len(plan.suite), pick_device(options.device)
        judge = load_judge(config.judge, device=device, serving=options.judge_serving(config))
        work = sum(
            speaking(
                outline,
                n,
                mean_tokens(outline, list(plan.suite)),
                config.max_new_tokens + chain_tokens(config, outline.chat),
                config.dtype,
                device,
            )
            for outline in plan.outlines
        )
        time = Time(starting(plan.outlines), work, judging(judge, n * len(plan.outlines), device))
        return {**told, **time.document()}

    def worker(
        self, plan: BehaviourPlan, options: BehaviourOptions, store: RunFolder
    ) -> Callable[[], Worker]:
        from auditgap.audits.behaviour.worker import BehaviourWorker

        return partial(BehaviourWorker, plan, options, store)

    def identity(self, plan: BehaviourPlan) -> Document:
        return {
            "subjects": {s.name: s.fingerprint for s in plan.subjects},
            "prompt_set": plan.suite.digest,
            "scorers": plan.scorers,
        }

    def facts(self, plan: BehaviourPlan, options: BehaviourOptions) -> Document:
        from auditgap.judges.card_cache import cards_of

        known = super().facts(plan, options)
        if not plan.outlines:
            known["subjects"] = [
                {"name": s.name, "fingerprint": s.fingerprint, "endpoint": True}
                for s in plan.subjects
            ]
        return {
            **known,
            "prompts": {"name": plan.config.suite, "n": len(plan.suite), **plan.suite.manifest},
            "judge_cards": cards_of(
                plan.config.judge, device=options.device, serving=options.judge_serving(plan.config)
            ),
        }

    def comparable(self) -> Comparable:
        from auditgap.report.compare_asked import BEHAVIOUR

        return BEHAVIOUR

    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        from auditgap.audits.behaviour.plan import ATTACK
        from auditgap.report import behaviour, correction

        rows = store.rows([ATTACK])
        return {"behaviour": behaviour.behaviour_table(rows, correction.of_runs([store]))}

    def graded(self, stored: Stored, given: Given, new: RunFolder) -> list[BehaviourRow]:
        from auditgap.audits.behaviour.measure import graded_again

        return graded_again(stored, given)


BEHAVIOUR = Behaviour()


def lost(store: RunFolder) -> tuple[float, str]:
    """The share of prompts that no subject's answer could be had to, whatever the judge, and the
    commonest reason."""
    rows = store.rows(["behaviour"])
    if not len(rows):
        return 0.0, ""
    never = rows[rows["refused"].isna()]
    return len(never) / len(rows), "" if never.empty else str(never["unscored"].mode()[0])


def unscored_share(store: RunFolder) -> float | None:
    """The share of answers that the judge gave no verdict on; what was never said is not the
    judge's. None: no answers."""
    rows = store.rows(["behaviour"])
    if not len(rows):
        return None
    said = rows[rows["refused"].notna()]
    return float(said["complied"].isna().mean()) if len(said) else None
