"""What an audit is, and the one way to run it.

    audit = AUDITS["behaviour"]
    config, options = audit.read(None, {"models": "smollm2", "limit": 16, "out": "runs/behaviour"})
    plan = audit.prepare(config, options)               # resolves names; loads no weights
    folder, outcome = run(audit, config, options, plan=plan)

An audit says what it measures: its config, the cells that a config comes to, the worker that
computes them, the tables that their rows make. Everything else is the same for all of them and
stands here and in `audits.table`: resuming, Ray, object storage, tables, report, grading again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from auditgap.audits.axes import GridAxes
from auditgap.audits.options import AuditOptions, openai_for_endpoints
from auditgap.config import Frozen, Needs, build, merged
from auditgap.errors import AuditgapError, UsageError
from auditgap.types import Cell, Document

if TYPE_CHECKING:
    import pandas as pd

    from auditgap.audits.grading import Given, Stored
    from auditgap.audits.report_part import ReportPart
    from auditgap.audits.sweeps import Phase
    from auditgap.engines import Serving
    from auditgap.models import Outline
    from auditgap.report.compare import Comparable
    from auditgap.report.gather import PartData
    from auditgap.store import RunFolder
    from auditgap.store.remote import Place
    from auditgap.sweep import Group, Outcome, Progress, Worker


class Can(StrEnum):
    """What an audit can do besides running on this machine; refusals are made from it."""

    RAY = "run on Ray"
    VLLM = "generate with vLLM"
    STORAGE = "write to object storage"
    REGRADE = "be judged again"
    COMPARE = "be compared"
    RANKS = "run on several ranks of a launcher"
    PART = "be a part of a whole audit"
    GRID = "run as a grid"


class NothingToMeasure(AuditgapError):
    """Why an audit cannot be a part of this whole audit: what is missing, and how to name it."""


class Plan:
    """What a config comes to on this machine: the base of every audit's plan, a frozen dataclass."""

    config: Any  #: with `auto` resolved
    groups: tuple[Group, ...]
    outlines: tuple[Outline, ...]  #: of the subjects whose weights are here
    warnings: tuple[str, ...] = ()  #: sentences that the user is told and the folder keeps

    @property
    def passes(self) -> tuple[tuple[Group, ...], ...]:
        """Groups in the order of the sweep; a pass needs what those before it have written."""
        return (self.groups,)

    @property
    def cells(self) -> list[Cell]:
        return [cell for groups in self.passes for group in groups for cell in group.cells]


@dataclass(frozen=True)
class Grading:
    """Who judges a run's stored text again, and how the judge's models are served."""

    judge: str | None = None
    reward: str | None = None  #: of a latent audit
    device: str = "auto"
    serving: Serving | None = None
    #: share of the answers that a judge's endpoint may leave without a reply
    max_unscored: float = 0.2


ConfigT = TypeVar("ConfigT", bound=Frozen)
OptionsT = TypeVar("OptionsT", bound=AuditOptions)
PlanT = TypeVar("PlanT", bound=Plan)


class Audit(ABC, Generic[ConfigT, OptionsT, PlanT]):
    """One kind of audit: a subclass and one value of it, in `audits/<name>/audit.py`.

    Importing that module costs no torch; `prepare`, `worker` and the like import what they need.
    """

    name: ClassVar[str]  #: in run.json's config["audit"] and `Cell.audit`
    command: ClassVar[str]  #: what is typed
    title: ClassVar[str]  #: what it answers, in one line
    examples: ClassVar[tuple[str, ...]] = ()
    can: ClassVar[frozenset[Can]] = frozenset()
    main_table: ClassVar[str | None]  #: of `NAME.parquet`; None: it has several
    config: type[ConfigT]
    options: type[OptionsT]
    #: settings without which there is nothing to measure, each with what the user is told then
    needs: ClassVar[Needs] = {}
    axes: ClassVar[type[GridAxes]] = GridAxes  #: what a grid of it spans
    cell: ClassVar[type[Cell]] = Cell
    not_graded: ClassVar[Document] = {}  #: what a folder of verdicts given again has no part of
    #: whether what it states is an audit gap; a report begins with it then
    states_gap: ClassVar[bool] = False

    @cached_property
    def report_part(self) -> ReportPart:
        """What it has in a report: by itself, a section with its tables."""
        from auditgap.audits.report_part import ReportPart

        return ReportPart(self)

    @property
    def settings(self) -> frozenset[str]:
        """The names of everything that can be set: fields of its config and of its options."""
        return frozenset((*self.config.model_fields, *self.options.model_fields))

    def read(self, file: Path | None, values: Mapping[str, Any]) -> tuple[ConfigT, OptionsT]:
        """The config file's values with those that were given (not None) on top. Raises UsageError
        naming the key and what was wanted; Refused when foreign code is asked for."""
        asked = merged(file, values, section=self.command)
        openai_for_endpoints(asked, self.settings)
        config, options = build(asked, self.config, self.options, needs=self.needs)
        self.check_together(config, options)
        return config, options

    def check_together(self, config: ConfigT, options: OptionsT) -> None:
        """Raises UsageError for options that do not go with the config."""

    @abstractmethod
    def folder(self, config: ConfigT) -> str:
        """Where a run goes whose options name no folder."""

    @abstractmethod
    def prepare(self, config: ConfigT, options: OptionsT) -> PlanT:
        """Resolve every name of the config; loads no weights. Raises UsageError, Refused."""

    def worker(self, plan: PlanT, options: OptionsT, store: RunFolder) -> Callable[[], Worker]:
        """What makes a worker, in this process or in one of Ray's (so it can be pickled)."""
        raise NotImplementedError(f"{self.name} has neither a worker nor phases of its own.")

    def phases(self, plan: PlanT) -> Sequence[Phase[OptionsT]]:
        """What is swept, one after the other; an audit whose plan has all of its cells has one."""
        from auditgap.audits.sweeps import WholePlan

        return [WholePlan(self, plan)]

    def numbers(self, store: RunFolder) -> Mapping[str, float]:
        """What the finished cells come to so far, for a tracker (`--report-to`), by names such as
        "asr/MODEL/SITE". NaN: not known yet."""
        return {}

    @abstractmethod
    def tables(self, store: RunFolder) -> dict[str, pd.DataFrame]:
        """The finished cells' rows as tables, by the name of their files. Deterministic, and safe
        on a partial run."""

    def identity(self, plan: PlanT) -> Document:
        """What makes two runs the same run, besides the config."""
        return {"subjects": {o.subject.name: o.subject.fingerprint for o in plan.outlines}}

    def question(self, plan: PlanT) -> Document:
        """run.json's config: everything that can change a number."""
        return {"audit": self.name, **plan.config.model_dump(mode="json"), **self.identity(plan)}

    def facts(self, plan: PlanT, options: OptionsT) -> Document:
        """What a reader of the run wants to know besides: versions, models' sizes, where the
        prompts come from."""
        from auditgap.models.provenance import provenance

        return {
            **provenance(plan.outlines, dtype=plan.config.dtype),
            "warnings": list(plan.warnings),
        }

    def where(self, plan: PlanT, place: Place) -> Document:
        """Further facts of a run in that folder."""
        return {}

    def estimate(self, plan: PlanT, options: OptionsT) -> Document:
        """What a dry run says of a plan: how much there is to do, and `seconds` where that can be
        told."""
        return {"cells": len(plan.cells)}

    def part(self, model: str, base: str | None, values: Mapping[str, Any]) -> Document:
        """Which models are measured in the whole audit of `model`, as config values beside
        `values`. For an audit with `Can.PART`. Raises NothingToMeasure."""
        return {"models": (model,)}

    def prepare_all(self, configs: Sequence[ConfigT], options: OptionsT) -> list[PlanT]:
        """The plans of a grid's cases; what several of them need may be read once."""
        return [self.prepare(config, options) for config in configs]

    def case_name(self, plan: PlanT) -> str:
        """What a case of a grid is called, besides its hash: for people."""
        return self.command

    def can_or_refuse(self, what: Can, instead: str) -> None:
        """Raises UsageError where this audit cannot do that; `instead`: what else can be done."""
        if what not in self.can:
            raise UsageError(f"`auditgap {self.command}` does not {what}; {instead}.")

    def audited(self, config: ConfigT) -> tuple[str, ...]:
        """The models of the config that are audited, as they were typed: all but a base."""
        return config.model_dump().get("models", ())

    def names(self, config: ConfigT, options: OptionsT) -> dict[str, str]:
        """What tables and reports call the audited models, by what was typed for them. Raises
        UsageError where `--name` does not give each of them a name of its own."""
        if not options.name:
            return {}
        models = list(dict.fromkeys(self.audited(config)))
        if len(options.name) != len(models) or len(set(options.name)) != len(models):
            raise UsageError(
                f"--name gives each of {', '.join(models)} a name of its own, in this order;"
                f" {', '.join(options.name)} came. For example: --name"
                f" {','.join('ABCDEFGH'[: len(models)])}"
            )
        return dict(zip(models, options.name, strict=True))

    def check(self, options: OptionsT) -> None:
        """Raises UsageError for options that ask for what this audit cannot do, and as `check_writable`
        for a folder into which nothing can be written: known now, not after the planning."""
        if options.executor == "ray":
            self.can_or_refuse(Can.RAY, "leave --executor out, and it runs on this machine")
        if Can.STORAGE not in self.can:
            from auditgap.store.remote import needs_disk

            needs_disk(options.out, f"`auditgap {self.command}`")
        if options.trackers:
            from auditgap.store.remote import needs_disk
            from auditgap.training.tracking import check_report_to

            check_report_to(options.report_to)
            needs_disk(options.out, "--report-to")
        if options.out:
            from auditgap.store import files, remote

            if not remote.is_url(options.out):
                files.check_writable(Path(options.out).absolute())

    def open(self, plan: PlanT, options: OptionsT, place: Place) -> RunFolder:
        """The run folder of a plan, made or resumed. Raises UsageError where another one's is."""
        from auditgap.store import RunFolder

        names = self.names(plan.config, options)
        store = RunFolder.open(
            place,
            config=self.question(plan),
            info={
                **self.facts(plan, options),
                **self.where(plan, place),
                **({"names": names} if names else {}),
            },
            break_lock=options.break_lock,
        )
        store.warnings += plan.warnings
        return store

    def begin(self, plan: PlanT, store: RunFolder) -> None:
        """Put into the folder what its cells need beside themselves; the folder is locked."""

    def sweep(
        self,
        plan: PlanT,
        options: OptionsT,
        store: RunFolder,
        progress: Callable[[], Progress] | None,
        after: Callable[[str, RunFolder], None] | None = None,
    ) -> Outcome:
        """Compute what is missing and write the tables and the report. `after` is called with the
        name of each phase that is over, and the folder."""
        from auditgap.audits.sweeps import run_phases

        def end(outcome: Outcome) -> None:
            if not outcome.failed:
                # all cells are finished: nothing in scratch is wanted any more
                store.forget()
            self.reduce(store, allow_raw=options.allow_raw)

        return run_phases(
            self.phases(plan),
            store,
            options,
            progress,
            begin=lambda: self.begin(plan, store),
            end=end,
            after=after,
        )

    def comparable(self) -> Comparable:
        """What of this audit `auditgap compare` sets side by side. For an audit with
        `Can.COMPARE`."""
        raise NotImplementedError(f"{self.name} says that it can {Can.COMPARE}, and not how.")

    def reading(self, store: RunFolder) -> tuple[Mapping[str, pd.DataFrame], dict[str, PartData]]:
        """The tables, and what a report reads of this audit, by its name, where the two have a
        table in common that is made once."""
        return self.tables(store), {}

    def reduce(self, store: RunFolder, *, allow_raw: bool = False) -> None:
        """Write the tables and the report anew."""
        from auditgap.audits import pages

        tables, read = self.reading(store)
        self.write_tables(store, tables)
        pages.write([store], allow_raw=allow_raw, read=read)

    def write_tables(self, store: RunFolder, tables: Mapping[str, pd.DataFrame]) -> None:
        """NAME.parquet, .csv and .md of each."""
        for name, table in tables.items():
            for form in ("parquet", "csv", "md"):
                store.write_table(f"{name}.{form}", table)

    def check_grading(self, folder: Place, grading: Grading) -> None:
        """Raises UsageError where nobody is named to grade, or a reward."""
        if grading.reward is not None:
            raise UsageError(
                f"`auditgap {self.command}` has verdicts and no rewards: auditgap grade DIR --judge"
                " keyword"
            )
        if grading.judge is None:
            raise UsageError("Grade by whom? For example: auditgap grade DIR --judge keyword")

    def grading_order(self, description: Document) -> int | None:
        """When a finished cell is judged again, those of 0 first; None: not at all."""
        return 0

    def graded(self, stored: Stored, given: Given, new: RunFolder) -> Sequence[object]:
        """A finished cell's rows with the new verdicts; `new` holds those of the orders before.
        For an audit with `Can.REGRADE`."""
        raise NotImplementedError(f"{self.name} says that it can {Can.REGRADE}, and not how.")


def run(
    audit: Audit[ConfigT, OptionsT, PlanT],
    config: ConfigT,
    options: OptionsT,
    *,
    plan: PlanT | None = None,
    progress: Callable[[], Progress] | None = None,
    after: Callable[[str, RunFolder], None] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of an audit, and write its tables and report. The same call again
    resumes. `after`: see `Audit.sweep`.

    Raises UsageError, Refused, Interrupted; cells that fail are in the outcome, with their causes.
    """
    audit.check(options)
    if plan is None:
        plan = audit.prepare(config, options)
    store = audit.open(plan, options, options.out or audit.folder(plan.config))
    return store, audit.sweep(plan, options, store, progress, after)
