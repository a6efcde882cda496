"""The probe audit: a probe fitted on a base's activations, read on what was made of the base.

folder, outcome = run(PROBE, *PROBE.read(None, {"base": "./base", "subjects": "./twin", "triples": "demo"}))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from auditgap.audits.audit import Audit, Can, NothingToMeasure
from auditgap.audits.probe.config import ProbeConfig, ProbeOptions, required
from auditgap.config import Needs
from auditgap.types import Cell, Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.probe.part import ProbePart
    from auditgap.audits.probe.plan import ProbePlan
    from auditgap.report.compare import Comparable
    from auditgap.store import RunFolder
    from auditgap.sweep import Worker


class ProbeCell(Cell):
    """A cell whose name on the screen says what it is: a subject read by the probe."""

    audit = "probe"

    def __str__(self) -> str:
        return f"{self.subject.name} · probe"


class Probe(Audit[ProbeConfig, ProbeOptions, "ProbePlan"]):
    name = "probe"
    command = "probe"
    title = (
        "Test whether the base's safety probe still separates safe from unsafe activations: AUROC,"
        " gap and calibration, with baselines."
    )
    examples = ("auditgap probe ./base ./twin --triples triples.jsonl --out runs/probe",)
    can = frozenset({Can.RAY, Can.STORAGE, Can.COMPARE, Can.PART, Can.GRID})
    main_table = "probe"
    config, options, cell = ProbeConfig, ProbeOptions, ProbeCell
    needs: ClassVar[Needs] = required("auditgap probe ./base ./subject --triples demo")

    @cached_property
    def report_part(self) -> ProbePart:
        from auditgap.audits.probe.part import ProbePart

        return ProbePart(self)

    def audited(self, config: ProbeConfig) -> tuple[str, ...]:
        return config.subjects

    def folder(self, config: ProbeConfig) -> str:
        from auditgap.store import files

        return f"runs/probe-{files.folder_name(config.base)}"

    def prepare(self, config: ProbeConfig, options: ProbeOptions) -> ProbePlan:
        from auditgap.audits.planning import with_dtype
        from auditgap.audits.probe.plan import make_plan

        config = with_dtype(config, options.device)
        return make_plan(config, allow_overlap=options.allow_overlap)

    def estimate(self, plan: ProbePlan, options: ProbeOptions) -> Document:
        prompts = len({example.group for example in plan.examples})
        from auditgap.audits.timing import Time, reading, starting
        from auditgap.models import pick_device

        device = pick_device(options.device)
        tokens = sum(len(e.talk.ids) for e in plan.examples if e.talk is not None)
        work = sum(reading(o, tokens, plan.config.dtype, device) for o in plan.outlines)
        time = Time(starting(plan.outlines), work)
        return {"prompts": prompts, **super().estimate(plan, options), **time.document()}

    def part(self, model: str, base: str | None, values: Mapping[str, Any]) -> Document:
        if base is None:
            raise NothingToMeasure("no base was named; add --base")
        if not values.get("triples"):
            raise NothingToMeasure(
                "no contrast triples were named; add --triples FILE (prompt, safe answer, unsafe"
                " answer)"
            )
        return {"base": base, "subjects": (model,)}

    def worker(
        self, plan: ProbePlan, options: ProbeOptions, store: RunFolder
    ) -> Callable[[], Worker]:
        from auditgap.audits.probe.worker import ProbeWorker

        return partial(ProbeWorker, plan, options, store)

    def begin(self, plan: ProbePlan, store: RunFolder) -> None:
        from auditgap.audits.probe.plan import LEDGER

        plan.ledger.save(store.path / LEDGER)

    def identity(self, plan: ProbePlan) -> Document:
        return {
            "subject_fingerprints": {o.subject.name: o.subject.fingerprint for o in plan.outlines},
            "triple_set": plan.triples.digest,
        }

    def facts(self, plan: ProbePlan, options: ProbeOptions) -> Document:
        from auditgap.audits.probe.plan import facts

        return facts(plan)

    def comparable(self) -> Comparable:
        from auditgap.report.compare_asked import PROBE

        return PROBE

    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        from auditgap.report import probe

        return {"probe": probe.probe_table(store.rows([probe.PROBE]))}


PROBE = Probe()
