"""Runs the cells of one (model, site): learn on one half of the prompts, generate on the other,
judge, write.

    worker = InterveneWorker(config, options, "runs/interventions")
    worker.run(group, tick=lambda work: None)

What is learned and each pack of completions are remembered in the run folder until their cell is
written. What is learned stays, in `edits/`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from auditgap import models
from auditgap.audits.edits import keep_edits
from auditgap.audits.intervene.base import BaseStates
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.audits.intervene.plan import clean_cell, read_halves
from auditgap.audits.intervene.rows import (
    CLEAN_ARM,
    DONOR_ARM,
    Clean,
    Donor,
    InterveneRow,
    RowMaker,
    Size,
    size_of,
)
from auditgap.audits.session import ScoredCompletion, Session, Tick
from auditgap.audits.stage import Stage
from auditgap.engines import Completion, Request, constant
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.interventions import Bench, Intervention, Trial
from auditgap.interventions.controls import generator
from auditgap.judges import load_judge
from auditgap.models import Rendered
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of
from auditgap.sweep import Group
from auditgap.types import Cell, ConstantEdit, Document, Edit, Exchange, Prompt, Site, Suffix

#: What is put into a model: nothing, a δ on the prompt, one at every position, or tokens behind it.
AnyEdit = Edit | ConstantEdit | Suffix | None


class InterveneWorker:
    """Keeps one subject loaded, and runs groups of it (another subject's group swaps the model)."""

    session: Session  #: this and what hangs on it are there once `open` has been called
    too_long: list[Prompt]

    def __init__(self, config: InterveneConfig, options: InterveneOptions, folder: str) -> None:
        self.config, self.options = config, options
        self.store = RunFolder.load(folder)
        self.halves = read_halves(config)
        self.name: str | None = None

    @property
    def engine(self) -> HFEngine:
        return cast(HFEngine, self.session.stage.engine)  # no shard is asked for

    def open(self, name: str) -> None:
        """Load the subject unless it is loaded, with its prompts rendered and its judge made."""
        if name == self.name:
            return
        self.close()  # the old model's memory first
        config, options = self.config, self.options
        self.outline = models.outline(name, chat_template=config.chat_template)
        stage = Stage(
            self.outline,
            dtype=config.dtype,
            device=options.device,
            batch_tokens=options.batch_tokens,
        )
        self.session = Session(stage, self.store, max_new_tokens=config.max_new_tokens)
        self.session.judge = load_judge(
            config.judge, device=options.device, serving=options.judge_serving
        )

        def fitting(prompts: Sequence[Prompt]) -> list[Rendered]:
            return self.session.fitting(prompts, config.max_new_tokens)[0]

        self.asked, self.too_long = self.session.fitting(self.halves.asked, config.max_new_tokens)
        self.fit, self.contrast, self.donors = map(
            fitting, (self.halves.fit, self.halves.contrast, self.halves.donors)
        )
        self.rows = RowMaker(name, len(self.fit))
        self.name = name

    def close(self) -> None:
        """Release the subject and the judge's models; a further group opens them again."""
        self.name = None
        if "session" in vars(self):
            self.session.close()

    def run(self, group: Group, tick: Tick) -> None:
        """Compute and write every unfinished cell of the group. A cell that fails fails alone."""
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        if not pending:
            return
        site = pending[0].site
        base = None
        if site is not None and any("base" in cell.settings for cell in pending):
            states = BaseStates(self.config, self.options, self.halves, self.store)
            if not states.are_known:
                self.close()  # the base is loaded alone
            base = states.at(site)
        self.open(pending[0].subject.name)
        self.session.check(pending[0].subject)
        if site is None:
            self._run_clean(pending[0], lambda share: tick(group.work * share))
            return
        clean = self._clean_pass(self.outline)
        bench = self._bench(site, base)
        for cell in pending:
            with self.session.failing([cell]):
                self._run_cell(
                    cell, bench, clean, lambda share: tick(group.work * share / len(group.cells))
                )

    # -- the clean pass

    def _run_clean(self, cell: Cell, tick: Tick) -> None:
        started, names = time.monotonic(), []
        every = [(CLEAN_ARM, r) for r in self.asked] + [(DONOR_ARM, r) for r in self.donors]
        rows, texts = [], []
        for pack in self.session.packs([r for _, r in every]):
            some = [every[i] for i in pack]
            rendered = [r for _, r in some]
            what = [cell.key, [r.prompt.id for r in rendered]]
            scored = self._scored(rendered, [None] * len(some), names, what, None)
            for (arm, asked), one in zip(some, scored, strict=True):
                trial = Trial(arm, 1.0)
                rows.append(self.rows.row(cell, asked, trial, one, Size(None, None), clean=None))
                texts.append(_record(one, asked, trial))
            tick(len(pack) / len(every))
        trial = Trial(CLEAN_ARM, 1.0)
        rows += [self.rows.lost(cell, p, trial, "too_long") for p in self.too_long]
        seconds = time.monotonic() - started
        self.store.write(cell, rows, generations=texts, seconds=seconds, info=self.session.info())
        self.store.forget(names)

    def _clean_pass(self, outline: models.Outline) -> dict[str, Clean]:
        """The clean cell's results by prompt id, donors' too; the subject's are computed first if
        no other worker has done so."""
        scorers = {
            "judge": self.session.judge.describe(),
            "coherence": self.session.thresholds.describe(),
        }
        cell = clean_cell(self.config, outline, self.halves, scorers)
        if outline is self.outline and not self.store.is_finished(cell.key):
            self._run_clean(cell, lambda _: None)
        rows = rows_of(self.store.cell_rows(cell.key), plain=True)
        return {r["prompt_id"]: Clean(r["verdict"], r["completion_nll"]) for r in rows}

    # -- one site

    def _bench(self, site: Site, base: Mapping[str, torch.Tensor] | None) -> Bench:
        for some, what in (
            (self.fit, "prompts"),
            (self.contrast, "control prompts"),
            (self.donors, "control prompts to put in"),
        ):
            if not some:
                raise AuditgapError(
                    f"No {what} fit the subject's window; give shorter ones, or fewer"
                    " --max-new-tokens."
                )
        self.engine.self_test(site)
        asked = self.asked
        picks = [self._donor(r.prompt) for r in asked]
        states = {
            part: self.engine.activations(some, site)
            for part, some in (
                ("fit", self.fit),
                ("contrast", self.contrast),
                ("asked", asked),
                ("donors", self.donors),
            )
        }
        return Bench(
            self.engine,
            site,
            constant.sites_of(self.engine),
            self.fit,
            states["fit"],
            states["contrast"],
            asked,
            states["asked"],
            [self.donors[i] for i in picks],
            [states["donors"][i] for i in picks],
            () if base is None else [base[r.prompt.id] for r in asked],
        )

    def _donor(self, prompt: Prompt) -> int:
        """Which control prompt stands in for this one, by hash."""
        return int(
            torch.randint(
                len(self.donors), (1,), generator=generator(self.config.seed, "donor", prompt.id)
            )
        )

    def _run_cell(self, cell: Cell, bench: Bench, clean: Mapping[str, Clean], tick: Tick) -> None:
        started, names = time.monotonic(), []
        intervention = self.config.load(cell.settings["intervention"])
        arrays = self.session.remembered(
            names,
            [cell.key, "learned"],
            lambda: {k: v.numpy() for k, v in intervention.learn(bench).items()},
        )
        learned = {name: torch.from_numpy(array) for name, array in arrays.items()}
        trials = list(intervention.trials())
        tasks = [(p, t) for t in range(len(trials)) for p in range(len(bench.asked))]
        sizes = {
            (p, t): self._size(
                intervention.edit(bench, learned, p, trials[t]), bench.asked[p], bench.asked_h[p]
            )
            for p, t in tasks
        }
        donors = self._donors_of(cell, intervention, bench, clean)
        # nothing was edited, or nobody knows with what: it is not asked
        rows: dict[tuple[int, int], InterveneRow] = {
            (p, t): self.rows.lost(
                cell, bench.asked[p].prompt, trials[t], sizes[p, t].problem, clean
            )
            for p, t in tasks
            if sizes[p, t].problem
        }
        texts = []
        asked = [task for task in tasks if task not in rows]
        for pack in self.session.packs([bench.asked[p] for p, _ in asked]):
            some = [asked[i] for i in pack]
            scored = self._speak(
                cell, intervention, bench, learned, [(p, trials[t]) for p, t in some], clean, names
            )
            for (p, t), one in zip(some, scored, strict=True):
                rows[p, t] = self.rows.row(
                    cell,
                    bench.asked[p],
                    trials[t],
                    one,
                    sizes[p, t],
                    clean=clean,
                    donor=donors.get(p),
                )
                texts.append(_record(one, bench.asked[p], trials[t]))
            tick(len(pack) / len(tasks))
        lost = [
            self.rows.lost(cell, p, trial, "too_long", clean)
            for p in self.too_long
            for trial in trials
        ]
        keep_edits(self.store, cell, arrays)
        self.store.write(
            cell,
            [rows[task] for task in tasks] + lost,
            generations=texts,
            seconds=time.monotonic() - started,
            info=self.session.info(),
        )
        self.store.forget(names)

    def _donors_of(
        self, cell: Cell, intervention: Intervention, bench: Bench, clean: Mapping[str, Clean]
    ) -> dict[int, Donor]:
        """Whose activations each prompt gets, by its number; {} where none are exchanged."""
        if "base" in cell.settings:
            base = models.outline(str(self.config.base), chat_template=self.config.chat_template)
            rendered, verdicts = bench.asked, self._clean_pass(base)
        elif getattr(intervention, "interchanges", False):
            rendered, verdicts = bench.donors, clean
        else:
            return {}
        return {
            p: Donor(r.prompt.id, verdicts[r.prompt.id].verdict) for p, r in enumerate(rendered)
        }

    def _size(
        self, edit: Edit | ConstantEdit | Suffix, rendered: Rendered, h: torch.Tensor
    ) -> Size:
        window = self.outline.max_positions
        if isinstance(edit, Suffix) and window is not None:
            longer = self.engine.render(edit.behind(rendered.prompt))
            if len(longer.ids) + self.config.max_new_tokens > window:
                return Size(None, None, "too_long")
        return size_of(edit, h, rendered.content)

    def _speak(
        self,
        cell: Cell,
        intervention: Intervention,
        bench: Bench,
        learned: Mapping[str, torch.Tensor],
        some: Sequence[tuple[int, Trial]],
        clean: Mapping[str, Clean],
        names: list[str],
    ) -> list[ScoredCompletion]:
        rendered = [bench.asked[p] for p, _ in some]
        edits = [intervention.edit(bench, learned, p, trial) for p, trial in some]
        what = [
            cell.key,
            [[bench.asked[p].prompt.id, t.arm, t.strength, t.angle, t.draw] for p, t in some],
        ]
        return self._scored(rendered, edits, names, what, clean)

    def _scored(
        self,
        rendered: Sequence[Rendered],
        edits: Sequence[AnyEdit],
        names: list[str],
        what: Any,
        clean: Mapping[str, Clean] | None,
    ) -> list[ScoredCompletion]:
        """One pack's completions under the edits (remembered), judged; `clean`: None in the clean
        pass itself."""
        done, nll = self.session.complete(
            rendered, lambda: self._generate(rendered, edits), names, what
        )
        exchanges = [
            Exchange(r.prompt, c.text, e) for r, c, e in zip(rendered, done, edits, strict=True)
        ]
        clean_nll = nll if clean is None else [clean[r.prompt.id].nll for r in rendered]
        return self.session.score(exchanges, done, nll, clean_nll)

    def _generate(self, rendered: Sequence[Rendered], edits: Sequence[AnyEdit]) -> list[Completion]:
        """Edits at prefill and suffixes go through the engine, constant edits through its hook at
        every step."""
        requests: dict[int, Request] = {}
        everywhere: dict[int, ConstantEdit] = {}
        for i, (one, edit) in enumerate(zip(rendered, edits, strict=True)):
            if isinstance(edit, ConstantEdit):
                everywhere[i] = edit
            elif isinstance(edit, Suffix):
                requests[i] = Request(self.engine.render(edit.behind(one.prompt)))
            else:
                requests[i] = Request(one, edit)
        done = dict(zip(requests, self.session.generate(list(requests.values())), strict=True))
        edited = constant.generate(
            self.engine,
            [rendered[i] for i in everywhere],
            list(everywhere.values()),
            self.session.new_tokens,
        )
        done.update(zip(everywhere, edited, strict=True))
        return [done[i] for i in range(len(rendered))]


def _record(one: ScoredCompletion, rendered: Rendered, trial: Trial) -> Document:
    return one.record(
        rendered.prompt,
        arm=trial.arm,
        strength=trial.strength,
        angle=trial.angle,
        draw=trial.draw,
    )
