"""Attention as every subject is run with it: transformers' SDPA, and faster ways to the same numbers
where heads share keys and values."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

#: On the attention modules of a subject; anyone else's model in this process is left as it is.
_MARK = "_auditgap_shares_heads"


def use(model: PreTrainedModel) -> None:
    """SDPA, or eager attention where a family has none, or would lose its logit soft-cap by it.

    Both keep the names that transformers gives them: families look at the name, and run without
    their sparse attention under another.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    try:
        model.set_attn_implementation("eager" if capped else "sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
    for module in model.modules():
        setattr(module, _MARK, True)


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA, but in a subject the shared key/value heads stay shared: for a new token
    everywhere, and on a CPU under every mask (five times faster decoding there). transformers would
    copy the whole cache once a head that shares it, in every block at every token."""
    ours = getattr(module, _MARK, False) and not dropout
    if ours and all(kwargs.get(name) is None for name in _THEIRS):
        if _folds(query, key, attention_mask):
            return folded(query, key, value, attention_mask, scaling), None
        ours = query.device.type == "cpu"
    else:
        ours = False
    if not ours:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        is_causal=causal and attention_mask is None and query.shape[2] > 1,
    )
    return out.transpose(1, 2).contiguous(), None


def _not_ours() -> frozenset[str]:
    theirs, ours = (signature(f).parameters.values() for f in (sdpa_attention_forward, _sdpa))
    return frozenset(p.name for p in theirs if p.kind is not p.VAR_KEYWORD) - {p.name for p in ours}


#: What transformers' SDPA takes and nothing here does, in the release that is installed: where it is
#: given, all is handed on.
_THEIRS = _not_ours()


def _folds(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether this is one new token whose heads share keys, all under the same mask."""
    shares = query.shape[2] == 1 and query.shape[1] != key.shape[1]
    return shares and (mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1))


def folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention [B, 1, H, D] of one token's queries [B, H, 1, D] to keys and values [B, G, T, D]: the
    H/G heads that share a key stand where further tokens would, so that nothing is copied. `mask`
    [B, 1, 1, T]."""
    b, h, _, d = query.shape
    grouped = query.reshape(b, key.shape[1], h // key.shape[1], d)
    out = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scale
    )
    return out.reshape(b, 1, h, value.shape[-1])


AttentionInterface.register("sdpa", _sdpa)
