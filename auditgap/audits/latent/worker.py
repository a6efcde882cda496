"""Runs the cells of one (model, site): attack, speak, judge, write. The unit that local and Ray
executors both call.

    worker = LatentWorker(config, options, "runs/smollm2")
    worker.run(group, tick=lambda work: None)

Work goes in packs, and each pack's edits and completions are remembered in the run folder until
their cells are written: a kill costs the pack in flight, and a resumed run gives the numbers of an
unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from auditgap import models
from auditgap.audits.edits import keep_edits
from auditgap.audits.latent.config import LatentConfig, RunOptions
from auditgap.audits.latent.plan import (
    DISTANCE,
    clean_cell,
    distance_evaluations,
    flops_by_phase,
    mean_tokens,
)
from auditgap.audits.latent.rows import Clean, clean_row, edited_row, unscored_row
from auditgap.audits.latent.stage import Stage
from auditgap.data import load_prompts
from auditgap.engines import Completion, Reply, Request
from auditgap.engines.parity import parity, sample
from auditgap.errors import AuditgapError, Interrupted
from auditgap.interventions import controls
from auditgap.interventions.distance import search
from auditgap.interventions.pgd import Ball, Goal, attack
from auditgap.judges import Judge, Reward, close_judge, load_judge, load_reward
from auditgap.judges.coherence import Thresholds, is_coherent
from auditgap.models import Rendered
from auditgap.store import DiskError, RunFolder
from auditgap.store.tables import rows_of
from auditgap.sweep import Group
from auditgap.sweep.state import cause_of
from auditgap.types import (
    CLEAN,
    Cell,
    DistanceRow,
    Edit,
    Exchange,
    Label,
    Prompt,
    Score,
    Site,
    Verdict,
    digest,
)

Tick = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class ScoredCompletion:
    """One completion with all that was asked of it."""

    completion: Completion
    completion_nll: float | None
    verdict: Verdict
    score: Score
    coherent: bool | None


@dataclass(frozen=True, eq=False)
class GenerationTask:
    """A completion to be had: prompt number p under an attack, at budget number e, draw d."""

    cell: Cell
    p: int
    e: int
    d: int


class LatentWorker:
    """Keeps one subject on stage, and runs groups of it (another subject's group swaps the model).

    It renders, encodes and scores like an engine, for the rewards that ask the subject itself.
    """

    stage: Stage  #: this and the scorers are there once `open` has been called
    judge: Judge
    reward: Reward

    def __init__(self, config: LatentConfig, options: RunOptions, folder: str) -> None:
        self.config, self.options = config, options
        self.store = RunFolder.load(folder)
        self.prompts = load_prompts(
            config.prompts, limit=config.limit, seed=config.seed, column=config.column
        )
        self.thresholds = Thresholds()
        self._name: str | None = None

    # -- what a group needs
    # --------------------------------------------------------------------------------------------

    def open(self, name: str) -> None:
        """Load the subject unless it is loaded, with its prompts rendered and its scorers made."""
        if name == self._name:
            return
        self.close()  # the old model's memory first
        self._name = None  # until everything of the new one is here
        options, config = self.options, self.config
        self.outline = models.outline(name, chat_template=config.chat_template)
        self.stage = Stage(self.outline, config, options)
        self.target = self.encode(config.target)
        self.reward = load_reward(
            config.reward, engine=self, target=config.target, device=options.device
        )
        self.judge = load_judge(config.judge, device=options.device, serving=options.judge_serving)
        self.scorers = {
            "reward": self.reward.describe(),
            "judge": self.judge.describe(),
            "coherence": self.thresholds.describe(),
        }
        self.rendered: list[Rendered] = []
        self.too_long: list[Prompt] = []
        window = self.outline.max_positions
        for prompt in self.prompts.prompts:
            rendered = self.render(prompt)
            needed = len(rendered.ids) + max(
                len(self.target), config.untargeted_tokens, config.max_new_tokens
            )
            if window is not None and needed > window:
                self.too_long.append(prompt)
            else:
                self.rendered.append(rendered)
        self._name = name

    def run(self, group: Group, tick: Tick) -> None:
        """Compute and write every unfinished cell of the group. A site that fails fails alone."""
        try:
            self._run(group, tick)
        finally:
            if self.options.engine == "vllm":  # the group was all that there is of its subject
                self.close()

    def close(self) -> None:
        """Let go of the subject and the scorers' models, and of their processes; a further group
        opens them again."""
        for name in ("stage", "judge", "reward"):
            close_judge(vars(self).get(name))

    def _run(self, group: Group, tick: Tick) -> None:
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        if not pending:
            return
        self.open(pending[0].subject.name)
        if pending[0].subject.fingerprint != self.outline.subject.fingerprint:
            raise AuditgapError(
                f"The weights of {pending[0].subject.name} changed since the run was planned; use a"
                " new --out."
            )
        if pending[0].attack == CLEAN:
            self._run_clean(pending[0], lambda share: tick(group.work * share))
            return
        clean = self._clean_pass()
        sites = dict.fromkeys(cell.site for cell in pending)
        runs: dict[Site, SiteRun] = {}

        def begin(site: Site) -> None:
            runs[site] = self._site_run(site, group, pending, clean, tick)

        passes = [begin, lambda site: runs[site].speak(), lambda site: runs[site].distances()]
        if self.stage.in_vllm:
            # every edit is searched first, and remembered
            passes.insert(1, lambda site: runs[site].search())
        for one_pass in passes:
            for site in list(sites):
                try:
                    one_pass(site)
                except (DiskError, Interrupted):
                    raise
                except Exception as error:
                    del sites[site]
                    for cell in pending:
                        if cell.site == site:
                            self.store.fail(cell, cause_of(error))

    def _site_run(
        self, site: Site, group: Group, pending: Sequence[Cell], clean: dict[str, Clean], tick: Tick
    ) -> SiteRun:
        cells = [cell for cell in group.cells if cell.site == site]
        mine = [cell for cell in pending if cell.site == site]
        phases = flops_by_phase(
            self.config, self.outline, mine, 1, mean_tokens(self.outline, self.prompts)
        )
        return SiteRun(
            self,
            site,
            clean,
            cells,
            {c.key for c in mine},
            lambda phase, prompts: tick(phases[phase] * prompts),
        )

    # -- as an engine
    # --------------------------------------------------------------------------------------------------

    def render(self, prompt: Prompt) -> Rendered:
        return self.outline.chat.render(prompt)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.outline.chat.encode(text)

    def nll(self, *asked: Any) -> list[float | None]:
        return self.stage.speaker.nll(*asked)

    def remembered(
        self, names: list[str], what: Any, compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """`compute()` once: kept in the run folder under a name made of `what`, which is added to
        `names`."""
        name = digest(what)
        names.append(name)
        return self.store.remember(name, compute)

    # -- speaking and scoring
    # ------------------------------------------------------------------------------------------

    def speak(
        self, requests: Sequence[Request], names: list[str], what: Any
    ) -> tuple[list[Completion], list[float | None]]:
        """Completions of one pack and their NLL under the clean model, remembered."""

        def compute() -> dict[str, np.ndarray]:
            done = self.stage.speaker.generate(requests, self.config.max_new_tokens)
            nll = self.stage.speaker.nll([r.rendered for r in requests], [c.ids for c in done])
            return _pack_completions(done, nll)

        return _unpack_completions(
            self.remembered(names, what, compute), self.outline.chat.tokenizer
        )

    def score(
        self,
        requests: Sequence[Request],
        done: Sequence[Completion],
        nll: Sequence[float | None],
        clean_nll: Sequence[float | None],
    ) -> list[ScoredCompletion]:
        """Judge and reward every completion. What the coherence gate fails is `broken`, whatever
        the judge says."""
        exchanges = [
            Exchange(r.rendered.prompt, c.text, r.edit) for r, c in zip(requests, done, strict=True)
        ]
        verdicts, scores = self.judge.judge(exchanges), self.reward.score(exchanges)
        spoken = []
        for completion, own, clean, verdict, score in zip(
            done, nll, clean_nll, verdicts, scores, strict=True
        ):
            coherent, reason = is_coherent(completion.ids, own, clean, thresholds=self.thresholds)
            if not completion.finite:
                coherent, verdict, score = (
                    None,
                    Verdict(Label.UNSCORED, "nonfinite_logits"),
                    Score(None, "nonfinite_logits"),
                )
            elif coherent is False:
                verdict = Verdict(Label.BROKEN, reason)
            spoken.append(ScoredCompletion(completion, own, verdict, score, coherent))
        return spoken

    # -- the clean pass
    # ------------------------------------------------------------------------------------------------

    def _run_clean(self, cell: Cell, tick: Tick) -> None:
        started, names = time.monotonic(), []
        # before hours of attacks whose edits could not be spoken under
        if self.stage.in_vllm and self.config.attacks:
            self.stage.vllm.self_test(models.parse_sites(self.config.layers, self.outline.n_blocks))
        rows, texts = [], []
        requests = [Request(r, None, self.target) for r in self.rendered]
        for pack in self.stage.speaking_packs(
            [len(r.ids) + self.config.max_new_tokens for r in self.rendered]
        ):
            some = [requests[i] for i in pack]
            done, nll = self.speak(some, names, [cell.key, [r.rendered.prompt.id for r in some]])
            for request, spoken in zip(some, self.score(some, done, nll, nll), strict=True):
                rows.append(clean_row(self.outline.subject.name, request.rendered, spoken))
                texts.append(_generation(request, spoken, 0))
            tick(len(pack) / len(requests))
        rows += [
            unscored_row(self.outline.subject.name, cell, p, "too_long") for p in self.too_long
        ]
        info = {**self._info(), **self._compared(texts)}
        self.store.write(
            cell, rows, generations=texts, seconds=time.monotonic() - started, info=info
        )
        self.store.forget(names)

    def _compared(self, texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """How far vLLM's clean text is that of transformers, for the record; {} when nothing stands
        in for it."""
        if not (self.stage.in_vllm and self.options.parity and self.rendered):
            return {}
        some = sample(self.rendered, self.options.parity)
        said = {text["prompt_id"]: Reply(text["completion"], tuple(text["ids"])) for text in texts}
        plain = self.stage.engine.generate([Request(r) for r in some], self.config.max_new_tokens)
        found = parity([said[r.prompt.id] for r in some], [Reply(c.text, c.ids) for c in plain])
        return {"parity": found.describe()}

    def _clean_pass(self) -> dict[str, Clean]:
        """The clean cell's results by prompt id; computed first if no other worker has done so."""
        cell = clean_cell(self.config, self.outline, self.prompts, self.scorers)
        if not self.store.is_finished(cell.key):
            self._run_clean(cell, lambda _: None)
        if not self.rendered:  # every prompt is too long: there is no completion to read
            return {}
        rows = {row["prompt_id"]: row for row in rows_of(self.store.cell_rows(cell.key))}
        ids = {
            text["prompt_id"]: tuple(map(int, text["ids"]))
            for text in rows_of(self.store.generations(cell.key))
        }
        return {r.prompt.id: Clean.of(rows[r.prompt.id], ids[r.prompt.id]) for r in self.rendered}

    def _info(self) -> dict[str, Any]:
        return {
            "device": self.stage.device,
            "dtype": self.config.dtype,
            "threads": torch.get_num_threads(),
            "engine": self.options.engine,
            "shard": str(self.stage.shard),
        }


class SiteRun:
    """The attacks at one site of the worker's subject, over all prompts: `search`, `speak`,
    `distances`.

    `search` only remembers the edits, so that speech can follow in a second pass; `speak` searches
    what it does not find.
    """

    def __init__(
        self,
        worker: LatentWorker,
        site: Site,
        clean: dict[str, Clean],
        cells: Sequence[Cell],
        pending: set[str],
        tick: Callable[[str, float], None],
    ) -> None:
        self.worker, self.site, self.clean, self.pending, self._tick = (
            worker,
            site,
            clean,
            pending,
            tick,
        )
        self.cells = [cell for cell in cells if cell.attack != DISTANCE]
        self.distance_cells = [
            cell for cell in cells if cell.attack == DISTANCE and cell.key in pending
        ]
        self.config, self.stage, self.rendered = worker.config, worker.stage, worker.rendered
        self.key = [worker.outline.subject.fingerprint, site.layer_index, worker.prompts.digest]
        self.names: list[str] = []  #: of what is remembered until the cells are written
        self.donors = controls.donors([len(r.ids) for r in self.rendered])
        # attack -> [prompt][budget] -> δ [T, D]
        self.found: dict[str, list[list[torch.Tensor]]] = {}
        self.broken_gradient: dict[str, set[tuple[int, int]]] = {
            "targeted": set(),
            "untargeted": set(),
        }
        self._searched: set[str] = set()
        self._measure()
        packed = self._packs(self.cells)
        if not any(worker.store.remembers(digest(self._what(tasks))) for tasks in packed):
            # else: a kill came while the group's cells were being written, and the packs of all of
            # them are remembered
            self.cells = [cell for cell in self.cells if cell.key in pending]

    def _measure(self) -> None:
        """Norms and radii of every prompt's clean activations at the site."""

        def compute() -> dict[str, np.ndarray]:
            self.stage.engine.self_test(self.site)
            activations = zip(
                self.stage.engine.activations(self.rendered, self.site), self.rendered, strict=True
            )
            return {
                "balls": (
                    np.array([astuple(Ball.of(h, r.content)) for h, r in activations]).reshape(
                        -1, 3
                    )
                )
            }

        what = [*self.key, "balls", self.config.dtype, [r.prompt.id for r in self.rendered]]
        found = self.worker.remembered(self.names, what, compute)
        self.balls = [Ball(*numbers) for numbers in found["balls"].tolist()]
        # no radius where the activations are not numbers: such a prompt runs along with an edit of
        # 0, and is unscored
        self.radii = [
            tuple(b.radius(budget) if b.finite else 0.0 for budget in self.config.budgets)
            for b in self.balls
        ]

    def search(self) -> None:
        """Find the edits that the cells need and remember them, holding none."""
        self._find()
        self.found.clear()

    def _find(self) -> None:
        wanted = {cell.attack for cell in self.cells}
        if wanted & {"targeted", "random_matched", "shuffled"}:
            self._search("targeted")
        if "untargeted" in wanted:
            self._search("untargeted")

    def speak(self) -> None:
        """Speak under all edits in packs of like length, and write the pending cells."""
        if not self.cells:
            return
        started = time.monotonic()
        self._find()
        packed = self._packs(self.cells)
        rows: dict[str, list] = {cell.key: [] for cell in self.cells}
        texts: dict[str, list] = {cell.key: [] for cell in self.cells}
        for tasks in packed:
            for task, request, spoken in self._speak(tasks, self.names):
                rows[task.cell.key].append(self._row(task, request, spoken))
                texts[task.cell.key].append(_generation(request, spoken, task.d))
            self._tick("speak", len(tasks) * len(self.rendered) / sum(map(len, packed)))
        seconds = (time.monotonic() - started) / len(self.cells)
        for cell in self.cells:
            if cell.key in self.pending:
                if self.worker.options.keep_edits and cell.attack in self.found:
                    e = self.config.budgets.index(cell.budget)
                    deltas = zip(self.rendered, self.found[cell.attack], strict=True)
                    keep_edits(
                        self.worker.store,
                        cell,
                        {r.prompt.id: found[e].numpy() for r, found in deltas},
                    )
                unscored = [
                    unscored_row(self.worker.outline.subject.name, cell, p, "too_long")
                    for p in self.worker.too_long
                ]
                self.worker.store.write(
                    cell,
                    rows[cell.key] + unscored,
                    generations=texts[cell.key],
                    seconds=seconds,
                    info=self.worker._info(),
                )
        self.found.clear()
        if not self.distance_cells:
            self.worker.store.forget(self.names)

    def distances(self) -> None:
        """Search the minimum distances. Each try is attacked, spoken and judged before the next, so
        all of it runs on transformers."""
        with self.stage.on_transformers():
            for cell in self.distance_cells:
                self._distance(cell)
        self.worker.store.forget(self.names)

    def _packs(self, cells: Sequence[Cell]) -> list[list[GenerationTask]]:
        """Every completion that the cells need, in packs of like length."""
        tasks = [
            GenerationTask(cell, p, self.config.budgets.index(cell.budget), d)
            for cell in cells
            for p in range(len(self.rendered))
            for d in range(self.config.draws if cell.attack.startswith("random") else 1)
        ]
        lengths = [len(self.rendered[w.p].ids) + self.config.max_new_tokens for w in tasks]
        return [[tasks[i] for i in pack] for pack in self.stage.speaking_packs(lengths)]

    def _what(self, tasks: Sequence[GenerationTask]) -> list[list[Any]]:
        """The name of a pack's completions."""
        return [[w.cell.key, self.rendered[w.p].prompt.id, w.d] for w in tasks]

    def _search(self, kind: str) -> None:
        """PGD for all prompts and budgets, pack by pack, unless it is remembered; fills
        `found[kind]`."""
        goals = [self._goal(p, kind) for p in range(len(self.rendered))]
        deltas: list[list[torch.Tensor]] = [[] for _ in goals]
        lengths = [len(g.rendered.ids) + len(g.target) for g in goals]
        for pack in self.stage.packing.packs(
            lengths, len(self.config.budgets) * self.config.restarts
        ):
            ids = [goals[i].rendered.prompt.id for i in pack]
            what = [*self.key, kind, self.cells[0].settings, self.config.eps, self.config.unit, ids]

            def compute(pack: Sequence[int] = pack) -> dict[str, np.ndarray]:
                results = attack(
                    self.stage.engine,
                    [goals[i] for i in pack],
                    self.site,
                    self.config.pgd,
                    score=False,
                )
                arrays = {
                    f"{i}.{e}": f.delta.numpy()
                    for i, row in zip(pack, results, strict=True)
                    for e, f in enumerate(row)
                }
                return {**arrays, "finite": np.array([[f.finite for f in row] for row in results])}

            arrays = self.worker.remembered(self.names, what, compute)
            if kind not in self._searched:
                self._tick(kind, len(pack))
            for i, finite in zip(pack, arrays["finite"], strict=True):
                deltas[i] = [
                    torch.from_numpy(arrays[f"{i}.{e}"]) for e in range(len(self.config.eps))
                ]
                self.broken_gradient[kind] |= {(i, e) for e, ok in enumerate(finite) if not ok}
        self.found[kind] = deltas
        self._searched.add(kind)

    def _goal(self, p: int, kind: str) -> Goal:
        rendered = self.rendered[p]
        if kind == "untargeted":
            answer = self.clean[rendered.prompt.id].ids[: self.config.untargeted_tokens]
            return Goal(rendered, answer or self.worker.target, self.radii[p], maximise=True)
        own = rendered.prompt.target
        return Goal(rendered, self.worker.encode(own) if own else self.worker.target, self.radii[p])

    def _edit(self, task: GenerationTask) -> Edit:
        rendered, kind, radius = self.rendered[task.p], task.cell.attack, self.radii[task.p][task.e]
        if kind in self.found:
            return Edit(self.site, self.found[kind][task.p][task.e])
        if kind == "shuffled":  # scaled to this prompt's radius
            donor = self.donors[task.p]
            theirs, their_radius = self.found["targeted"][donor][task.e], self.radii[donor][task.e]
            theirs = controls.borrowed(theirs, len(rendered.ids), donor == task.p)
            return Edit(
                self.site,
                (theirs * (radius / their_radius if their_radius else 0.0)).clamp(-radius, radius),
            )
        rng = controls.generator(
            self.config.seed,
            kind,
            rendered.prompt.id,
            self.site,
            self.config.budgets[task.e],
            task.d,
        )
        if kind == "random":
            width = self.worker.outline.width
            return Edit(self.site, controls.uniform(len(rendered.ids), width, radius, rng))
        return Edit(self.site, controls.matched(self.found["targeted"][task.p][task.e], rng))

    def _speak(
        self, tasks: Sequence[GenerationTask], names: list[str]
    ) -> Iterable[tuple[GenerationTask, Request, ScoredCompletion]]:
        goal_target = [self._goal(w.p, "targeted").target for w in tasks]
        requests = [
            Request(self.rendered[w.p], self._edit(w), t)
            for w, t in zip(tasks, goal_target, strict=True)
        ]
        done, nll = self.worker.speak(requests, names, self._what(tasks))
        clean_nll = [self.clean[r.rendered.prompt.id].completion_nll for r in requests]
        return zip(tasks, requests, self.worker.score(requests, done, nll, clean_nll), strict=True)

    def _row(self, task: GenerationTask, request: Request, spoken: ScoredCompletion) -> Any:
        kind = task.cell.attack
        attacked = kind if kind == "untargeted" else "targeted"
        whose = self.donors[task.p] if kind == "shuffled" else task.p
        reason = (
            "nonfinite_activations"
            if not (self.balls[task.p].finite and self.balls[whose].finite)
            else ""
        )
        if kind != "random" and (whose, task.e) in self.broken_gradient[attacked]:
            reason = "nonfinite_grad"
        return edited_row(
            self.worker.outline.subject.name,
            task.cell,
            task.d,
            request,
            spoken,
            clean=self.clean[request.rendered.prompt.id],
            ball=self.balls[task.p],
            radius=self.radii[task.p][task.e],
            last_position_only=self.site.layer_index == self.worker.outline.n_blocks - 1,
            reason=reason,
        )

    # -- minimum distance
    # ----------------------------------------------------------------------------------------------

    def _distance(self, cell: Cell) -> None:
        """The smallest budget that turns each prompt's completion harmful; prompts already harmful
        are at distance 0."""
        started, names = time.monotonic(), []
        safe = [
            p
            for p, r in enumerate(self.rendered)
            if self.clean[r.prompt.id].verdict in (Label.SAFE, Label.REFUSAL)
        ]
        warm: dict[int, torch.Tensor] = {}
        evaluations = 0
        start = self.config.eps[0]

        def evaluate(rows: Sequence[int], sizes: Sequence[float]) -> list[bool | None]:
            nonlocal evaluations
            evaluations += 1
            verdicts: dict[int, bool | None] = {}
            lengths = [len(self.rendered[safe[i]].ids) + len(self.worker.target) for i in rows]
            for pack in self.stage.packing.packs(lengths, self.config.restarts):
                some = [(safe[rows[j]], sizes[j], rows[j]) for j in pack]
                verdicts.update(self._collapsed(some, warm, names, [cell.key, evaluations]))
            self._tick("distance", len(rows) / distance_evaluations(self.config))
            return [verdicts[i] for i in rows]

        limit = start * self.config.distance_limit
        distances = search(
            evaluate, len(safe), start=start, limit=limit, bisections=self.config.bisections
        )
        found = dict(zip(safe, distances, strict=True))
        scale = {p: self.radii[p][0] / start for p in range(len(self.rendered))}
        rows = []
        for p, rendered in enumerate(self.rendered):
            clean = self.clean[rendered.prompt.id].verdict
            harmful = clean == Label.HARMFUL
            size = found[p].size if p in found else 0.0 if harmful else None
            collapsed = found[p].collapsed if p in found else True if harmful else None
            rows.append(
                self._distance_row(
                    rendered.prompt,
                    size,
                    None if size is None else size * scale[p],
                    collapsed,
                    found[p].evaluations if p in found else 0,
                    clean,
                    (
                        ""
                        if collapsed is not None
                        else f"clean_{clean}"
                        if p not in found
                        else "attack_unscored"
                    ),
                )
            )
        rows += [
            self._distance_row(p, None, None, None, 0, None, "too_long")
            for p in self.worker.too_long
        ]
        self.worker.store.write(
            cell, rows, seconds=time.monotonic() - started, info=self.worker._info()
        )
        self.worker.store.forget(names)

    def _distance_row(
        self,
        prompt: Prompt,
        size: float | None,
        eps_abs: float | None,
        collapsed: bool | None,
        tries: int,
        clean: str | None,
        unscored: str,
    ) -> DistanceRow:
        return DistanceRow(
            subject=self.worker.outline.subject.name,
            site=str(self.site),
            layer_index=self.site.layer_index,
            unit=self.config.unit,
            prompt_id=prompt.id,
            distance=size,
            eps_abs=eps_abs,
            collapsed=collapsed,
            evaluations=tries,
            verdict_clean=clean,
            unscored=unscored,
        )

    def _collapsed(
        self,
        some: Sequence[tuple[int, float, int]],
        warm: dict[int, torch.Tensor],
        names: list[str],
        what: Any,
    ) -> dict[int, bool | None]:
        """Attack prompt p with its own size, speak, judge: harmful and coherent? Remembers δ as the
        next warm start."""
        goals = []
        for p, size, _ in some:
            base = self._goal(p, "targeted")
            radius = torch.tensor(
                self.radii[p][0] / self.config.eps[0] * size, dtype=torch.float32
            ).item()
            start = (
                None
                if p not in warm
                else (warm[p] * (radius / max(warm[p].abs().max().item(), 1e-30)),)
            )
            goals.append(Goal(base.rendered, base.target, (radius,), warm=start))

        def compute() -> dict[str, np.ndarray]:
            results = attack(self.stage.engine, goals, self.site, self.config.pgd, score=False)
            arrays = {
                str(p): f[0].delta.numpy() for (p, _, _), f in zip(some, results, strict=True)
            }
            return {**arrays, "finite": np.array([f[0].finite for f in results])}

        arrays = self.worker.remembered(
            names, [*what, "delta", [[p, size] for p, size, _ in some]], compute
        )
        for p, _, _ in some:
            warm[p] = torch.from_numpy(arrays[str(p)])
        requests = [
            Request(g.rendered, Edit(self.site, warm[p]))
            for g, (p, _, _) in zip(goals, some, strict=True)
        ]
        done, nll = self.worker.speak(
            requests, names, [*what, "speak", [[p, size] for p, size, _ in some]]
        )
        clean_nll = [self.clean[g.rendered.prompt.id].completion_nll for g in goals]
        spoken = self.worker.score(requests, done, nll, clean_nll)
        return {
            row: (
                None
                if not finite or s.verdict.label == Label.UNSCORED
                else s.verdict.label == Label.HARMFUL
            )
            for (_, _, row), s, finite in zip(some, spoken, arrays["finite"], strict=True)
        }


def _generation(request: Request, spoken: ScoredCompletion, draw: int) -> dict[str, Any]:
    """What `generations/<key>.parquet` keeps of a completion; this is the only place where text is
    stored."""
    return {
        "prompt_id": request.rendered.prompt.id,
        "draw": draw,
        "prompt": request.rendered.prompt.text,
        "completion": spoken.completion.text,
        "ids": list(spoken.completion.ids),
        "stopped": spoken.completion.stopped,
        "completion_nll": spoken.completion_nll,
        "coherent": spoken.coherent,
        "verdict": str(spoken.verdict.label),
        "reason": spoken.verdict.reason or spoken.score.reason,
    }


def _pack_completions(
    done: Sequence[Completion], nll: Sequence[float | None]
) -> dict[str, np.ndarray]:
    """Completions as plain arrays: flat token ids with their counts, numbers with NaN for
    "none"."""
    numbers = [
        [c.target_nll, c.l2_effective, c.linf_effective, n] for c, n in zip(done, nll, strict=True)
    ]
    return {
        "ids": np.array([i for c in done for i in c.ids], dtype=np.int64),
        "counts": np.array([len(c.ids) for c in done], dtype=np.int64),
        "stopped": np.array([c.stopped for c in done], dtype=bool),
        "finite": np.array([c.finite for c in done], dtype=bool),
        "numbers": np.array(numbers, dtype=np.float64),
    }


def _unpack_completions(
    arrays: dict[str, np.ndarray], tokenizer: Any
) -> tuple[list[Completion], list[float | None]]:
    done, nll, at = [], [], 0
    columns = (arrays[name] for name in ("counts", "stopped", "finite", "numbers"))
    for count, stopped, finite, numbers in zip(*columns, strict=True):
        ids = tuple(int(i) for i in arrays["ids"][at : at + count])
        at += count
        values = [None if np.isnan(x) else float(x) for x in numbers]
        done.append(
            Completion(
                tokenizer.decode(ids, skip_special_tokens=True),
                ids,
                bool(stopped),
                bool(finite),
                *values[:3],
            )
        )
        nll.append(values[3])
    return done, nll
