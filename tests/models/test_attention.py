"""Heads that share keys and values, for one new token: the plain way, with every key copied to its
heads, gives the same numbers, and no copy is made."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import repeat_kv

from auditgap.models import attention

B, H, G, T, D = 3, 8, 2, 7, 16


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not any(
            isinstance(a, torch.Tensor)
            and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            for a in args
        ):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("masked", ["no mask", "bool", "float"])
def test_folded_heads_are_the_plain_ones(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, G, T, D), torch.randn(B, G, T, D)
    mask = None
    if masked != "no mask":
        mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
        mask[0, ..., :3] = False
        if masked == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, repeat_kv(k, H // G), repeat_kv(v, H // G), attn_mask=mask, scale=0.3
    )
    with Largest() as made:
        out = attention.folded(q, k, v, mask, 0.3)
    assert torch.allclose(out, plain.transpose(1, 2), atol=1e-6) and out.shape == (B, 1, H, D)
    assert made.numbers <= max(q.numel(), B * G * (H // G) * T) < k.numel() * H // G


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_padded_step_folds_in_every_family_and_changes_nothing(family, monkeypatch):
    loaded = tiny.load(family)
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    calls = []
    plain = attention.folded

    def step(on: bool) -> torch.Tensor:
        monkeypatch.setattr(attention, "_folds", folds if on else lambda *_: False)
        cache = DynamicCache(config=loaded.model.config)
        loaded.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        return loaded.model(
            input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache
        ).logits

    folds = attention._folds
    monkeypatch.setattr(attention, "folded", lambda *a: calls.append(1) or plain(*a))
    with torch.inference_mode():
        assert torch.allclose(step(True), step(False), atol=1e-4)
    assert len(calls) == len(loaded.blocks)
