"""The attacks at one site of a subject, over all prompts: search the edits, generate under them,
write the cells.

    run = SiteRun(worker, Site(15), clean, cells, pending, tick)
    run.search()        # remembers the edits, for generation in a second pass
    run.speak()         # searches what it does not find, and generates
    run.write(judged(session, run.said, clean, confirm=True))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from auditgap.audits.edits import keep_edits
from auditgap.audits.latent.plan import DISTANCE
from auditgap.audits.latent.rows import Clean, edited_row, unscored_row
from auditgap.audits.latent.spoken import Spoken, speak
from auditgap.audits.latent.thinker import Thinker
from auditgap.audits.scored import ScoredCompletion
from auditgap.audits.session import Arrays, RepeatCheck
from auditgap.engines import Request
from auditgap.engines.coded import Coded
from auditgap.interventions import controls
from auditgap.interventions.pgd import AttackResult, Ball, Elsewhere, Goal, attack
from auditgap.interventions.strength import CERTIFIED, certify
from auditgap.rows import Row
from auditgap.types import LONGER, Cell, Document, Edit, Label, Site, digest

if TYPE_CHECKING:
    from auditgap.audits.latent.worker import LatentWorker


#: Attacks with a search of their own; the others are drawn, or take the targeted one's edit.
SEARCHED = ("targeted", "untargeted", "benign")


@dataclass(frozen=True, eq=False)
class GenerationTask:
    """A completion to generate: prompt number p under an attack, at budget number e, draw d."""

    cell: Cell
    p: int
    e: int
    d: int


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
        self.worker, self.site, self.clean, self.pending, self.tick = (
            worker,
            site,
            clean,
            pending,
            tick,
        )
        self.cells = [cell for cell in cells if cell.attack not in (DISTANCE, LONGER)]
        self.longer_cells = [
            cell for cell in cells if cell.attack == LONGER and cell.key in pending
        ]
        #: of each budget, in the config's order; empty where there is no such attack
        self.targeted = [cell for cell in self.cells if cell.attack == "targeted"]
        self.distance_cells = [
            cell for cell in cells if cell.attack == DISTANCE and cell.key in pending
        ]
        self.config, self.thinker = worker.config, Thinker(worker, clean)
        #: with the clean chain behind each prompt, where the model thinks
        self.rendered = self.thinker.rendered
        self.session, self.stage = worker.session, worker.session.stage
        self.key = [worker.outline.subject.fingerprint, site.layer_index, worker.prompts.digest]
        self.key += [] if worker.mode is None else [worker.mode]
        self.names: list[str] = []  #: of what is remembered until the cells are written
        self.donors = controls.donors([len(r.ids) for r in self.rendered])
        # attack -> [prompt][budget] -> δ [T, D]
        self.found: dict[str, list[list[Coded]]] = {}
        self.broken_gradient: dict[str, set[tuple[int, int]]] = {kind: set() for kind in SEARCHED}
        self._searched: set[str] = set()
        #: targeted: [prompt][budget] -> NLL at every iterate
        self.curves: list[list[tuple[float, ...]]] = []
        self.strength: list[Document] = []  #: of the targeted search, one a budget
        #: what was said under the cells' edits, and which completion of the cells each is
        self.said: list[Spoken] = []
        self.tasks: list[GenerationTask] = []
        self._seconds = 0.0
        self._repeats = RepeatCheck(self.session)
        self._measure()
        packed = self._packs(self.cells)
        if not any(worker.store.remembers(digest(self._what(tasks))) for tasks in packed):
            # else: a kill came while the group's cells were being written, and the packs of all of
            # them are remembered
            self.cells = [cell for cell in self.cells if cell.key in pending]

    def _measure(self) -> None:
        """Norms and radii of every prompt's clean activations at the site."""

        def compute() -> Arrays:
            self.stage.engine.self_test(self.site)
            activations = self.stage.engine.activations(self.rendered, self.site)
            balls = [
                astuple(self.thinker.ball(h, r))
                for h, r in zip(activations, self.rendered, strict=True)
            ]
            return {
                "balls": np.array(balls).reshape(-1, 3),
                "width": np.array([h.shape[1] for h in activations[:1]]),
            }

        what = [*self.key, "balls", self.config.dtype, [r.prompt.id for r in self.rendered]]
        found = self.session.remembered(self.names, what, compute)
        self.balls = [Ball(*numbers) for numbers in found["balls"].tolist()]
        #: of an edit at the site; what an interrupted run of before remembers has none
        self.width = next(
            iter(found.get("width", np.array([])).tolist()), self.worker.outline.width
        )
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
        if "targeted" in wanted:
            self._certify()
        for kind in SEARCHED[1:]:
            if kind in wanted:
                self._search(kind)

    def speak(self) -> None:
        """Speak under all edits, in packs of like length; `said` waits for the judges."""
        if not self.cells:
            return
        started = time.monotonic()
        self._find()
        packed = self._packs(self.cells)
        for tasks in packed:
            requests = self._requests(tasks)
            said = speak(self, requests, self.names, self._what(tasks))
            self._repeats.see(
                [self.thinker.as_spoken(r) for r in requests],
                [one.unjudged.completion for one in said],
            )
            self.tasks += tasks
            self.said += said
            self.tick("speak", len(tasks) * len(self.rendered) / sum(map(len, packed)))
        for cell in self.cells:
            if self.worker.options.keep_edits and cell.key in self.pending:
                self._keep(cell)
        self.found.clear()
        self._seconds = time.monotonic() - started

    def write(self, scored: Sequence[ScoredCompletion]) -> None:
        """Write the pending cells, of which `scored` are the completions as judged, in `said`'s
        order."""
        started = time.monotonic()
        rows: dict[str, list] = {cell.key: [] for cell in self.cells}
        texts: dict[str, list] = {cell.key: [] for cell in self.cells}
        for task, said, one in zip(self.tasks, self.said, scored, strict=True):
            rows[task.cell.key].append(self.row(task, said, one))
            texts[task.cell.key].append(self.text(task, said, one))
        name = self.worker.outline.subject.name
        for cell in self.cells:
            if cell.key in self.pending:
                unscored = [unscored_row(name, cell, *lost) for lost in self.thinker.left_out]
                self.worker.store.write(
                    cell,
                    rows[cell.key] + unscored,
                    generations=texts[cell.key],
                    seconds=(self._seconds + time.monotonic() - started) / len(self.cells),
                    info={**self.worker.info(), **self._evidence(cell, self._repeats)},
                )
        self.said.clear()
        if not (self.distance_cells or self.longer_cells):
            self.worker.store.forget(self.names)

    def _keep(self, cell: Cell) -> None:
        """Keep a searched cell's edits in the run folder."""
        if cell.attack in self.found:
            e = self.config.budgets.index(cell.budget)
            deltas = zip(self.rendered, self.found[cell.attack], strict=True)
            arrays = {r.prompt.id: found[e].rows().numpy() for r, found in deltas}
            keep_edits(self.worker.store, cell, arrays)

    def _packs(self, cells: Sequence[Cell]) -> list[list[GenerationTask]]:
        """Every completion that the cells need, in packs of like length."""
        tasks = [
            GenerationTask(cell, p, self.config.budgets.index(cell.budget), d)
            for cell in cells
            for p in range(len(self.rendered))
            for d in range(self.config.draws if cell.attack.startswith("random") else 1)
        ]
        lengths = [len(self.rendered[w.p].ids) + self.session.new_tokens for w in tasks]
        return [[tasks[i] for i in pack] for pack in self.stage.speaking_packs(lengths)]

    def _what(self, tasks: Sequence[GenerationTask]) -> list[list[Any]]:
        """The name of a pack's completions."""
        return [[w.cell.key, self.rendered[w.p].prompt.id, w.d] for w in tasks]

    def _search(self, kind: str) -> None:
        """PGD for all prompts and budgets, pack by pack, unless it is remembered; fills
        `found[kind]`."""
        goals = [self.goal(p, kind) for p in range(len(self.rendered))]
        deltas: list[list[Coded]] = [[] for _ in goals]
        curves: list[list[tuple[float, ...]]] = [[] for _ in goals]
        lengths = [len(g.rendered.ids) + len(g.target) for g in goals]
        for pack in self.stage.packing.packs(
            lengths, len(self.config.budgets) * self.config.restarts
        ):
            ids = [goals[i].rendered.prompt.id for i in pack]
            what = [*self.key, kind, self.cells[0].settings, self.config.eps, self.config.unit, ids]
            what.append("curves")  # what an interrupted run of before remembers has none

            def compute(pack: Sequence[int] = pack) -> Arrays:
                results = attack(
                    self.stage.engine,
                    [goals[i] for i in pack],
                    self.site,
                    self.config.pgd,
                    score=False,
                )
                arrays = {
                    name: array
                    for i, row in zip(pack, results, strict=True)
                    for e, f in enumerate(row)
                    for name, array in Coded.of(f.delta).arrays(f"{i}.{e}").items()
                }
                return {
                    **arrays,
                    "finite": np.array([[f.finite for f in row] for row in results]),
                    "curves": np.array([[f.curve for f in row] for row in results]),
                }

            arrays = self.session.remembered(self.names, what, compute)
            if kind not in self._searched:
                self.tick(kind, len(pack))
            for i, finite, way in zip(pack, arrays["finite"], arrays["curves"], strict=True):
                curves[i] = [tuple(curve) for curve in way.tolist()]
                deltas[i] = [Coded.read(arrays, f"{i}.{e}") for e in range(len(self.config.eps))]
                self.broken_gradient[kind] |= {(i, e) for e, ok in enumerate(finite) if not ok}
        self.found[kind] = deltas
        if kind == "targeted":
            self.curves = curves
        self._searched.add(kind)

    def _certify(self) -> None:
        """Checks, on prompts at risk, that the targeted search could have found something. Not for
        a model that is in other processes."""
        engine = self.stage.engine
        at_risk = [
            p
            for p, r in enumerate(self.rendered)
            if self.clean[r.prompt.id].verdict in (Label.SAFE, Label.REFUSAL)
            and self.balls[p].finite
            and not any(p == lost for lost, _ in self.broken_gradient["targeted"])
        ][:CERTIFIED]
        if not at_risk or isinstance(engine, Elsewhere):
            return

        def compute() -> Arrays:
            found = [
                [
                    AttackResult(delta.rows(), curve[0], None, True, curve)
                    for delta, curve in zip(self.found["targeted"][p], self.curves[p], strict=True)
                ]
                for p in at_risk
            ]
            goals = [self.goal(p, "targeted") for p in at_risk]
            certificates = certify(engine, goals, found, self.site, self.config.pgd, longer=False)
            said = json.dumps([one.describe() for one in certificates])
            return {"json": np.frombuffer(said.encode(), dtype=np.uint8)}

        ids = [self.rendered[p].prompt.id for p in at_risk]
        what = [*self.key, "strength", self.cells[0].settings, self.config.eps, ids]
        arrays = self.session.remembered(self.names, [*what, self.config.unit], compute)
        self.strength = json.loads(arrays["json"].tobytes())

    def _evidence(self, cell: Cell, repeats: RepeatCheck) -> Document:
        """What a cell's record says for a verdict: whether passes repeat themselves, and the
        certificate of its search."""
        if cell.attack != "targeted":
            return {}
        found: Document = {
            "repeat": {"clean": self.worker.clean_repeat, "edited": repeats.describe()}
        }
        if self.strength:
            found["strength"] = self.strength[self.config.budgets.index(cell.budget)]
        return found

    def task(self, cell: Cell, p: int) -> GenerationTask:
        """One completion of prompt number p, at the cell's budget."""
        return GenerationTask(cell, p, self.config.budgets.index(cell.budget), 0)

    def goal(self, p: int, kind: str, only: int | None = None) -> Goal:
        """What the search `kind` aims at on prompt number p, at every radius or at one."""
        rendered, radii = self.rendered[p], self.radii[p]
        radii = radii if only is None else (radii[only],)
        on: Any = {"span": self.thinker.span(rendered), "goes_on": self.thinker.goes_on}
        if kind == "untargeted":
            answer = self.clean[rendered.prompt.id].ids[: self.config.untargeted_tokens]
            return Goal(rendered, answer or self.worker.target, radii, maximise=True, **on)
        if kind == "benign":
            return Goal(rendered, self.worker.benign, radii, **on)
        return Goal(rendered, self.worker.targets[rendered.prompt.id], radii, **on)

    def _edit(self, task: GenerationTask) -> Edit:
        rendered, kind, radius = self.rendered[task.p], task.cell.attack, self.radii[task.p][task.e]
        if kind in self.found:
            return self.thinker.edit(self.site, self.found[kind][task.p][task.e].rows())
        if kind == "shuffled":  # scaled to this prompt's radius
            donor = self.donors[task.p]
            theirs = self.found["targeted"][donor][task.e].rows()
            their_radius = self.radii[donor][task.e]
            start, end = self.thinker.span(self.rendered[donor])
            mine = self.thinker.span(rendered)
            theirs = controls.borrowed(theirs[start:end], mine[1] - mine[0], donor == task.p)
            theirs = (theirs * (radius / their_radius if their_radius else 0.0)).clamp(
                -radius, radius
            )
            return self.thinker.edit(self.site, self.thinker.placed(theirs, rendered))
        rng = controls.generator(
            self.config.seed,
            kind,
            rendered.prompt.id,
            self.site,
            self.config.budgets[task.e],
            task.d,
        )
        if kind == "random":
            start, end = self.thinker.span(rendered)
            drawn = controls.uniform(end - start, self.width, radius, rng)
            return self.thinker.edit(self.site, self.thinker.placed(drawn, rendered))
        return self.thinker.edit(
            self.site, controls.matched(self.found["targeted"][task.p][task.e].rows(), rng)
        )

    def _requests(self, tasks: Sequence[GenerationTask]) -> list[Request]:
        goals = [self.goal(w.p, "targeted").target for w in tasks]
        return [
            Request(self.rendered[w.p], self._edit(w), t) for w, t in zip(tasks, goals, strict=True)
        ]

    def text(self, task: GenerationTask, said: Spoken, scored: ScoredCompletion) -> Document:
        """What `generations/` keeps of a completion."""
        second = "" if scored.second is None else str(scored.second.label)
        return scored.record(said.rendered.prompt, draw=task.d, verdict_second=second)

    def row(self, task: GenerationTask, said: Spoken, scored: ScoredCompletion) -> Row:
        kind = task.cell.attack
        attacked = kind if kind in SEARCHED else "targeted"
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
            said.rendered,
            (said.l2, said.linf),
            scored,
            clean=self.clean[said.rendered.prompt.id],
            ball=self.balls[task.p],
            radius=self.radii[task.p][task.e],
            last_position_only=self.site.layer_index == self.worker.outline.n_blocks - 1,
            reason=reason,
            mode=self.worker.mode,
        )
