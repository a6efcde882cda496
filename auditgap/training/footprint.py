"""What a training loss needs in memory beside the model, its gradients and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


def nothing(n_blocks: int, width: int) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class Footprint:
    """By default that of a loss of NLL and KL against a frozen reference."""

    sequences: int = 1  #: a row makes in a batch
    #: fp32 buffers of a chunk of logits that `objective.token_losses` keeps at once: 3 for NLL
    #: alone, 4 with KL
    chunk_buffers: int = 4
    #: whether the base's output head is kept as well, where the model's own is trained
    reference_head: bool = True
    #: whether the model runs besides: for its answers and hidden states before the first step, and
    #: to speak while it is trained
    speaks: bool = True
    #: (blocks, width) -> bytes of what is trained alongside the model, by name
    alongside: Callable[[int, int], Mapping[str, float]] = nothing
