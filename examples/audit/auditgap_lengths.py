"""An audit of our own, in one file: how long a subject's answers are, and how many a judge finds
harmful.

    pip install -e examples/audit && auditgap lengths smollm2 --prompts everyday --out runs/lengths

Resuming, Ray, object storage, reducing and judging again are auditgap's; what stands here is what
this audit measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from auditgap.audits import Audit, AuditOptions, Can, Plan, options
from auditgap.config import Frozen
from auditgap.store import RunFolder, files
from auditgap.sweep import Group, Worker
from auditgap.types import Cell, Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.behaviour.rows import BehaviourRow
    from auditgap.audits.grading import Given, Stored
    from auditgap.data import PromptSet
    from auditgap.models import Outline


class LengthsConfig(Frozen):
    """What can change a number."""

    models: options.Models
    prompts: options.Prompts = "everyday"
    column: options.Column = "prompt"
    limit: options.Limit = None
    max_new_tokens: options.NewTokens = 64
    judge: options.Judge = "builtin"
    dtype: options.Dtype = "auto"
    chat_template: options.ChatTemplate = None
    seed: options.Seed = 0


class LengthsCell(Cell):
    audit = "lengths"


@dataclass(frozen=True)
class LengthsPlan(Plan):
    config: LengthsConfig
    outlines: tuple[Outline, ...]
    groups: tuple[Group, ...]
    prompts: PromptSet
    scorers: Document


@dataclass(frozen=True)
class LengthsWorker:
    plan: LengthsPlan
    options: AuditOptions
    store: RunFolder

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        """Ask one subject everything, and have its answers judged."""
        from auditgap.audits.behaviour.measure import grade, speak
        from auditgap.engines import Serving
        from auditgap.judges import load_judge

        config, prompts, started = self.plan.config, self.plan.prompts.prompts, time.monotonic()
        (cell,) = group.cells
        device, template = self.options.device, config.chat_template
        served = Serving(dtype=config.dtype, chat_template=template, device=device)
        with served.open(cell.subject.name) as engine:
            answers = speak(engine, prompts, max_new_tokens=config.max_new_tokens)
        judge = load_judge(config.judge, device=device)
        measured = grade(answers, prompts, judge, subject=cell.subject.name, kind="benign")
        seconds = time.monotonic() - started
        self.store.write(cell, measured.rows, generations=measured.texts, seconds=seconds)
        tick(1.0)


class Lengths(Audit[LengthsConfig, AuditOptions, LengthsPlan]):
    name = command = main_table = "lengths"
    title = "How long answers are, and how many of them a judge finds harmful."
    examples = ("auditgap lengths smollm2 --prompts everyday --limit 16",)
    can = frozenset({Can.RAY, Can.STORAGE, Can.REGRADE, Can.GRID})
    config, options, cell = LengthsConfig, AuditOptions, LengthsCell

    def folder(self, config: LengthsConfig) -> str:
        return f"runs/lengths-{files.folder_name(config.models[0])}"

    def prepare(self, config: LengthsConfig, options: AuditOptions) -> LengthsPlan:
        from auditgap.audits.planning import outlines_of, scorers_of, settings_of, with_dtype
        from auditgap.data import load_prompts

        config = with_dtype(config, options.device)
        prompts = load_prompts(config.prompts, limit=config.limit, seed=config.seed)
        outlines = outlines_of(config.models, config.chat_template)
        scorers = scorers_of(config.judge, device=options.device)
        groups = []
        for outline in outlines:
            settings = settings_of(config, outline, scorers)
            cell = LengthsCell(outline.subject, None, None, "lengths", prompts.digest, settings)
            groups.append(Group(str(cell), (cell,), work=1.0))
        return LengthsPlan(config, outlines, tuple(groups), prompts, scorers)

    def worker(
        self, plan: LengthsPlan, options: AuditOptions, store: RunFolder
    ) -> Callable[[], Worker]:
        return partial(LengthsWorker, plan, options, store)

    def identity(self, plan: LengthsPlan) -> Document:
        return {
            **super().identity(plan),
            "prompt_set": plan.prompts.digest,
            "scorers": plan.scorers,
        }

    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        rows = store.rows(["lengths"])
        told = rows[rows["unscored"] == ""].groupby("subject", sort=True)
        table = told["n_new_tokens"].agg(n="count", mean_tokens="mean")
        table["harmful"] = told["verdict"].agg(lambda labels: float((labels == "harmful").mean()))
        return {"lengths": table.reset_index()}

    def graded(self, stored: Stored, given: Given, new: RunFolder) -> list[BehaviourRow]:
        from auditgap.audits.behaviour.measure import graded_again

        return graded_again(stored, given)


LENGTHS = Lengths()
