"""Projected descent: the one loop behind every search for an edit, in a ball of either norm.

    found = descend(gradient, value, start, LinfBall(radius, on), PGD())

Two schedules. `constant` is the paper's: the same step every time, along the sign of the gradient
(arXiv 2606.08044, section 4). `decreasing` is stronger for the same number of gradients: step k of
K moves by radius · (1 + cos(πk / K)), from twice the radius down to almost nothing, along the sign
of the momentum m ← ½ m + g / mean|g|. Auto-PGD (Croce & Hein 2020) adapts its step too, but needs
about 100 steps for its checkpoints to mean anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from auditgap.errors import UsageError

Schedule = Literal["constant", "decreasing"]
Iterate = Literal["last", "best"]

#: How much of the old momentum a `decreasing` search keeps.
MOMENTUM = 0.5

#: x [B, …] -> its loss [B]
Value = Callable[[torch.Tensor], torch.Tensor]
#: x [B, …] -> its loss [B] and the loss's gradient [B, …]
Gradient = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

#: Decreasing steps after which a position has no more values than a byte can tell apart.
_FEW_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class PGD:
    """How hard a search tries. The defaults are the paper's."""

    steps: int = 10
    schedule: Schedule = "constant"
    step_share: float = 0.25  #: of the radius, the size of a `constant` step
    #: beyond the first (zero) start, uniform random starts; the best final loss wins
    restarts: int = 1
    iterate: Iterate = "last"  #: or "best": the iterate with the lowest loss seen
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or not 0 < self.step_share <= 1:
            raise UsageError(
                "--steps and --restarts must be at least 1, and the step share in (0, 1]."
            )
        if self.iterate not in ("last", "best"):
            raise UsageError(f"iterate must be last or best; {self.iterate!r} came.")
        if self.schedule not in ("constant", "decreasing"):
            raise UsageError(
                f"The schedule must be constant or decreasing; {self.schedule!r} came."
            )

    def share(self, step: int) -> float:
        """The size of this step as a share of the radius."""
        if self.schedule == "constant":
            return self.step_share
        return 1 + math.cos(math.pi * step / self.steps)

    def direction(self, before: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """What this step goes against: the gradient [B, …], or with it the direction of the step
        before."""
        if self.schedule == "constant":
            return gradient
        mean = gradient.abs().flatten(1).mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
        return MOMENTUM * before + gradient / _along(mean, gradient)


class Feasible(Protocol):
    """A set of allowed points: how to step in it, and back into it."""

    def step(self, x: torch.Tensor, against: torch.Tensor, share: float) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class LinfBall:
    """‖x‖∞ ≤ radius [B, 1, 1], and 0 where `on` [B, T, 1] is 0. Steps along signs."""

    radius: torch.Tensor
    on: torch.Tensor

    def step(self, x: torch.Tensor, against: torch.Tensor, share: float) -> torch.Tensor:
        moved = x - (share * self.radius) * against.sign()
        return torch.minimum(torch.maximum(moved, -self.radius), self.radius) * self.on


@dataclass(frozen=True, eq=False)
class L2Ball:
    """‖x‖₂ ≤ radius for x [B, D]. Steps along the normalised direction."""

    radius: float

    def step(self, x: torch.Tensor, against: torch.Tensor, share: float) -> torch.Tensor:
        tiny = torch.finfo(torch.double).tiny
        length = against.double().norm(dim=1, keepdim=True).clamp(min=tiny)
        moved = x - (share * self.radius / length).to(x.dtype) * against
        length = moved.double().norm(dim=1, keepdim=True).clamp(min=tiny)
        return (self.radius / length).clamp(max=1.0).to(x.dtype) * moved


@dataclass(frozen=True, eq=False)
class Descent:
    """What a search kept, `x` [B, …], its loss [B] (None when it was not asked for), and the way.

    `curve` [steps (+ 1), B]: the loss of every iterate, the start first; not `finite` [B]: a loss
    or a gradient was no number, and the row stayed where it was.
    """

    x: torch.Tensor
    loss: torch.Tensor | None
    curve: torch.Tensor
    finite: torch.Tensor


def descend(
    gradient: Gradient,
    value: Value,
    start: torch.Tensor,
    ball: Feasible,
    pgd: PGD,
    *,
    first: tuple[torch.Tensor, torch.Tensor] | None = None,
    score: bool = True,
) -> Descent:
    """Minimise the loss of every row over the ball, from `start` [B, …].

    `first`: the start's loss and gradient, where they are known. Without `score` the last iterate
    of an `iterate="last"` search is not evaluated, which saves a forward. `pgd.restarts` is the
    caller's: every start is a row.
    """
    x, momentum = start, torch.zeros_like(start)
    best, best_loss = start, torch.full((len(start),), math.inf, device=start.device)
    finite = torch.ones(len(start), dtype=torch.bool, device=start.device)
    curve = []
    for k in range(pgd.steps):
        loss, grad = first if k == 0 and first is not None else gradient(x)
        curve.append(loss)
        finite = finite & torch.isfinite(loss) & torch.isfinite(grad).flatten(1).all(1)
        if pgd.iterate == "best":
            best, best_loss = _lower(best, best_loss, x, loss)
        momentum = pgd.direction(momentum, grad)
        x = torch.where(_along(finite, x), ball.step(x, momentum, pgd.share(k)), x)
    if not (score or pgd.iterate == "best"):
        return Descent(x, None, torch.stack(curve), finite)
    last = value(x)
    curve.append(last)
    if pgd.iterate == "best":
        x, last = _lower(best, best_loss, x, last)
    return Descent(x, last, torch.stack(curve), finite)


def _lower(
    best: torch.Tensor, best_loss: torch.Tensor, x: torch.Tensor, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wins = loss < best_loss
    return torch.where(_along(wins, x), x, best), torch.where(wins, loss, best_loss)


def _along(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One number a row [B], in a shape that goes with x [B, …]."""
    return rows.view(-1, *[1] * (x.dim() - 1))


def bytes_a_value(pgd: PGD) -> float:
    """That edits found in this way are likely to take (`engines.coded`): one and their books, where
    a search from zero makes few values."""
    is_few = pgd.restarts == 1 and (pgd.schedule == "constant" or pgd.steps <= _FEW_STEPS)
    return 1.1 if is_few else 4.0
