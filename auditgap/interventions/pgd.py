"""The latent attack: bounded PGD on the hidden states of one site, many prompts and budgets in one
batch.

    attack(engine, [Goal(rendered, target_ids, radii=(0.2, 0.6))], Site(15), PGD())

finds for each goal and radius the δ [T, D] with ‖δ‖∞ ≤ radius that makes the target likeliest (or,
for `maximise`, the least likely), from zero, by `descent` (paper, section 4 and appendix C.1). The
blocks below the site run once; each step runs only the blocks above it, with logits only where the
target stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from auditgap.engines.batching import left_pad, right_pad
from auditgap.engines.hf import HFEngine
from auditgap.engines.tensors import add, mean_nll
from auditgap.interventions.controls import generator, uniform
from auditgap.interventions.descent import PGD, Descent, LinfBall, descend
from auditgap.models import Rendered
from auditgap.types import Budget, Site

__all__ = ["PGD", "AttackResult", "Ball", "Elsewhere", "Goal", "Objective", "attack"]


@dataclass(frozen=True, eq=False)
class Goal:
    """One prompt, the token ids of the target, and the radii (absolute ∞-norms) to attack it
    with."""

    rendered: Rendered
    target: tuple[int, ...]
    radii: tuple[float, ...]
    maximise: bool = False
    warm: tuple[torch.Tensor, ...] | None = None  #: starts [T, D], one a radius, instead of zero
    #: [from, to) of the prompt's tokens that are edited; None: all of them
    span: tuple[int, int] | None = None
    #: whether the edit of the prompt's last token stands at the target's too (`Edit.goes_on`)
    goes_on: bool = False

    @property
    def on(self) -> tuple[int, ...]:
        """1 at each token that is edited, else 0."""
        n = len(self.rendered.ids)
        start, end = self.span or (0, n)
        return tuple(int(start <= t < end) for t in range(n))


@dataclass(frozen=True, eq=False)
class AttackResult:
    """The attack's result for one goal and radius. `delta` [T, D] is fp32 on the CPU; not `finite`:
    a gradient was not."""

    delta: torch.Tensor
    nll_clean: float
    nll_edited: float | None  #: at `delta`; None when it was not asked for
    finite: bool
    #: NLL at every iterate, the start first
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ball:
    """What a site's clean activations h [T, D] say of one prompt: its norm and scales. Template
    positions are left out."""

    h_norm: float  #: ‖h‖₂ over the user's own tokens
    rms: float  #: root mean square over the user's own tokens
    #: max |h| over every prompt position, template included (what the paper's release scales by)
    largest: float

    @classmethod
    def of(cls, h: torch.Tensor, content: Sequence[bool]) -> Ball:
        own = h[torch.tensor(content)].double()
        return cls(own.norm().item(), own.pow(2).mean().sqrt().item(), h.abs().max().item())

    @property
    def finite(self) -> bool:
        """Whether the activations were numbers at all; where they were not, nothing can be
        measured."""
        return math.isfinite(self.h_norm) and math.isfinite(self.largest)

    def radius(self, budget: Budget) -> float:
        """The budget as an absolute ∞-norm, rounded down to fp32 so that the projection cannot
        exceed it."""
        scale = {"rms": self.rms, "max": self.largest, "absolute": 1.0}[budget.unit]
        exact = budget.size * scale
        rounded = torch.tensor(exact, dtype=torch.float32)
        return (
            rounded if rounded.item() <= exact else torch.nextafter(rounded, torch.tensor(0.0))
        ).item()


@runtime_checkable
class Elsewhere(Protocol):
    """An engine whose model is in other processes, and so are the gradients: it attacks by
    itself."""

    def attack(
        self, goals: Sequence[Goal], site: Site, pgd: PGD, *, score: bool = True
    ) -> list[list[AttackResult]]: ...


def attack(
    engine: HFEngine | Elsewhere, goals: Sequence[Goal], site: Site, pgd: PGD, *, score: bool = True
) -> list[list[AttackResult]]:
    """Run the search for every goal; returns one result a radius for each goal, in order. Packs by
    length as needed.

    Without `score` the last iterate's NLL is not computed (one forward less), unless restarts or
    `best` need it. Targets may differ in length.
    """
    if isinstance(engine, Elsewhere):
        return engine.attack(goals, site, pgd, score=score)
    engine.self_test(site)
    found: dict[tuple[int, int], AttackResult] = {}

    def run(rows: Sequence[tuple[int, int]]) -> list[AttackResult]:
        """Rows are (goal, radius) pairs in order, so that halving can part even one prompt's
        budgets."""
        mine: dict[int, list[int]] = {}
        for i, r in rows:
            mine.setdefault(i, []).append(r)
        return [
            f
            for row in _attack(
                engine, [_only(goals[i], rs) for i, rs in mine.items()], site, pgd, score
            )
            for f in row
        ]

    lengths = [len(g.rendered.ids) + len(g.target) for g in goals]
    weight = max((len(g.radii) for g in goals), default=1) * pgd.restarts
    for pack in engine.packing.packs(lengths, weight):
        rows = [(i, r) for i in pack for r in range(len(goals[i].radii))]
        tokens = [lengths[i] * pgd.restarts for i, _ in rows]
        fitted = engine.fitting.run(("gradient", site), run, rows, tokens)
        found.update(zip(rows, fitted, strict=True))
    return [[found[i, r] for r in range(len(g.radii))] for i, g in enumerate(goals)]


def _only(goal: Goal, rows: Sequence[int]) -> Goal:
    """The goal with some of its radii."""
    warm = None if goal.warm is None else tuple(goal.warm[r] for r in rows)
    return replace(goal, radii=tuple(goal.radii[r] for r in rows), warm=warm)


class Objective:
    """The target's NLL of N goals at a site, as a function of their edits, with the trunk run once.

    T prompt tokens (padded on the left), K target tokens (padded on the right), D width. A row is
    one edit [T, D] of goal number `of`.
    """

    def __init__(self, engine: HFEngine, goals: Sequence[Goal], site: Site) -> None:
        self.engine, self.site = engine, site
        device = engine.device
        prompts, real = left_pad([g.rendered.ids for g in goals], engine.pad_id, device)
        target, self.scored = right_pad([g.target for g in goals], engine.pad_id, device)
        self.ids = torch.cat([prompts, target], 1)  # [N, T + K]
        self.mask = torch.cat([real, self.scored], 1)
        self.t, self.k = prompts.shape[1], target.shape[1]
        on, _ = left_pad([g.on for g in goals], 0, device)
        self.on = on[:, :, None].float()  #: [N, T, 1], 1 where a prompt has a token to edit
        #: [N, 1, 1], 1 where the last token's edit goes on
        self.goes_on = torch.tensor([[[float(g.goes_on)]] for g in goals], device=device)
        self.any_goes_on = any(g.goes_on for g in goals)  # known here: to ask a device is to wait
        #: [N]; +1 where the NLL is to fall
        self.sign = torch.tensor([-1.0 if g.maximise else 1.0 for g in goals], device=device)
        self.clean = engine.capture(site, self.ids, self.mask)  # [N, T + K, D]

    def zero(self) -> torch.Tensor:
        """No edit: [N, T, D]."""
        return torch.zeros(len(self.ids), self.t, self.clean.shape[-1], device=self.ids.device)

    def nll(self, delta: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """Mean NLL of the targets [B] under the rows' edits [B, T, D]; differentiable."""
        t, ids, mask = self.t, self.ids[of], self.mask[of]
        behind = self.clean[of, t:]
        if self.any_goes_on:
            behind = add(behind, (delta[:, -1:] * self.goes_on[of]).expand_as(behind))
        hidden = torch.cat([add(self.clean[of, :t], delta), behind], 1)
        logits = self.engine.logits_from(self.site, hidden, ids, mask, keep=self.k + 1)[:, :-1]
        return mean_nll(logits, ids[:, t:], self.scored[of])

    @torch.no_grad()
    def value(self, delta: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """The loss [B], which falls as the attack comes nearer to what it wants."""
        return self.sign[of] * self.engine.agreed(self.nll(delta, of))

    def gradient(self, delta: torch.Tensor, of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss [B] and its gradient [B, T, D]."""
        with torch.enable_grad():
            leaf = delta.detach().requires_grad_(True)
            nll = self.nll(leaf, of)
            # a model that cuts its graph off has a gradient too: 0
            slope = torch.zeros_like(leaf)
            if nll.requires_grad:
                (slope,) = torch.autograd.grad(
                    nll.sum(), leaf, allow_unused=True, materialize_grads=True
                )
        sign = self.sign[of]
        agreed = self.engine.agreed
        return sign * agreed(nll.detach()), sign[:, None, None] * agreed(slope)


def _attack(
    engine: HFEngine, goals: Sequence[Goal], site: Site, pgd: PGD, score: bool
) -> list[list[AttackResult]]:
    """The search on one batch: N goals, B = Σ radii × restarts rows."""
    objective = Objective(engine, goals, site)
    rows = [
        (n, r)
        for n, g in enumerate(goals)
        for r in range(len(g.radii))
        for _ in range(pgd.restarts)
    ]
    of = torch.tensor([n for n, _ in rows], device=engine.device)
    radius = torch.tensor([goals[n].radii[r] for n, r in rows], device=engine.device)
    ball = LinfBall(radius[:, None, None], objective.on[of])
    zero = objective.zero()
    start = _starts(goals, rows, pgd, objective.t, zero.shape[-1], engine.device) * ball.on
    # at δ = 0 every budget sees the same gradient: it is computed once a prompt, and gives the
    # clean NLL besides
    clean, slope = objective.gradient(zero, torch.arange(len(goals), device=engine.device))
    found = descend(
        lambda delta: objective.gradient(delta, of),
        lambda delta: objective.value(delta, of),
        start,
        ball,
        pgd,
        first=(clean[of], slope[of]) if bool((start == 0).all()) else None,
        score=score or pgd.restarts > 1,
    )
    return _collect(goals, rows, found, objective.sign, clean)


def _starts(
    goals: Sequence[Goal],
    rows: Sequence[tuple[int, int]],
    pgd: PGD,
    t: int,
    width: int,
    device: torch.device,
) -> torch.Tensor:
    """Starting δ [B, T, D]: zero (or the goal's warm start) for the first restart, uniform in the
    ball for the others."""
    starts = torch.zeros(len(rows), t, width)
    for b, (n, r) in enumerate(rows):
        goal, length = goals[n], len(goals[n].rendered.ids)
        if b % pgd.restarts:
            # each prompt draws its own, or all would miss together
            rng = generator(pgd.seed, "restart", b % pgd.restarts, goal.rendered.ids)
            starts[b, t - length :] = uniform(length, width, goal.radii[r], rng)
        elif goal.warm is not None:
            starts[b, t - length :] = goal.warm[r].clamp(-goal.radii[r], goal.radii[r])
    return starts.to(device)


def _collect(
    goals: Sequence[Goal],
    rows: Sequence[tuple[int, int]],
    found: Descent,
    sign: torch.Tensor,
    clean: torch.Tensor,
) -> list[list[AttackResult]]:
    """Per goal and radius the restart with the lowest loss; δ without its padding."""
    signs = sign.tolist()
    before, finite = clean.tolist(), found.finite.tolist()
    loss = None if found.loss is None else found.loss.tolist()
    curves = found.curve.T.tolist()
    kept: list[dict[int, tuple[float, AttackResult]]] = [{} for _ in goals]
    for b, (n, r) in enumerate(rows):
        value = 0.0 if loss is None else loss[b]
        if r not in kept[n] or value < kept[n][r][0]:
            own = found.x[b, found.x.shape[1] - len(goals[n].rendered.ids) :].float().cpu().clone()
            kept[n][r] = (
                value,
                AttackResult(
                    own,
                    signs[n] * before[n],
                    None if loss is None else signs[n] * value,
                    finite[b],
                    tuple(signs[n] * one for one in curves[b]),
                ),
            )
    return [[f[r][1] for r in sorted(f)] for f in kept]
