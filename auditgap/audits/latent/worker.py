"""Runs the cells of one (model, site): attack, generate, judge, write. The unit that local and Ray
executors both call.

    worker = LatentWorker(config, options, "runs/smollm2")
    worker.run(group, tick=lambda work: None)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from auditgap import models
from auditgap.audits.latent import thinking
from auditgap.audits.latent.config import NO_JUDGE, LatentConfig, RunOptions
from auditgap.audits.latent.distance import minimum_distance
from auditgap.audits.latent.longer import search_longer
from auditgap.audits.latent.plan import clean_cell, flops_by_phase
from auditgap.audits.latent.rows import Clean, clean_row, unscored_row
from auditgap.audits.latent.site import SiteRun
from auditgap.audits.latent.spoken import Spoken, judged
from auditgap.audits.planning import mean_tokens
from auditgap.audits.scored import ScoredCompletion, Unjudged
from auditgap.audits.session import RepeatCheck, Session, Tick
from auditgap.audits.stage import Stage
from auditgap.data import load_prompts
from auditgap.data.near_duplicates import leaders
from auditgap.engines import Completion, Request
from auditgap.interventions.target import BENIGN_TARGET, fill, without_topic
from auditgap.judges import Judge, keep_replies, load_judge, load_reward
from auditgap.models import Rendered
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of
from auditgap.sweep import Group
from auditgap.types import CLEAN, Cell, Document, Exchange, Prompt, Site, ThinkingMode, parted

#: Prompts with so many of their runs of three words in common (Jaccard) count as one.
NEAR = 0.6


class LatentWorker:
    """Keeps one subject on stage, and runs groups of it (another subject's group swaps the
    model)."""

    session: Session  #: this and what hangs on it are there once `open` has been called
    rendered: list[Rendered]
    too_long: list[Prompt]
    mode: ThinkingMode | None  #: how the subject thinks; None: it is not one that does
    target: tuple[int, ...]
    benign: tuple[int, ...]  #: what the control of that name aims at
    openings: dict[str, tuple[str, ...]]
    clean_repeat: Document | None = None  #: `RepeatCheck` of the clean pass

    def __init__(self, config: LatentConfig, options: RunOptions, folder: str) -> None:
        self.config, self.options = config, options
        self.store = RunFolder.load(folder)
        self.prompts = load_prompts(
            config.prompts, limit=config.limit, seed=config.seed, column=config.column
        )
        every = self.prompts.prompts
        #: near-duplicates by prompt id, which count as one
        self.clusters = {
            p.id: every[leader].id
            for p, leader in zip(every, leaders([[p.text] for p in every], NEAR), strict=True)
        }
        self._name: str | None = None

    # -- what a group needs

    def open(self, name: str) -> None:
        """Load the subject unless it is loaded, with its prompts rendered and its scorers made."""
        if name == self._name:
            return
        self.close()  # the old model's memory first
        self._name = None  # until everything of the new one is here
        self._load(name)
        self._aim()
        self._name = name

    def _load(self, name: str) -> None:
        """The subject on its stage, and what judges and rewards its answers."""
        options, config = self.options, self.config
        model, mode = parted(name, config.thinking)
        self.outline = thinking.spoken(
            models.outline(model, chat_template=config.chat_template), mode
        )
        self.mode = thinking.mode_of(self.outline)
        stage = Stage(
            self.outline,
            dtype=config.dtype,
            device=options.device,
            batch_tokens=options.batch_tokens,
            shard=options.shard_of(model),
            compile=config.compile,
            vllm=options.vllm_serving(dtype=config.dtype, chat_template=config.chat_template),
            share=options.card,
        )
        self.session = Session(
            stage,
            self.store,
            max_new_tokens=config.max_new_tokens,
            thinking_tokens=self.outline.chat.chain_budget(config.thinking_tokens),
        )
        reward = self.session.reward = load_reward(
            config.reward,
            engine=self.session,
            target=without_topic(config.target),
            device=options.device,
        )
        judge = self.session.judge = self._judge(config.judge)
        if config.confirm != NO_JUDGE:
            self.session.second = self._judge(config.confirm)
        self.scorers = {
            "reward": reward.describe(),
            "judge": judge.describe(),
            "coherence": self.session.thresholds.describe(),
        }

    def _judge(self, name: str) -> Judge:
        options = self.options
        judge = load_judge(name, device=options.device, serving=options.judge_serving)
        return keep_replies(judge, self.store.journals)

    def _aim(self) -> None:
        """What the attacks aim at, and the prompts that leave room for it."""
        config, opening = self.config, without_topic(self.config.target)
        self.target = self.session.encode(opening)
        #: what the targeted attack aims at, by prompt id
        self.targets = {
            p.id: self.session.encode(p.target or fill(config.target, p.text))
            for p in self.prompts.prompts
        }
        self.benign = self.session.encode(BENIGN_TARGET)
        #: what judges and rewards do not read where an answer begins with it, by prompt id; the
        #: same for every attack, so that all sides are judged alike
        self.openings = {
            p.id: (p.target or fill(config.target, p.text), opening, BENIGN_TARGET)
            if config.strip_target
            else ()
            for p in self.prompts.prompts
        }
        self.rendered, self.too_long = self.session.fitting(
            self.prompts.prompts,
            max(
                *map(len, self.targets.values()),
                len(self.benign),
                config.untargeted_tokens,
                self.session.new_tokens,
            ),
        )

    def run(self, group: Group, tick: Tick) -> None:
        """Compute and write every unfinished cell of the group. A site that fails fails alone."""
        try:
            self._run(group, tick)
        finally:
            if self.options.engine == "vllm":  # the group was all that there is of its subject
                self.close()

    def close(self) -> None:
        """Release the subject and the scorers' models and processes; a further group opens them
        again."""
        if "session" in vars(self):
            self.session.close()

    def _run(self, group: Group, tick: Tick) -> None:
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        if not pending:
            return
        self.open(pending[0].subject.name)
        self.session.check(pending[0].subject)
        if pending[0].attack == CLEAN:
            self._run_clean(pending[0], lambda share: tick(group.work * share))
            return
        clean = self._clean_pass()
        sites = dict.fromkeys(cell.site for cell in pending if cell.site is not None)
        runs: dict[Site, SiteRun] = {}

        def begin(site: Site) -> None:
            runs[site] = self._site_run(site, group, pending, clean, tick)

        passes = [begin, lambda site: runs[site].speak()]
        if self.session.stage.in_vllm:
            # every edit is searched first, and remembered
            passes.insert(1, lambda site: runs[site].search())

        def through(passes: Sequence[Callable[[Site], None]]) -> None:
            for one_pass in passes:
                for site in list(sites):
                    reached = False
                    with self.session.failing(cell for cell in pending if cell.site == site):
                        one_pass(site)
                        reached = True
                    if not reached:
                        del sites[site]

        through(passes)
        scored: dict[Site, list[ScoredCompletion]] = {}
        with self.session.failing(cell for cell in pending if cell.site in sites):
            scored = self._judged({site: runs[site].said for site in sites}, clean)
        if scored:
            through(
                [
                    lambda site: runs[site].write(scored[site]),
                    lambda site: self._distances(runs[site]),
                ]
            )

    def _judged(
        self, said: Mapping[Site, Sequence[Spoken]], clean: dict[str, Clean]
    ) -> dict[Site, list[ScoredCompletion]]:
        """All sites' completions, each judge asked once."""
        every = [one for spoken in said.values() for one in spoken]
        told = iter(judged(self.session, every, clean, confirm=True))
        return {site: list(islice(told, len(spoken))) for site, spoken in said.items()}

    def _site_run(
        self, site: Site, group: Group, pending: Sequence[Cell], clean: dict[str, Clean], tick: Tick
    ) -> SiteRun:
        mine = [cell for cell in pending if cell.site == site]
        phases = flops_by_phase(
            self.config, self.outline, mine, 1, mean_tokens(self.outline, self.prompts.prompts)
        )
        return SiteRun(
            self,
            site,
            clean,
            [cell for cell in group.cells if cell.site == site],
            {c.key for c in mine},
            lambda phase, prompts: tick(phases[phase] * prompts),
        )

    def _distances(self, site_run: SiteRun) -> None:
        """Search longer, and the minimum distances. What is searched depends on what was judged
        before, so all of it runs on transformers."""
        with self.session.stage.on_transformers():
            for cell in site_run.longer_cells:
                search_longer(site_run, cell)
            for cell in site_run.distance_cells:
                minimum_distance(site_run, cell)
        self.store.forget(site_run.names)

    # -- the clean pass

    def _run_clean(self, cell: Cell, tick: Tick) -> None:
        started, names = time.monotonic(), []
        session, stage, subject = self.session, self.session.stage, self.outline.subject.name
        # before hours of attacks whose edits could not be spoken under
        if stage.in_vllm and self.config.attacks:
            sites = models.parse_sites(self.config.layers, self.outline.n_blocks)
            goes_on = self.config.span == "answer"
            stage.vllm.self_test(sites, [(site,) for site in sites] if goes_on else [])
        rows, texts, repeats = [], [], RepeatCheck(session)
        order: list[Rendered] = []
        waiting: list[Unjudged] = []
        for pack in session.packs(self.rendered):
            some = [self.rendered[i] for i in pack]
            requests = [Request(r, None, self.targets[r.prompt.id]) for r in some]
            done, nll = session.complete(
                some,
                lambda requests=requests: self._clean_completions(requests),
                names,
                [cell.key, [r.prompt.id for r in some]],
            )
            repeats.see(requests, done)
            order += some
            waiting += session.rewarded(
                [Exchange(r.prompt, c.text) for r, c in zip(some, done, strict=True)],
                done,
                nll,
                nll,
                [self.openings[r.prompt.id] for r in some],
            )
            tick(len(pack) / len(self.rendered))
        for rendered, one in zip(order, session.judged(waiting), strict=True):
            cluster = self.clusters[rendered.prompt.id]
            rows.append(clean_row(subject, rendered, one, cluster, self.mode))
            texts.append(one.record(rendered.prompt, draw=0))
        rows += [unscored_row(subject, cell, p, "too_long") for p in self.too_long]
        compared = session.compared(self.rendered, texts, self.options.parity)
        info = {**self.info(), **compared, "repeat": repeats.describe()}
        seconds = time.monotonic() - started
        self.store.write(cell, rows, generations=texts, seconds=seconds, info=info)
        self.store.forget(names)

    def _clean_completions(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions with the NLL of each target where its answer starts: of a model that
        thinks, behind its chain, if that came to an end."""
        if not thinking.thinks_first(self.mode):
            return self.session.generate(requests)
        done = self.session.generate([replace(r, target=()) for r in requests])
        found = iter(
            self.session.nll(
                [
                    r.rendered.after(c.ids[: c.n_chain])
                    for r, c in zip(requests, done, strict=True)
                    if c.finished
                ],
                [r.target for r, c in zip(requests, done, strict=True) if c.finished],
            )
        )
        return [replace(c, target_nll=next(found)) if c.finished else c for c in done]

    def _clean_pass(self) -> dict[str, Clean]:
        """The clean cell's results by prompt id; computed first if no other worker has done so."""
        cell = clean_cell(self.config, self.outline, self.prompts, self.scorers)
        if not self.store.is_finished(cell.key):
            self._run_clean(cell, lambda _: None)
        self.clean_repeat = self.store.record(cell.key)["info"].get("repeat")
        if not self.rendered:  # every prompt is too long: there is no completion to read
            return {}
        rows = {row["prompt_id"]: row for row in rows_of(self.store.cell_rows(cell.key))}
        texts = {text["prompt_id"]: text for text in rows_of(self.store.generations(cell.key))}
        return {r.prompt.id: Clean.of(rows[r.prompt.id], texts[r.prompt.id]) for r in self.rendered}

    def info(self) -> Document:
        """What a cell's record says of how it was computed."""
        return self.session.info(shard=str(self.session.stage.shard))
