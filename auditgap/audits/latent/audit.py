"""The latent audit: attack hidden states layer by layer next to matched controls.

folder, outcome = run(LATENT, *LATENT.read(None, {"models": "smollm2", "limit": 16}))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from auditgap.audits.audit import Audit, Can, Grading
from auditgap.audits.latent.axes import LatentAxes
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.config import Needs
from auditgap.errors import UsageError, did_you_mean
from auditgap.rows import Row
from auditgap.types import ATTACKS, CLEAN, LONGER, Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.grading import Given, Stored
    from auditgap.audits.latent.part import LatentPart
    from auditgap.audits.latent.plan import LatentPlan
    from auditgap.report.compare import Comparable
    from auditgap.report.gather import PartData
    from auditgap.store import RunFolder
    from auditgap.store.remote import Place
    from auditgap.sweep import Worker

#: `distance`: this audit with the search for the minimum distance and no attack beside it.
DISTANCE: Document = {"attacks": (), "distance": True}
DISTANCE_TITLE = (
    "Find the minimum distance to collapse: the smallest eps at which each completion turns"
    " harmful, by layer."
)

#: What of its table a tracker is told, by the name that it has there.
_TRACKED = {"asr": "asr", "flip_rate": "flip_rate", "lvs": "lvs_mean"}


def _size(row: Document) -> str:
    return f"{row['unit']}_{row['eps']:g}"


class Latent(Audit[LatentConfig, RunOptions, "LatentPlan"]):
    name = "latent"
    command = "lvs"
    title = (
        "Attack each layer within a budget, next to matched controls, and report the audit gap and"
        " Latent Vulnerability Scores."
    )
    examples = (
        "auditgap lvs smollm2 --limit 16 --max-new-tokens 32",
        "auditgap lvs ./base ./tuned --layers stride:4 --unit max --out runs/pair",
        "auditgap lvs --config audit.yaml --dry-run",
    )
    can = frozenset({Can.RAY, Can.VLLM, Can.STORAGE, Can.REGRADE, Can.COMPARE, Can.PART, Can.GRID})
    main_table = "lvs"
    config, options, axes = LatentConfig, RunOptions, LatentAxes
    needs: ClassVar[Needs] = {
        "models": "Which model? Name at least one, for example: auditgap lvs smollm2"
    }
    not_graded: ClassVar[Document] = {"distance": False}
    states_gap = True

    @cached_property
    def report_part(self) -> LatentPart:
        from auditgap.audits.latent.part import LatentPart

        return LatentPart(self)

    def folder(self, config: LatentConfig) -> str:
        from auditgap.store import files

        return f"runs/{files.folder_name(config.models[0])}"

    def check_together(self, config: LatentConfig, options: RunOptions) -> None:
        shards = options.shard if isinstance(options.shard, dict) else {}
        if strange := sorted(shards.keys() - set(config.models)):
            raise UsageError(
                f"shard names {strange[0]!r}, which is none of the"
                f" models.{did_you_mean(strange[0], config.models)}"
            )

    def check(self, options: RunOptions) -> None:
        super().check(options)
        if options.keep_edits:
            from auditgap.store.remote import needs_disk

            needs_disk(options.out, "A latent audit that keeps its edits")

    def prepare(self, config: LatentConfig, options: RunOptions) -> LatentPlan:
        from auditgap.audits.latent.plan import prepare

        return prepare(config, options)

    def prepare_all(self, configs: Sequence[LatentConfig], options: RunOptions) -> list[LatentPlan]:
        from auditgap.audits.latent.plan import prepare

        known: dict[tuple[Any, ...], Any] = {}
        return [prepare(config, options, known) for config in configs]

    def case_name(self, plan: LatentPlan) -> str:
        from auditgap.audits.grading import safe_name

        return f"{safe_name(plan.prompts.name)}-{plan.config.unit}-{plan.config.dtype}"

    def estimate(self, plan: LatentPlan, options: RunOptions) -> Document:
        from auditgap.audits.latent.timing import completions, estimate
        from auditgap.audits.timing import Time, judging, starting
        from auditgap.judges import load_judge
        from auditgap.models import pick_device

        device = pick_device(options.device)
        expected = estimate(plan, device, options)
        judge = load_judge(plan.config.judge, device=device, serving=options.judge_serving)
        said = completions(plan.config, plan.cells, len(plan.prompts))
        time = Time(starting(plan.outlines), expected.seconds, judging(judge, said, device))
        return {
            "prompts": len(plan.prompts),
            **super().estimate(plan, options),
            **{name: getattr(expected, name) for name in ("flops", "memory_bytes", "disk_bytes")},
            **time.document(),
        }

    def worker(
        self, plan: LatentPlan, options: RunOptions, store: RunFolder
    ) -> Callable[[], Worker]:
        from auditgap.audits.latent.worker import LatentWorker

        return partial(LatentWorker, plan.config, options, str(store.place))

    def identity(self, plan: LatentPlan) -> Document:
        return {
            **super().identity(plan),
            "prompt_set": plan.prompts.digest,
            "scorers": plan.scorers,
        }

    def facts(self, plan: LatentPlan, options: RunOptions) -> Document:
        from auditgap.judges.card_cache import cards_of

        rounded = (
            "δ is added in fp32 and the sum rounded to the model's dtype; effective norms are in the"
            " rows."
        )
        prompts, config = plan.prompts, plan.config
        return {
            **super().facts(plan, options),
            "prompts": {"name": prompts.name, "n": len(prompts), **prompts.provenance},
            "judge_cards": cards_of(
                config.judge, device=options.device, serving=options.judge_serving
            ),
            "warnings": [] if config.dtype == "float32" else [rounded],
        }

    def comparable(self) -> Comparable:
        from auditgap.report.compare_latent import LATENT

        return LATENT

    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        from auditgap.report import correction, gather, tables

        correct = correction.of_runs([store])["harmful"]
        make = {"lvs": partial(tables.lvs_table, correction=correct)}
        return gather.tables_of([store], [*ATTACKS, CLEAN], make)

    def numbers(self, store: RunFolder) -> dict[str, float]:
        """LVS, ASR and flip rate of each site, attack and budget; the audit gap of each budget."""
        from auditgap.report import gather, tables
        from auditgap.report.text import short_names
        from auditgap.store.tables import rows_of

        make = {"lvs": tables.lvs_table, "gaps": tables.audit_gaps}
        by_subject = gather.of_each_subject([store], [*ATTACKS, LONGER, CLEAN], gather.all_of(make))
        made = gather.stacked(by_subject, make)
        shown = {subject: str(store.shown(subject)) for subject in by_subject}
        called = short_names(shown.values())
        found: dict[str, float] = {}
        for row in rows_of(made["lvs"]):
            where = (called[shown[row["subject"]]], row["site"], row["attack"], _size(row))
            found |= {"/".join((name, *where)): row[key] for name, key in _TRACKED.items()}
        for row in rows_of(made["gaps"]):
            where = (called[shown[row["subject"]]], _size(row))
            found |= {"/".join((name, *where)): row[name] for name in ("gap", "excess")}
        return found

    def reading(self, store: RunFolder) -> tuple[dict[str, pd.DataFrame], dict[str, PartData]]:
        from auditgap.report import correction

        data = self.report_part.gather([store], correction.of_runs([store]))
        return {"lvs": data.values["lvs"]}, {self.name: data}

    def check_grading(self, folder: Place, grading: Grading) -> None:
        if grading.judge is None and grading.reward is None:
            raise UsageError("Grade by whom? For example: auditgap grade DIR --judge keyword")
        if grading.reward == "margin":
            raise UsageError(
                "`margin` reads the subject under its edit, and edits are not stored: use"
                " `auditgap lvs --reward margin`."
            )

    def grading_order(self, description: Document) -> int | None:
        """Clean cells first: others are scored against them."""
        attack = description["attack"]
        return {CLEAN: 0, "distance": None}.get(attack, 1)

    def graded(self, stored: Stored, given: Given, new: RunFolder) -> list[Row]:
        from auditgap.audits.latent.again import graded_again

        return graded_again(stored, given, new)


LATENT = Latent()
