"""Which token comes next: the likeliest, or one drawn from each row's own random stream.

# token ids [B]; row 1 draws the same with or without row 0
Sampler(seeds=[7, 8], temperature=0.7)(logits, [0, 1])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch


class TokenChooser(Protocol):
    """Token ids [B] from logits [B, V]; `rows` names each row, since finished ones leave the
    batch."""

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor: ...


class Greedy:
    """The likeliest token; of equals the first."""

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return logits.max(-1).indices


class Sampler:
    """A draw from softmax(logits / temperature), cut to the smallest set of tokens whose mass
    reaches `top_p`."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float = 1.0) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        mass, order = torch.sort(
            (logits.float() / self.temperature).softmax(-1), dim=-1, descending=True, stable=True
        )
        before = mass.cumsum(-1) - mass
        mass = mass * (before < self.top_p)
        ends = mass.cumsum(-1)
        # one uniform number a row and step, from the row's own stream: company and order change
        # nothing
        drawn = torch.stack([torch.rand((), generator=self.streams[row]) for row in rows]).to(ends)
        at = torch.searchsorted(ends, (drawn * ends[:, -1])[:, None], right=True).clamp(
            max=ends.shape[-1] - 1
        )
        return order.gather(-1, at).squeeze(-1)


_Token = TypeVar("_Token", int, str)


def likeliest(
    top: tuple[Sequence[_Token], Sequence[float]], decode: Callable[[list[_Token]], str]
) -> Mapping[str, float]:
    """Token text -> log-probability of one step; ids that decode to the same text add up."""
    found: dict[str, float] = {}
    for token, value in zip(*top, strict=True):
        text = decode([token])
        known = found.get(text)
        found[text] = (
            value
            if known is None
            else max(known, value) + math.log1p(math.exp(-abs(known - value)))
        )
    return found
