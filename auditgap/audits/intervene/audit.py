"""The intervention audit: steer, ablate, patch, turn and push a model, next to matched controls.

folder, outcome = run(INTERVENE, *INTERVENE.read(None, {"models": "smollm2", "limit": 48}))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar

from auditgap.audits.audit import Audit, Can
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.config import Needs
from auditgap.types import CLEAN, Cell, Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.grading import Given, Stored
    from auditgap.audits.intervene.part import IntervenePart
    from auditgap.audits.intervene.plan import IntervenePlan
    from auditgap.audits.intervene.rows import InterveneRow
    from auditgap.report.compare import Comparable
    from auditgap.store import RunFolder
    from auditgap.sweep import Worker


class InterveneCell(Cell):
    """A cell of this audit, as it is called in lists of cells."""

    audit = "intervene"

    def __str__(self) -> str:
        where = "" if self.site is None else f"{self.site} · "
        return f"{self.subject.name} · {where}{self.settings['intervention']}"


class Intervene(Audit[InterveneConfig, InterveneOptions, "IntervenePlan"]):
    name = "intervene"
    command = "intervene"
    title = (
        "Steer, ablate, patch or rotate activations, or apply one universal edit, each next to a"
        " random control of the same size."
    )
    examples = (
        "auditgap intervene smollm2 --limit 48 --max-new-tokens 32",
        "auditgap intervene ./base ./tuned --interventions steering,ablation --layers stride:4"
        " --out runs/pair",
        "auditgap intervene ./base --interventions steering --engine vllm --out runs/steered",
        "auditgap intervene --config steer.yaml --dry-run",
    )
    can = frozenset({Can.RAY, Can.VLLM, Can.REGRADE, Can.COMPARE, Can.GRID})
    main_table = "interventions"
    config, options, cell = InterveneConfig, InterveneOptions, InterveneCell
    needs: ClassVar[Needs] = {
        "models": (
            "Which model? Name at least one, for example: auditgap intervene smollm2 --layers mid"
        )
    }

    @cached_property
    def report_part(self) -> IntervenePart:
        from auditgap.audits.intervene.part import IntervenePart

        return IntervenePart(self)

    def folder(self, config: InterveneConfig) -> str:
        from auditgap.store import files

        return f"runs/interventions-{files.folder_name(config.models[0])}"

    def prepare(self, config: InterveneConfig, options: InterveneOptions) -> IntervenePlan:
        from auditgap.audits.intervene.plan import prepare

        return prepare(config, options)

    def estimate(self, plan: IntervenePlan, options: InterveneOptions) -> Document:
        from auditgap.audits.intervene.plan import estimate
        from auditgap.audits.timing import Time, judging, starting
        from auditgap.judges import load_judge
        from auditgap.models import pick_device

        device = pick_device(options.device)
        judge = load_judge(plan.config.judge, device=device, serving=options.judge_serving)
        opened = [*plan.outlines, *((plan.base,) if plan.base else ())]
        time = Time(
            starting(opened), estimate(plan, device), judging(judge, plan.completions, device)
        )
        return {
            "completions": plan.completions,
            **super().estimate(plan, options),
            **time.document(),
        }

    def worker(
        self, plan: IntervenePlan, options: InterveneOptions, store: RunFolder
    ) -> Callable[[], Worker]:
        from auditgap.audits.intervene.worker import InterveneWorker

        return partial(InterveneWorker, plan.config, options, str(store.path))

    def identity(self, plan: IntervenePlan) -> Document:
        return {
            **super().identity(plan),
            "base_fingerprint": plan.base and plan.base.subject.fingerprint,
            "prompt_set": plan.halves.prompts.digest,
            "halves": plan.halves.digest,
            "scorers": plan.scorers,
        }

    def facts(self, plan: IntervenePlan, options: InterveneOptions) -> Document:
        from auditgap.judges.card_cache import cards_of
        from auditgap.models.provenance import provenance

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

    def comparable(self) -> Comparable:
        from auditgap.report.compare_asked import INTERVENE

        return INTERVENE

    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        from auditgap.audits.intervene.plan import ATTACK
        from auditgap.report import correction, intervene

        correct = correction.of_runs([store])["harmful"]
        table = intervene.interventions_table(store.rows([ATTACK]), correction=correct)
        return {"interventions": table}

    def grading_order(self, description: Document) -> int | None:
        """Clean cells first: others are set beside their verdicts."""
        return 0 if description["settings"]["intervention"] == CLEAN else 1

    def graded(self, stored: Stored, given: Given, new: RunFolder) -> list[InterveneRow]:
        from auditgap.audits.intervene.again import graded_again

        return graded_again(stored, given, new)


INTERVENE = Intervene()
