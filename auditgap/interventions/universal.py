"""A universal edit: one vector v for all prompts and positions, searched on one half of the
prompts, tried on the other.

    min over v of the mean NLL(target | h_site + v)   subject to ‖v‖₂ ≤ s·n

s the strength, n the mean ‖h‖₂ of a token at the site. Projected gradient descent from 0: steps of
a quarter of the radius along the gradient's own direction, projected back into the ball (the L2
form of the attack in arXiv 2606.08044 section 4, with one δ for all). v stands at every position of
the prompt, as all edits at prefill do. The control is a random direction of equal norm. What opens
prompts that the search has not seen is a property of the model, not of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from auditgap.engines.batching import left_pad
from auditgap.engines.hf import HFEngine
from auditgap.engines.tensors import add, mean_nll
from auditgap.interventions import CONTROL, EDIT, Bench, Settings, Trial
from auditgap.interventions.controls import generator
from auditgap.interventions.descent import PGD, L2Ball, descend
from auditgap.interventions.directions import orthogonal, unit
from auditgap.models import Rendered
from auditgap.types import Edit, Site

STEP_SHARE = 0.25  #: of the radius
#: Token ids and mask [B, T], and the site's clean hidden states [B, T, D].
_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Universal:
    """See the module. Of strengths that differ in sign alone it tries one."""

    name = "universal"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.strengths = tuple(sorted({abs(s) for s in settings.strengths}))

    def describe(self) -> dict[str, Any]:
        told = self.settings.of("draws", "steps", "target", "seed")
        return {
            "intervention": self.name,
            "version": 1,
            "strengths": self.strengths,
            "step_share": STEP_SHARE,
            **told,
        }

    def trials(self) -> list[Trial]:
        arms = [(EDIT, 0), *((CONTROL, draw) for draw in range(self.settings.draws))]
        return [
            Trial(arm, strength, draw=draw) for strength in self.strengths for arm, draw in arms
        ]

    def learn(self, bench: Bench) -> dict[str, torch.Tensor]:
        """`universal_<strength>` [D], one a strength; 0 where the gradient was not a number."""
        target = bench.engine.encode(self.settings.target)
        finite = [i for i, h in enumerate(bench.fit_h) if bool(torch.isfinite(h).all())]
        found = search(
            bench.engine,
            [bench.fit[i] for i in finite],
            target,
            bench.site,
            [s * bench.norm for s in self.strengths],
            self.settings.steps,
        )
        return {f"universal_{s:g}": v for s, v in zip(self.strengths, found, strict=True)}

    def edit(self, bench: Bench, learned: Mapping[str, torch.Tensor], p: int, trial: Trial) -> Edit:
        v = learned[f"universal_{trial.strength:g}"]
        if trial.arm == CONTROL and v.any():
            rng = generator(
                self.settings.seed,
                self.name,
                bench.asked[p].prompt.id,
                bench.site,
                trial.strength,
                trial.draw,
            )
            v = v.norm() * orthogonal(unit(v), rng)
        return Edit(bench.site, v.expand(len(bench.asked[p].ids), -1).clone())


def search(
    engine: HFEngine,
    rendered: Sequence[Rendered],
    target: tuple[int, ...],
    site: Site,
    radii: Sequence[float],
    steps: int,
) -> list[torch.Tensor]:
    """The vectors [D], one a radius, fp32 on the CPU. The trunk runs once a pack of prompts, each
    step only what is above."""
    engine.self_test(site)
    k, device = len(target), engine.device
    lengths = [len(r.ids) + k for r in rendered]

    def captured(pack: Sequence[int]) -> list[_Batch]:
        ids, mask = left_pad([(*rendered[i].ids, *target) for i in pack], engine.pad_id, device)
        return [(ids, mask, engine.capture(site, ids, mask))]

    batches = [
        batch
        for pack in engine.packing.packs(lengths)
        for batch in engine.fitting.run(
            ("capture", site), captured, pack, [lengths[i] for i in pack]
        )
    ]

    def slope_of(v: torch.Tensor, batch: _Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ids, mask, clean = batch
        t = ids.shape[1] - k
        with torch.enable_grad():
            leaf = v.detach().requires_grad_(True)
            hidden = torch.cat([add(clean[:, :t], leaf * mask[:, :t, None]), clean[:, t:]], 1)
            logits = engine.logits_from(site, hidden, ids, mask, keep=k + 1)[:, :-1]
            own = mean_nll(logits, ids[:, t:], torch.ones_like(ids[:, t:])).sum()
            return [(own.detach(), torch.autograd.grad(own, leaf)[0])]

    def gradient(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of v [1, D]: the mean target NLL over all prompts [1], and its gradient."""
        nll, slope = torch.zeros(1, device=device), torch.zeros_like(v)
        for batch in batches:
            n, width = batch[0].shape
            for own, part in engine.fitting.run(
                ("gradient", site),
                lambda rows, batch=batch: slope_of(v, _rows_of(batch, rows)),
                range(n),
                [width] * n,
            ):
                slope += part / max(1, len(rendered))
                nll += own / max(1, len(rendered))
        return nll, slope

    zero = torch.zeros(1, engine.width, device=device)
    at_zero = gradient(zero)
    found = []
    for radius in radii:
        pgd = PGD(steps=steps, step_share=STEP_SHARE)
        ball = L2Ball(radius)
        way = descend(
            gradient, lambda v: gradient(v)[0], zero, ball, pgd, first=at_zero, score=False
        )
        found.append(way.x[0].float().cpu())
    return found


def _rows_of(batch: _Batch, rows: Sequence[int]) -> _Batch:
    """Some of a batch's rows, which stand together, without a copy."""
    ids, mask, clean = (part[rows[0] : rows[-1] + 1] for part in batch)
    return ids, mask, clean
