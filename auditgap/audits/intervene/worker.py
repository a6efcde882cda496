"""Runs the cells of one (model, site): learn on one half of the prompts, generate on the other,
judge, write.

    worker = InterveneWorker(config, options, "runs/interventions")
    worker.run(group, tick=lambda work: None)

Each pack of completions is remembered in the run folder until its cell is written; what is learned
stays, in `edits/`, and comes first: it wants transformers, and generation may be in vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from itertools import islice
from typing import Any, cast

import torch

from auditgap import models
from auditgap.audits.edits import keep_edits
from auditgap.audits.intervene.base import BaseStates
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.audits.intervene.learned import AnyEdit, Learned
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
from auditgap.audits.intervene.speech import generate
from auditgap.audits.planning import chain_tokens
from auditgap.audits.scored import ScoredCompletion, Unjudged
from auditgap.audits.session import Session, Tick
from auditgap.audits.stage import Stage
from auditgap.engines import constant
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.interventions import Bench, Intervention, Trial
from auditgap.interventions.controls import generator
from auditgap.judges import keep_replies, load_judge
from auditgap.models import Rendered
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of
from auditgap.sweep import Group
from auditgap.types import Cell, ConstantEdit, Edit, Exchange, Prompt, Site, Suffix


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
        self.outline = models.outline(
            name, chat_template=config.chat_template, thinking=config.thinking
        )
        stage = Stage(
            self.outline,
            dtype=config.dtype,
            device=options.device,
            batch_tokens=options.batch_tokens,
            vllm=options.vllm_serving(dtype=config.dtype, chat_template=config.chat_template),
            share=options.card,
        )
        self.session = Session(
            stage,
            self.store,
            max_new_tokens=config.max_new_tokens,
            thinking_tokens=chain_tokens(config, self.outline.chat),
        )
        new = self.session.new_tokens
        judge = load_judge(config.judge, device=options.device, serving=options.judge_serving)
        self.session.judge = keep_replies(judge, self.store.journals)

        def fitting(prompts: Sequence[Prompt]) -> list[Rendered]:
            return self.session.fitting(prompts, new)[0]

        self.asked, self.too_long = self.session.fitting(self.halves.asked, new)
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
        try:
            self._run(group, pending, tick)
        finally:
            if self.options.engine == "vllm":  # its memory is wanted by whoever comes next
                self.close()

    def _run(self, group: Group, pending: Sequence[Cell], tick: Tick) -> None:
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
        learned: dict[str, Learned] = {}
        for cell in pending:
            with self.session.failing([cell]):
                learned[cell.key] = self._learn(cell, bench, clean)
        said: dict[str, list[Unjudged]] = {}
        for cell in pending:
            if cell.key in learned:
                with self.session.failing([cell]):
                    started = time.monotonic()
                    said[cell.key] = self._speak_all(
                        cell,
                        bench,
                        learned[cell.key],
                        clean,
                        lambda share: tick(group.work * share / len(group.cells)),
                    )
                    seconds = learned[cell.key].seconds + time.monotonic() - started
                    learned[cell.key] = replace(learned[cell.key], seconds=seconds)
        spoken = [cell for cell in pending if cell.key in said]
        with self.session.failing(spoken):
            told = iter(self.session.judged([one for c in spoken for one in said[c.key]]))
            scored = {cell.key: list(islice(told, len(said[cell.key]))) for cell in spoken}
            for cell in spoken:
                with self.session.failing([cell]):
                    self._write(cell, bench, learned[cell.key], scored[cell.key], clean)

    # -- the clean pass

    def _run_clean(self, cell: Cell, tick: Tick) -> None:
        started, names = time.monotonic(), []
        self._test_vllm()
        every = [(CLEAN_ARM, r) for r in self.asked] + [(DONOR_ARM, r) for r in self.donors]
        rows, texts = [], []
        order: list[tuple[str, Rendered]] = []
        waiting: list[Unjudged] = []
        for pack in self.session.packs([r for _, r in every]):
            some = [every[i] for i in pack]
            rendered = [r for _, r in some]
            what = [cell.key, [r.prompt.id for r in rendered]]
            waiting += self._said(rendered, [None] * len(some), names, what, None)
            order += some
            tick(len(pack) / len(every))
        for (arm, asked), one in zip(order, self.session.judged(waiting), strict=True):
            trial = Trial(arm, 1.0)
            rows.append(self.rows.row(cell, asked, trial, one, Size(None, None), clean=None))
            texts.append(one.record(asked.prompt, **asdict(trial)))
        trial = Trial(CLEAN_ARM, 1.0)
        rows += [self.rows.lost(cell, p, trial, "too_long") for p in self.too_long]
        compared = self.session.compared(self.asked, texts, self.options.parity)
        seconds, info = time.monotonic() - started, self.session.info(**compared)
        self.store.write(cell, rows, generations=texts, seconds=seconds, info=info)
        self.store.forget(names)

    def _test_vllm(self) -> None:
        """Prove that vLLM can be edited, before anything is searched that could not be spoken
        under."""
        if self.session.stage.in_vllm:
            sites = models.parse_sites(self.config.layers, self.outline.n_blocks)
            self.session.stage.vllm.self_test(sites, [(site,) for site in sites])

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

    def _learn(self, cell: Cell, bench: Bench, clean: Mapping[str, Clean]) -> Learned:
        """What wants the subject on transformers: what is fitted or searched, and how large its
        edits are."""
        started, names = time.monotonic(), []
        intervention = self.config.load(cell.settings["intervention"])
        arrays = self.session.remembered(
            names,
            [cell.key, "learned"],
            lambda: {k: v.numpy() for k, v in intervention.learn(bench).items()},
        )
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        trials = list(intervention.trials())
        sizes: dict[tuple[int, int], Size] = {}
        edits: dict[tuple[int, int], ConstantEdit | Suffix] = {}
        for t in range(len(trials)):
            for p, rendered in enumerate(bench.asked):
                edit = intervention.edit(bench, found, p, trials[t])
                sizes[p, t] = self._size(edit, rendered, bench.asked_h[p])
                if not isinstance(edit, Edit):  # large, and made again of what is there
                    edits[p, t] = edit
        donors = self._donors_of(cell, intervention, bench, clean)
        seconds = time.monotonic() - started
        return Learned(intervention, arrays, found, trials, sizes, edits, donors, names, seconds)

    def _speak_all(
        self, cell: Cell, bench: Bench, it: Learned, clean: Mapping[str, Clean], tick: Tick
    ) -> list[Unjudged]:
        """The cell's completions, pack by pack, in the order of `it.asked`."""
        asked = it.asked
        waiting: dict[tuple[int, int], Unjudged] = {}
        for pack in self.session.packs([bench.asked[p] for p, _ in asked]):
            some = [asked[i] for i in pack]
            waiting.update(zip(some, self._speak(cell, bench, it, some, clean), strict=True))
            tick(len(pack) / len(it.sizes))
        return [waiting[task] for task in asked]

    def _write(
        self,
        cell: Cell,
        bench: Bench,
        it: Learned,
        scored: Sequence[ScoredCompletion],
        clean: Mapping[str, Clean],
    ) -> None:
        started = time.monotonic()
        trials, tasks = it.trials, list(it.sizes)
        rows: dict[tuple[int, int], InterveneRow] = {
            (p, t): self.rows.lost(cell, bench.asked[p].prompt, trials[t], size.problem, clean)
            for (p, t), size in it.sizes.items()
            if size.problem
        }
        texts = []
        for (p, t), one in zip(it.asked, scored, strict=True):
            rows[p, t] = self.rows.row(
                cell,
                bench.asked[p],
                trials[t],
                one,
                it.sizes[p, t],
                clean=clean,
                donor=it.donors.get(p),
            )
            texts.append(one.record(bench.asked[p].prompt, **asdict(trials[t])))
        lost = [
            self.rows.lost(cell, p, trial, "too_long", clean)
            for p in self.too_long
            for trial in trials
        ]
        keep_edits(self.store, cell, it.arrays)
        self.store.write(
            cell,
            [rows[task] for task in tasks] + lost,
            generations=texts,
            seconds=it.seconds + time.monotonic() - started,
            info=self.session.info(),
        )
        self.store.forget(it.names)

    def _donors_of(
        self, cell: Cell, intervention: Intervention, bench: Bench, clean: Mapping[str, Clean]
    ) -> dict[int, Donor]:
        """Whose activations each prompt gets, by its number; {} where none are exchanged."""
        if "base" in cell.settings:
            base = models.outline(
                str(self.config.base),
                chat_template=self.config.chat_template,
                thinking=self.config.thinking,
            )
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
            longer = self.session.render(edit.behind(rendered.prompt))
            if len(longer.ids) + self.session.new_tokens > window:
                return Size(None, None, "too_long")
        return size_of(edit, h, rendered.content)

    def _speak(
        self,
        cell: Cell,
        bench: Bench,
        it: Learned,
        some: Sequence[tuple[int, int]],
        clean: Mapping[str, Clean],
    ) -> list[Unjudged]:
        rendered = [bench.asked[p] for p, _ in some]
        edits: list[AnyEdit] = [
            it.edits.get((p, t)) or it.intervention.edit(bench, it.found, p, it.trials[t])
            for p, t in some
        ]
        what = [cell.key, [[bench.asked[p].prompt.id, *astuple(it.trials[t])] for p, t in some]]
        return self._said(rendered, edits, it.names, what, clean)

    def _said(
        self,
        rendered: Sequence[Rendered],
        edits: Sequence[AnyEdit],
        names: list[str],
        what: Any,
        clean: Mapping[str, Clean] | None,
    ) -> list[Unjudged]:
        """One pack's completions under the edits (remembered); `clean`: None in the clean pass."""
        done, nll = self.session.complete(
            rendered, lambda: generate(self.session, rendered, edits), names, what
        )
        exchanges = [
            Exchange(r.prompt, c.text, e) for r, c, e in zip(rendered, done, edits, strict=True)
        ]
        clean_nll = nll if clean is None else [clean[r.prompt.id].nll for r in rendered]
        return self.session.rewarded(exchanges, done, nll, clean_nll)
