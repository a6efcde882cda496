"""Small things that engines and attacks do with tensors: adding an edit, aligning edits with a
left-padded batch, and the mean NLL of answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def token_nll(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """NLL [B, n] of the first n tokens [B, K], which logits [B, n, V] predict. In fp32."""
    tokens = tokens[:, : logits.shape[1]]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens.flatten(), reduction="none"
    ).view_as(tokens)


def mean_nll(logits: torch.Tensor, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean NLL [B] over each row's real tokens; logits [B, K, V] predict tokens [B, K]. In fp32."""
    return (token_nll(logits, tokens) * real).sum(1) / real.sum(1)


def add(h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """h + δ, added in fp32 and rounded once to the model's dtype."""
    return h + delta if h.dtype == delta.dtype else (h.float() + delta).to(h.dtype)


def stack(deltas: Sequence[torch.Tensor], width: int, device: torch.device) -> torch.Tensor:
    """Edits [T_i, D] as one [B, width, D] tensor, aligned on the right; padding positions get no
    edit."""
    return torch.stack(
        [nn.functional.pad(d.to(device), (0, 0, width - d.shape[0], 0)) for d in deltas]
    )
