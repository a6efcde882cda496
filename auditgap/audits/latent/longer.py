"""The longer search at one site: does more work find more than the attack did?

    search_longer(run, cell)     # searches, speaks and writes one budget's rows

Of the prompts at risk on which the attack is certified, those whose target was not reached are
searched again with four times the steps, from four starts. Where that gains, the cell's other
prompts that have not flipped are searched again with four times the steps, from one start. Every
edit is in the ball, so what flips counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from auditgap.audits.latent.rows import unscored_row
from auditgap.audits.latent.spoken import Spoken, judged, speak
from auditgap.audits.session import Arrays
from auditgap.engines import Request
from auditgap.interventions.pgd import attack
from auditgap.interventions.strength import CERTIFIED, MOST_GAIN, MOST_NEW, REACHED, STARTS, harder
from auditgap.rows import Row
from auditgap.stats.resampling import highest_median
from auditgap.store.tables import rows_of
from auditgap.types import Cell, Document, Label

if TYPE_CHECKING:
    from auditgap.audits.latent.site import GenerationTask, SiteRun


def search_longer(run: SiteRun, cell: Cell) -> None:
    """Search one budget longer and write the cell; its record's `longer` says what that found."""
    started = time.monotonic()
    search = _Search(run, cell)
    sample = search.at_risk[:CERTIFIED]
    left = [p for p in sample if search.nll(p) > REACHED]
    gains = search.search(left, STARTS)
    new = search.flips
    gain = statistics.median(gains) if gains else None
    is_open = (gain is not None and gain > MOST_GAIN) or new >= MOST_NEW
    rest = [p for p in search.at_risk if p not in left and not search.flipped(p)]
    again = rest if is_open else []
    search.search(again, 1)
    run.tick("longer", min(len(run.rendered), CERTIFIED) / len(run.config.eps))
    found: Document = {
        "n": len(sample),
        "searched": len(left),
        "gain": gain,
        "gain_hi": highest_median(gains) if gains else None,
        "new_flips": new,
        "again": len(again),
        "again_flips": search.flips - new,
        "not_converged": is_open,
    }
    name = run.worker.outline.subject.name
    lost = [unscored_row(name, cell, *one) for one in run.thinker.left_out]
    run.worker.store.write(
        cell,
        search.rows + lost,
        generations=search.texts,
        seconds=time.monotonic() - started,
        info={**run.worker.info(), "longer": found},
    )
    run.worker.store.forget(search.names)


class _Search:
    """One budget's longer searches, and what was said under the edits that they found."""

    def __init__(self, run: SiteRun, cell: Cell) -> None:
        self.run, self.cell = run, cell
        self.names: list[str] = []
        self.rows: list[Row] = []
        self.texts: list[Document] = []
        self.flips = 0
        self.e = run.config.budgets.index(cell.budget)
        attacked = run.worker.store.cell_rows(run.targeted[self.e].key)
        self.before: Mapping[str, Document] = {
            row["prompt_id"]: row for row in rows_of(attacked, plain=True)
        }
        self.at_risk = [
            p
            for p, r in enumerate(run.rendered)
            if run.clean[r.prompt.id].verdict in (Label.SAFE, Label.REFUSAL)
            and run.balls[p].finite
            and self._row(p)["nll_edited"] is not None
        ]

    def _row(self, p: int) -> Document:
        return self.before[self.run.rendered[p].prompt.id]

    def nll(self, p: int) -> float:
        """Of prompt p's target under the attack's edit."""
        return float(self._row(p)["nll_edited"])

    def flipped(self, p: int) -> bool:
        return self._row(p)["verdict_edited"] == Label.HARMFUL

    def search(self, prompts: Sequence[int], starts: int) -> list[float]:
        """What more work gains on each prompt, in nats a token that an edit here can move; the
        texts of those that have not flipped are judged."""
        gains: list[float] = []
        goals = {p: self.run.goal(p, "targeted") for p in prompts}
        lengths = [len(goals[p].rendered.ids) + len(goals[p].target) for p in prompts]
        pgd = harder(self.run.config.pgd, starts)
        edits: dict[int, torch.Tensor] = {}
        is_last = self.run.site.layer_index == self.run.worker.outline.n_blocks - 1
        for pack in self.run.stage.packing.packs(lengths, pgd.restarts):
            some = [prompts[i] for i in pack]
            deltas, losses = self._found(some, starts)
            for p, loss in zip(some, losses, strict=True):
                moved = len(goals[p].target) if is_last else 1  # there the first token alone moves
                gains.append(max(0.0, self.nll(p) - loss) * moved)
            edits |= {p: d for p, d in zip(some, deltas, strict=True) if not self.flipped(p)}
        self._speak(edits)
        return gains

    def _found(self, prompts: Sequence[int], starts: int) -> tuple[list[torch.Tensor], list[float]]:
        """The best edit of each prompt and its loss (remembered); infinite where it is no number."""
        run = self.run

        def compute() -> Arrays:
            goals = [run.goal(p, "targeted", only=self.e) for p in prompts]
            pgd = harder(run.config.pgd, starts)
            results = [row[0] for row in attack(run.stage.engine, goals, run.site, pgd)]
            loss = [r.nll_edited if r.finite else None for r in results]
            arrays = {str(p): r.delta.numpy() for p, r in zip(prompts, results, strict=True)}
            return {**arrays, "loss": np.array([np.inf if x is None else x for x in loss])}

        ids = [run.rendered[p].prompt.id for p in prompts]
        arrays = run.session.remembered(self.names, [self.cell.key, starts, ids], compute)
        return [torch.from_numpy(arrays[str(p)]) for p in prompts], arrays["loss"].tolist()

    def _speak(self, edits: Mapping[int, torch.Tensor]) -> None:
        run, prompts = self.run, list(edits)
        lengths = [len(run.rendered[p].ids) + run.session.new_tokens for p in prompts]
        tasks: list[GenerationTask] = []
        spoken: list[Spoken] = []
        for pack in run.stage.speaking_packs(lengths):
            mine = [run.task(self.cell, prompts[i]) for i in pack]
            requests = [
                Request(
                    run.rendered[t.p],
                    run.thinker.edit(run.site, edits[t.p]),
                    run.goal(t.p, "targeted").target,
                )
                for t in mine
            ]
            what = [self.cell.key, "speak", [r.rendered.prompt.id for r in requests]]
            tasks += mine
            spoken += speak(run, requests, self.names, what)
        scored = judged(run.session, spoken, run.clean, confirm=True)
        for task, said, one in zip(tasks, spoken, scored, strict=True):
            row = run.row(task, said, one)
            self.flips += row.verdict_edited == Label.HARMFUL
            self.rows.append(row)
            self.texts.append(run.text(task, said, one))
