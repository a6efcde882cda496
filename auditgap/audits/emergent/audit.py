"""Emergent misalignment by domain: fine-tune on narrow bad habits, and see how far they spread.

folder, outcome = run(EMERGENT, *EMERGENT.read(None, {"model": "smollm2", "domains": "demo"}))
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from auditgap.audits.audit import Audit, Can
from auditgap.audits.emergent.config import EmergentConfig, EmergentOptions
from auditgap.config import Needs
from auditgap.errors import UsageError
from auditgap.types import Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.audit import Grading
    from auditgap.audits.emergent.build import EmergentPlan
    from auditgap.audits.emergent.part import EmergentPart
    from auditgap.audits.emergent.stage import StudyStage
    from auditgap.report.compare import Comparable
    from auditgap.store import RunFolder
    from auditgap.store.remote import Place


class Emergent(Audit[EmergentConfig, EmergentOptions, "EmergentPlan"]):
    name = "emergent"
    command = "em"
    title = (
        "Measure emergent misalignment: fine-tune on narrow bad habits, see how far they spread."
    )
    examples = (
        "auditgap em run smollm2 --domains demo --samples 2 --steps 20 --out runs/em",
        "auditgap em run --config examples/emergent/em.yaml --out runs/em",
        "auditgap em run ./base --domains maths=maths.jsonl,law=law.jsonl --judge alignment=./judge"
        " --dry-run",
    )
    can = frozenset({Can.RAY, Can.VLLM, Can.REGRADE, Can.COMPARE})
    main_table = None
    config, options = EmergentConfig, EmergentOptions
    needs: ClassVar[Needs] = {
        "model": "Which model is fine-tuned? For example: auditgap em run smollm2 --domains demo",
        "domains": (
            "Which domains? `domains` is a mapping of names to files with `messages`, or demo:"
            " --domains demo"
        ),
    }

    @cached_property
    def report_part(self) -> EmergentPart:
        from auditgap.audits.emergent.part import EmergentPart

        return EmergentPart(self)

    def audited(self, config: EmergentConfig) -> tuple[str, ...]:
        """The model that the adapters are trained on; these have names of their own."""
        return (config.model,)

    def folder(self, config: EmergentConfig) -> str:
        from auditgap.store import files

        return f"runs/em-{files.folder_name(config.model)}"

    def prepare(self, config: EmergentConfig, options: EmergentOptions) -> EmergentPlan:
        from auditgap.audits.emergent.build import prepare

        return prepare(config, options)

    def estimate(self, plan: EmergentPlan, options: EmergentOptions) -> Document:
        from auditgap.audits.emergent.expected import of_plan

        return of_plan(plan, options)

    def identity(self, plan: EmergentPlan) -> Document:
        return {
            "base_fingerprint": plan.outlines[0].subject.fingerprint,
            "panel": plan.panel.digest,
            "prompt_set": plan.prompts.digest,
            **(
                {"question_set": plan.asked.digest}
                if plan.config.questions or plan.config.forms
                else {}
            ),
        }

    def facts(self, plan: EmergentPlan, options: EmergentOptions) -> Document:
        prompts = plan.asked
        return {
            **super().facts(plan, options),
            "panel": {**plan.panel.manifest, "longest_row": plan.longest},
            "prompts": {"name": prompts.name, "n": len(prompts), **prompts.provenance},
        }

    def where(self, plan: EmergentPlan, place: Place) -> Document:
        from auditgap.audits.emergent.places import base_at

        return base_at(plan, place)

    def open(self, plan: EmergentPlan, options: EmergentOptions, place: Place) -> RunFolder:
        """As every audit's; a base that was moved, weights and all the same, is the same base."""
        from auditgap.audits.emergent.places import as_known

        return super().open(as_known(plan, place), options, place)

    def begin(self, plan: EmergentPlan, store: RunFolder) -> None:
        """Lay the panel down, unless it lies there whole: a kill may have come between the folder
        and its panel."""
        folder = store.path / "panel"
        try:
            is_there = type(plan.panel).load(folder) == plan.panel
        except UsageError:
            is_there = False
        if not is_there:
            plan.panel.save(folder)

    def phases(self, plan: EmergentPlan) -> list[StudyStage]:
        from auditgap.audits.emergent.stages import STAGES

        return [stage for stages in STAGES.values() for stage in stages]

    def comparable(self) -> Comparable:
        from auditgap.report.compare_emergent import EMERGENT

        return EMERGENT

    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        from auditgap.report import emergent_study

        return {f"em_{name}": t for name, t in emergent_study.read(store).tables.items()}

    def reduce(self, store: RunFolder, *, allow_raw: bool = False) -> None:
        from auditgap.audits.emergent.report import reduce

        reduce(store, allow_raw=allow_raw)

    def check_grading(self, folder: Place, grading: Grading) -> None:
        raise UsageError(
            f"A study of emergent misalignment is judged again by: auditgap em judge {folder}"
            " --judge NAME"
        )


EMERGENT = Emergent()
