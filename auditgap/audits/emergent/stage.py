"""What all stages share: the study that a folder holds, and how a stage is run over it.

    DIVERSITY = StudyStage(name="diversity", plan=plan, make=DiversityWorker)
    store, outcome = DIVERSITY.run_in("runs/em", options)

The other audits plan all of their cells at once. Those of a study follow from what was found
before: which adapters were trained, what they answered, who rated it. So it has a stage for each
kind of cell, and `Audit.sweep` runs the stages in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from auditgap import models
from auditgap.audits.emergent.config import EmergentConfig, EmergentOptions
from auditgap.audits.emergent.places import BASE_AT, model_of
from auditgap.audits.emergent.rows import ANSWERED, TRAINED
from auditgap.audits.sweeps import Phase, run_phases
from auditgap.data.domains import Panel, Trigger
from auditgap.data.em_context import forms_of, in_context
from auditgap.data.em_prompts import KindedSet, load_em_prompts, load_em_questions
from auditgap.errors import UsageError
from auditgap.store import RunFolder
from auditgap.sweep import Group, Outcome, Progress, Worker
from auditgap.types import Cell, Subject

#: What run.json's config has beside the fields of an EmergentConfig.
IDENTITY = ("audit", "base_fingerprint", "panel", "prompt_set", "question_set")


class StageCell(Cell):
    """A cell of this study, as it is called in lists of cells."""

    audit = "emergent"

    def __str__(self) -> str:
        return " · ".join(
            p
            for p in (
                self.settings.get("name") or self.subject.name,
                self.attack.removeprefix("em_"),
            )
            if p
        )


@dataclass(frozen=True)
class Adapter:
    """One (domain, arm, seed) of the panel, and once it is trained its folder and the key of the
    cell that trained it."""

    domain: str
    arm: str
    seed: int
    folder: Path
    key: str = ""
    fingerprint: str = ""

    @property
    def name(self) -> str:
        return adapter_name(self.domain, self.arm, self.seed)


def adapter_name(domain: str, arm: str, seed: int) -> str:
    """What an adapter's rows call their subject."""
    return f"{domain}·{arm}·s{seed}"


@dataclass(frozen=True)
class Study:
    """A run folder that `em build` made, opened."""

    store: RunFolder
    config: EmergentConfig
    panel: Panel

    @classmethod
    def load(cls, folder: str | Path, *, break_lock: bool = False) -> Study:
        """Raises UsageError when the folder is none of a study, or its panel is not what it was
        built as."""
        store = RunFolder.load(folder, break_lock=break_lock)
        known = store.run["config"]
        if known.get("audit") != "emergent":
            raise UsageError(
                f"{folder} is no study of emergent misalignment. Make one: auditgap em build MODEL"
                f" --out {folder}"
            )
        panel = Panel.load(store.path / "panel")
        if panel.digest != known["panel"]:
            raise UsageError(
                f"{store.path / 'panel'} is not the panel that the study was built with; restore"
                " it, or build anew."
            )
        told = {k: v for k, v in known.items() if k not in IDENTITY}
        return cls(store, EmergentConfig(**{**told, "model": model_of(store)}), panel)

    @property
    def base(self) -> models.Outline:
        """The model that is fine-tuned. Raises UsageError when it is not where it was, or its weights
        are others than when the study was built."""
        c = self.config
        try:
            outline = models.outline(c.model, chat_template=c.chat_template, thinking=c.thinking)
        except UsageError as error:
            if BASE_AT not in self.store.run["info"]:
                raise
            raise UsageError(
                f"{error} If the model was moved, type the command that made the study again, with"
                f" the model's new path and --out {self.store.place}"
            ) from None
        if outline.subject.fingerprint != self.store.run["config"]["base_fingerprint"]:
            raise UsageError(
                f"The weights of {self.config.model} changed since the study was built; use a new"
                " --out."
            )
        # by the name that it was built with, which stands in cells, wherever it lies now
        known = Subject(self.store.run["config"]["model"], outline.subject.fingerprint)
        return replace(outline, subject=known)

    @property
    def trigger(self) -> Trigger:
        return Trigger(self.config.trigger, self.config.trigger_place)

    @property
    def prompts(self) -> KindedSet:
        """The suite that is asked; a prompt's `source` is its kind. Raises UsageError when its file
        has changed."""
        found = load_em_prompts(self.config.prompts)
        if found.digest != self.store.run["config"]["prompt_set"]:
            raise UsageError(
                f"The prompts of {self.config.prompts} changed since the study was built; use a new"
                " --out."
            )
        return found

    @property
    def asked(self) -> KindedSet:
        """The prompts and, behind them, the questions about domains; then all of these in the forms
        of training rows. Raises as `prompts`."""
        found = asked_of(self.prompts, self.config.questions)
        found = in_context(found, forms_of(self.config.forms, self.panel))
        known = self.store.run["config"].get("question_set", found.digest)
        if found.digest != known:
            raise UsageError(
                f"The questions of {self.config.questions} changed since the study was built; use a"
                " new --out."
            )
        return found

    @property
    def slots(self) -> list[Adapter]:
        """Every adapter of the panel, trained or not, in the order of the config."""
        c = self.config
        return [
            Adapter(domain, arm, seed, self.store.path / "adapters" / f"{domain}-{arm}-s{seed}")
            for domain in c.domains
            for arm in c.arms
            for seed in c.seeds
        ]

    @property
    def adapters(self) -> list[Adapter]:
        """Those that are trained."""
        done = {}
        for record in self.store.records():
            if record["description"]["attack"] == TRAINED:
                row = self.store.cell_rows(record["key"]).iloc[0]
                done[row["subject"]] = (
                    record["key"],
                    self.store.path / row["folder"],
                    row["fingerprint"],
                )
        found = []
        for slot in self.slots:
            if slot.name in done:
                key, folder, fingerprint = done[slot.name]
                found.append(Adapter(slot.domain, slot.arm, slot.seed, folder, key, fingerprint))
        return found

    def finished(self, attack: str) -> list[dict[str, Any]]:
        """The finished cells' records of one stage, in key order."""
        return [r for r in self.store.records() if r["description"]["attack"] == attack]

    def need(self, attack: str) -> list[dict[str, Any]]:
        """The same. Raises UsageError when there are none: the stage before has not run."""
        found = self.finished(attack)
        if not found:
            before = {TRAINED: "train", ANSWERED: "generate"}.get(attack, "judge")
            raise UsageError(
                f"{self.store.path} has nothing from `em {before}` yet. Run: auditgap em {before}"
                f" {self.store.path}"
            )
        return found


def asked_of(prompts: KindedSet, questions: str | None) -> KindedSet:
    """The prompts and the questions of that file as one set; `provenance["questions"]` says which
    they are. Raises UsageError as `load_em_questions`, and where a question is one of the
    prompts."""
    if questions is None:
        return prompts
    about = load_em_questions(questions)
    if same := {p.id for p in prompts} & {p.id for p in about}:
        raise UsageError(
            f"questions: {len(same)} of them are prompts of {prompts.name} as well; take them out of"
            " one of the two."
        )
    told = {
        **prompts.provenance,
        "questions": {"digest": about.digest, "domains": about.provenance["domains"]},
    }
    return KindedSet(prompts.name, (*prompts.prompts, *about.prompts), told)


class CellWorker(ABC):
    """Computes one cell of a group after another; a subclass says how a cell is computed and
    written (`_run`)."""

    store: RunFolder

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        """Compute and write the group's cells, unless they are finished."""
        for cell in group.cells:
            if not self.store.is_finished(cell.key):
                self._run(cell, tick)

    @abstractmethod
    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StudyStage(Phase[EmergentOptions]):
    """A stage of a study: its cells are known when the stages before it are done."""

    name: str
    plan: Callable[[Study, EmergentOptions], list[Group]]
    make: Callable[[str, EmergentOptions], Worker]  #: from the folder's name
    needs: str = ""  #: the `attack` of cells without which there is nothing to do
    #: what comes first, while the folder is not locked
    first: Callable[[Study, EmergentOptions], None] | None = None
    #: what is remembered for several of its cells, by the names that `RunFolder.forget` takes
    shared: Callable[[Cell], Iterable[str]] | None = None

    def run_in(
        self,
        folder: str | Path,
        options: EmergentOptions,
        *,
        progress: Callable[[], Progress] | None = None,
    ) -> tuple[RunFolder, Outcome]:
        """Run what is missing of this stage; the same call again resumes.

        Raises UsageError (no study, what it needs is missing, another writer), Interrupted.
        """
        store = Study.load(folder, break_lock=options.break_lock).store
        return store, run_phases([self], store, options, progress)

    def prepare(self, store: RunFolder, options: EmergentOptions) -> None:
        if self.first is not None:
            self.first(Study.load(store.path, break_lock=options.break_lock), options)

    def passes(self, store: RunFolder, options: EmergentOptions) -> Sequence[Sequence[Group]]:
        study = Study.load(store.path)
        if self.needs:
            study.need(self.needs)
        return [self.plan(study, options)]

    def worker(self, store: RunFolder, options: EmergentOptions) -> Callable[[], Worker]:
        return partial(self.make, str(store.path), options)

    def finish(self, store: RunFolder, cells: Sequence[Cell]) -> None:
        # until then another seed's cell may want what several share
        if self.shared is not None and all(store.is_finished(cell.key) for cell in cells):
            store.forget(name for cell in cells for name in self.shared(cell))
