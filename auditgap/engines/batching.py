"""Which rows run together: packs of like length under a token budget, and left padding. How much of a
pack fits is `fitting`'s.

    for pack in packs([31, 30, 31, 90], batch_tokens=96, pad_tolerance=0.06):
        # [1, 0, 2], [3]: positions into the list, short rows first
        ...

`pad_tolerance` is the share of a batch that may be padding: padding is waste, and so are small
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from auditgap.engines.fitting import halving

T = TypeVar("T")
R = TypeVar("R")

#: Tokens that are decoded together: on a CPU, and where there is memory for more.
SPEAKING, SPEAKING_IN_MEMORY = 16384, 131072


def packs(
    lengths: Sequence[int], *, batch_tokens: int, pad_tolerance: float = 0.0, weight: int = 1
) -> list[list[int]]:
    """Split rows into packs of at most `batch_tokens` (padding counted), shortest first; a pack
    holds at least one row.

    `weight` is how many batch rows each item stands for (budgets × restarts).
    """
    found: list[list[int]] = []
    real = 0
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length = lengths[row]
        size = len(found[-1]) + 1 if found else 1
        fits = (
            bool(found)
            and size * length * weight <= batch_tokens
            and 1 - (real + length) / (size * length) <= pad_tolerance
        )
        if fits:
            found[-1].append(row)
            real += length
        else:
            found.append([row])
            real = length
    return found


@dataclass(frozen=True, slots=True)
class Packing:
    """How many tokens run together, and how much of that may be padding."""

    batch_tokens: int
    pad_tolerance: float = 0.06
    alone: bool = False  #: one row at a time, for a family whose numbers padding changes
    speaking_tokens: int = SPEAKING  #: likewise, where tokens are decoded

    @classmethod
    def on(
        cls, device: str, batch_tokens: int | None = None, pad_tolerance: float | None = None
    ) -> Packing:
        """What suits a device. Measured: a CPU's matrix products are fast from about 500 rows on,
        and beyond 2,000 its caches are not. An accelerator has as many as its memory holds of a
        pack (`fitting`), and decoding, which reads all weights for each token, wants many."""
        on_cpu = device == "cpu"
        speaking = SPEAKING if on_cpu or batch_tokens else SPEAKING_IN_MEMORY
        return cls(
            batch_tokens or (2048 if on_cpu else 16384),
            0.06 if pad_tolerance is None else pad_tolerance,
            speaking_tokens=max(batch_tokens or 0, speaking),
        )

    def packs(self, lengths: Sequence[int], weight: int = 1) -> list[list[int]]:
        if self.alone:
            return [[row] for row in range(len(lengths))]
        return packs(
            lengths, batch_tokens=self.batch_tokens, pad_tolerance=self.pad_tolerance, weight=weight
        )

    def speaking_packs(self, lengths: Sequence[int], least: int = 0) -> list[list[int]]:
        """Packs for decoding, which is bound by reading the weights: many rows at once, padding or
        not; of at `least` so many tokens."""
        if self.alone:
            return [[row] for row in range(len(lengths))]
        return packs(lengths, batch_tokens=max(self.speaking_tokens, least), pad_tolerance=0.5)


def left_pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [B, T], with the padding on the left."""
    width = max(len(s) for s in sequences)
    ids = torch.tensor([[pad_id] * (width - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def right_pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [B, K], with the padding on the right."""
    width = max(len(s) for s in sequences)
    ids = torch.tensor([list(s) + [pad_id] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, T] that count a row's real tokens from 0, whatever padding stands before
    them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def in_packs(run: Callable[[Sequence[int]], list[R]], packed: Sequence[Sequence[int]]) -> list[R]:
    """What `run` gives for the rows of each pack (`halving`), in the order of the rows 0 … n − 1,
    each of which is in one pack."""
    found: dict[int, R] = {}
    for pack in packed:
        found.update(zip(pack, halving(run, pack), strict=True))
    return [found[i] for i in range(len(found))]
