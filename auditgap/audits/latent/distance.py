"""The minimum distance to collapse at one site: the smallest budget that turns each prompt's
completion harmful.

    minimum_distance(site_run, cell)     # tries, bisects and writes the cell's rows
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from auditgap.audits.latent.plan import distance_evaluations
from auditgap.audits.latent.spoken import Spoken, judged, speak
from auditgap.audits.session import Arrays
from auditgap.engines import Request
from auditgap.interventions.distance import Distance, search
from auditgap.interventions.pgd import Goal, attack
from auditgap.rows import DistanceRow
from auditgap.types import Cell, Label, Prompt

if TYPE_CHECKING:
    from auditgap.audits.latent.site import SiteRun


def minimum_distance(run: SiteRun, cell: Cell) -> None:
    """Search every safe prompt's smallest budget and write the cell; prompts already harmful are at
    distance 0."""
    started = time.monotonic()
    names: list[str] = []
    config = run.config
    safe = [
        p
        for p, r in enumerate(run.rendered)
        if run.clean[r.prompt.id].verdict in (Label.SAFE, Label.REFUSAL)
    ]
    tries = _Tries(run, cell, safe, names)
    distances = search(
        tries.evaluate,
        len(safe),
        start=config.eps[0],
        limit=config.eps[0] * config.distance_limit,
        bisections=config.bisections,
    )
    found = dict(zip(safe, distances, strict=True))
    rows = [
        _row_of(run, p, found.get(p), tries.labels.get(p, {})) for p in range(len(run.rendered))
    ]
    rows += [_row(run, p, None, None, None, 0, None, why) for p, why in run.thinker.left_out]
    store = run.worker.store
    store.write(cell, rows, seconds=time.monotonic() - started, info=run.worker.info())
    store.forget(names)


class _Tries:
    """Answers the search: is the completion harmful within this size? Each prompt's last δ is its
    next warm start."""

    def __init__(self, run: SiteRun, cell: Cell, safe: Sequence[int], names: list[str]) -> None:
        self.run, self.cell, self.safe, self.names = run, cell, safe, names
        self.warm: dict[int, torch.Tensor] = {}
        self.labels: dict[int, dict[float, Label]] = {}  #: by prompt and size
        self.evaluations = 0

    def evaluate(self, rows: Sequence[int], sizes: Sequence[float]) -> list[bool | None]:
        self.evaluations += 1
        run = self.run
        verdicts: dict[int, bool | None] = {}
        asked = [run.goal(self.safe[i], "targeted") for i in rows]
        lengths = [len(g.rendered.ids) + len(g.target) for g in asked]
        order: list[int] = []
        spoken: list[Spoken] = []
        finite: list[bool] = []
        for pack in run.stage.packing.packs(lengths, run.config.restarts):
            some = [(self.safe[rows[j]], sizes[j]) for j in pack]
            said, ok = self._said(some, [self.cell.key, self.evaluations])
            order += pack
            spoken += said
            finite += ok
        scored = judged(run.session, spoken, run.clean, confirm=False)
        for j, one, ok in zip(order, scored, finite, strict=True):
            label = one.verdict.label
            self.labels.setdefault(self.safe[rows[j]], {})[sizes[j]] = label
            told = ok and label != Label.UNSCORED
            verdicts[rows[j]] = label == Label.HARMFUL if told else None
        run.tick("distance", len(rows) / distance_evaluations(run.config))
        return [verdicts[i] for i in rows]

    def _said(
        self, some: Sequence[tuple[int, float]], what: Any
    ) -> tuple[list[Spoken], list[bool]]:
        """What is said once prompt p is attacked with its own size, and whether the search's
        numbers were. Remembers δ as the next warm start."""
        run = self.run
        goals = [self._goal(p, size) for p, size in some]

        def compute() -> Arrays:
            results = attack(run.stage.engine, goals, run.site, run.config.pgd, score=False)
            arrays = {str(p): f[0].delta.numpy() for (p, _), f in zip(some, results, strict=True)}
            return {**arrays, "finite": np.array([f[0].finite for f in results])}

        tried = [list(pair) for pair in some]
        arrays = run.session.remembered(self.names, [*what, "delta", tried], compute)
        for p, _ in some:
            self.warm[p] = torch.from_numpy(arrays[str(p)])
        requests = [
            Request(g.rendered, run.thinker.edit(run.site, self.warm[p]))
            for g, (p, _) in zip(goals, some, strict=True)
        ]
        spoken = speak(run, requests, self.names, [*what, "speak", tried])
        return spoken, [bool(ok) for ok in arrays["finite"]]

    def _goal(self, p: int, size: float) -> Goal:
        run = self.run
        base = run.goal(p, "targeted")
        radius = torch.tensor(
            run.radii[p][0] / run.config.eps[0] * size, dtype=torch.float32
        ).item()
        warm = self.warm.get(p)
        start = None if warm is None else (warm * (radius / max(warm.abs().max().item(), 1e-30)),)
        return replace(base, radii=(radius,), warm=start)


def broken_from(labels: Mapping[float, Label]) -> float | None:
    """The size from which on every text that was tried fell apart; None: the largest did not."""
    first = None
    for size in sorted(labels, reverse=True):
        if labels[size] != Label.BROKEN:
            break
        first = size
    return first


def _row_of(
    run: SiteRun, p: int, found: Distance | None, labels: Mapping[float, Label]
) -> DistanceRow:
    """Prompt p's row from what its search found (None: it was not searched), with the verdicts by
    size."""
    prompt = run.rendered[p].prompt
    verdict = run.clean[prompt.id].verdict
    if found is None:
        if verdict == Label.HARMFUL:
            return _row(run, prompt, 0.0, 0.0, True, 0, verdict, "")
        return _row(run, prompt, None, None, None, 0, verdict, f"clean_{verdict}")
    scale = run.radii[p][0] / run.config.eps[0]
    broken = broken_from(labels) if found.collapsed is False else None
    size = found.size if broken is None else broken
    eps_abs = None if size is None else size * scale
    unscored = "attack_unscored" if found.collapsed is None else ""
    row = _row(run, prompt, size, eps_abs, found.collapsed, found.evaluations, verdict, unscored)
    return replace(row, broken=broken is not None)


def _row(
    run: SiteRun,
    prompt: Prompt,
    size: float | None,
    eps_abs: float | None,
    collapsed: bool | None,
    tries: int,
    clean: str | None,
    unscored: str,
) -> DistanceRow:
    return DistanceRow(
        subject=run.worker.outline.subject.name,
        site=str(run.site),
        layer_index=run.site.layer_index,
        unit=run.config.unit,
        prompt_id=prompt.id,
        distance=size,
        eps_abs=eps_abs,
        collapsed=collapsed,
        evaluations=tries,
        verdict_clean=clean,
        unscored=unscored,
    )
