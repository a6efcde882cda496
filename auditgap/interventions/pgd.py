"""The latent attack: bounded PGD on the hidden states of one site, many prompts and budgets in one
batch.

    attack(engine, [Goal(rendered, target_ids, radii=(0.2, 0.6))], Site(15), PGD())

finds for each goal and radius the δ [T, D] with ‖δ‖∞ ≤ radius that makes the target likeliest (or,
for `maximise`, the least likely): zero start, sign gradient, step radius/4, projection after every
step (paper, section 4 and appendix C.1). The blocks below the site run once; each step runs only
the blocks above it, with logits only where the target stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from auditgap.engines.batching import halving, left_pad
from auditgap.engines.hf import HFEngine, add, mean_nll
from auditgap.errors import UsageError
from auditgap.models import Rendered
from auditgap.types import Budget, Site


@dataclass(frozen=True, kw_only=True)
class PGD:
    """How hard the search tries. The defaults are the paper's."""

    steps: int = 10
    step_share: float = 0.25  #: step size as a share of the radius
    #: beyond the first (zero) start, uniform random starts; the best final NLL wins
    restarts: int = 1
    iterate: str = "last"  #: or "best": the iterate with the best NLL seen
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or not 0 < self.step_share <= 1:
            raise UsageError(
                "--steps and --restarts must be at least 1, and the step share in (0, 1]."
            )
        if self.iterate not in ("last", "best"):
            raise UsageError(f"iterate must be last or best; {self.iterate!r} came.")


@dataclass(frozen=True, eq=False)
class Goal:
    """One prompt, the token ids of the target, and the radii (absolute ∞-norms) to attack it
    with."""

    rendered: Rendered
    target: tuple[int, ...]
    radii: tuple[float, ...]
    maximise: bool = False
    warm: tuple[torch.Tensor, ...] | None = None  #: starts [T, D], one a radius, instead of zero


@dataclass(frozen=True, eq=False)
class AttackResult:
    """The attack's result for one goal and radius. `delta` [T, D] is fp32 on the CPU; not `finite`:
    a gradient was not."""

    delta: torch.Tensor
    nll_clean: float
    nll_edited: float | None  #: None when it was not asked for
    finite: bool


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
    """Run the search for every goal; returns one Found a radius for each goal, in order. Packs by
    length as needed.

    Without `score` the last iterate's NLL is not computed (one forward less), unless restarts or
    `best` need it.
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
        # the target stands at the same columns in a batch
        by_target: dict[int, list[tuple[int, int]]] = {}
        for i in pack:
            by_target.setdefault(len(goals[i].target), []).extend(
                (i, r) for r in range(len(goals[i].radii))
            )
        for rows in by_target.values():
            found.update(zip(rows, halving(run, rows), strict=True))
    return [[found[i, r] for r in range(len(g.radii))] for i, g in enumerate(goals)]


def _only(goal: Goal, rows: Sequence[int]) -> Goal:
    """The goal with some of its radii."""
    warm = None if goal.warm is None else tuple(goal.warm[r] for r in rows)
    return replace(goal, radii=tuple(goal.radii[r] for r in rows), warm=warm)


def _attack(
    engine: HFEngine, goals: Sequence[Goal], site: Site, pgd: PGD, score: bool
) -> list[list[AttackResult]]:
    """The search on one batch: N goals, B = Σ radii × restarts rows, T prompt tokens, K target
    tokens, D width."""
    device = engine.device
    # [N, T + K]
    ids, mask = left_pad([(*g.rendered.ids, *g.target) for g in goals], engine.pad_id, device)
    k = len(goals[0].target)
    clean = engine.capture(site, ids, mask)  # [N, T + K, D]
    t = ids.shape[1] - k
    sign = torch.tensor([1.0 if g.maximise else -1.0 for g in goals], device=device)

    rows = [
        (n, r)
        for n, g in enumerate(goals)
        for r in range(len(g.radii))
        for _ in range(pgd.restarts)
    ]
    source = torch.tensor([n for n, _ in rows], device=device)
    radius = torch.tensor([goals[n].radii[r] for n, r in rows], device=device)[:, None, None]
    on_prompt = mask[:, :t, None].float()[source]
    delta = _starts(goals, rows, pgd, t, clean.shape[-1], device) * on_prompt

    def loss(delta: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """Mean target NLL [B'] of the rows `of`, under their δ."""
        hidden = torch.cat([add(clean[of, :t], delta), clean[of, t:]], 1)
        logits = engine.logits_from(site, hidden, ids[of], mask[of], keep=k + 1)[:, :-1]
        return mean_nll(logits, ids[of, t:], torch.ones_like(ids[of, t:]))

    def gradient(delta: torch.Tensor, of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaf = delta.detach().requires_grad_(True)
            nll = loss(leaf, of)
            return engine.agreed(nll.detach()), engine.agreed(
                torch.autograd.grad(nll.sum(), leaf)[0]
            )

    everyone = torch.arange(len(goals), device=device)
    # at δ = 0 every budget sees the same gradient: it is computed once a prompt, and gives the
    # clean NLL besides
    nll_clean, gradient_at_zero = gradient(
        torch.zeros(len(goals), t, clean.shape[-1], device=device), everyone
    )
    finite = torch.ones(len(rows), dtype=torch.bool, device=device)
    best, best_nll = delta, torch.full((len(rows),), float("inf"), device=device)
    cold = bool((delta == 0).all())
    for step in range(pgd.steps):
        if step == 0 and cold:
            nll, grad = nll_clean[source], gradient_at_zero[source]
        else:
            nll, grad = gradient(delta, source)
        finite &= torch.isfinite(grad).flatten(1).all(1) & torch.isfinite(nll)
        if pgd.iterate == "best":
            best, best_nll = _better(best, best_nll, delta, -sign[source] * nll)
        moved = delta + sign[source, None, None] * (pgd.step_share * radius) * grad.sign()
        moved = torch.minimum(torch.maximum(moved, -radius), radius) * on_prompt
        # a row with a broken gradient stays where it was
        delta = torch.where(finite[:, None, None], moved, delta)
    if not (score or pgd.restarts > 1 or pgd.iterate == "best"):
        return _collect(goals, rows, delta, None, nll_clean, finite)
    with torch.no_grad():
        last = -sign[source] * engine.agreed(loss(delta, source))
    if pgd.iterate == "best":
        delta, last = _better(best, best_nll, delta, last)
    return _collect(goals, rows, delta, -sign[source] * last, nll_clean, finite)


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
            generator = torch.Generator().manual_seed(pgd.seed * 1_000_003 + b % pgd.restarts)
            starts[b, t - length :] = (
                torch.rand(length, width, generator=generator) * 2 - 1
            ) * goal.radii[r]
        elif goal.warm is not None:
            starts[b, t - length :] = goal.warm[r].clamp(-goal.radii[r], goal.radii[r])
    return starts.to(device)


def _better(
    best: torch.Tensor, best_score: torch.Tensor, delta: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wins = score < best_score
    return torch.where(wins[:, None, None], delta, best), torch.where(wins, score, best_score)


def _collect(
    goals: Sequence[Goal],
    rows: Sequence[tuple[int, int]],
    delta: torch.Tensor,
    nll: torch.Tensor | None,
    nll_clean: torch.Tensor,
    finite: torch.Tensor,
) -> list[list[AttackResult]]:
    """Per goal and radius the restart with the best NLL; δ without its padding."""
    found: list[dict[int, tuple[float, AttackResult]]] = [{} for _ in goals]
    for b, (n, r) in enumerate(rows):
        edited = None if nll is None else nll[b].item()
        value = 0.0 if edited is None else -edited if goals[n].maximise else edited
        if r not in found[n] or value < found[n][r][0]:
            own = delta[b, delta.shape[1] - len(goals[n].rendered.ids) :].float().cpu().clone()
            found[n][r] = (value, AttackResult(own, nll_clean[n].item(), edited, bool(finite[b])))
    return [[f[r][1] for r in sorted(f)] for f in found]
