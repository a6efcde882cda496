"""Heads that share keys and values, for one new token: the plain way, with every key copied to its
heads, gives the same numbers, and no copy is made."""

from __future__ import annotations

from inspect import signature

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, cache_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import repeat_kv

from auditgap.engines import caches
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


def subject(heads: int = H // G) -> torch.nn.Module:
    """An attention module, marked as a subject's are."""
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups, module.layer_idx = True, heads, 0
    setattr(module, attention._MARK, True)
    return module


def test_a_bias_that_only_transformers_knows_is_not_left_out():
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, G, T, D), torch.randn(B, G, T, D)
    bias = torch.randn(1, H, T, T)
    plain, _ = sdpa_attention_forward(subject(), q, k, v, None, position_bias=bias)
    out, _ = attention._sdpa(subject(), q, k, v, None, position_bias=bias)
    without, _ = attention._sdpa(subject(), q, k, v, None)
    assert torch.equal(out, plain) and not torch.allclose(out, without, atol=1e-3)


def test_whatever_transformers_takes_and_we_do_not_is_handed_on(monkeypatch):
    """Of the release that is installed, and of one that takes more than it."""
    given = []

    def newer(module, query, key, value, attention_mask, dropout=0.0, sinks=None, **more):
        given.append({"dropout": dropout, "sinks": sinks, **more})
        return query, None

    q = torch.randn(B, H, 1, D)
    monkeypatch.setattr(attention, "sdpa_attention_forward", newer)
    monkeypatch.setattr(attention, "_THEIRS", attention._not_ours())
    attention._sdpa(subject(), q, q, q, None, layer_idx=3)
    assert not given, "what neither knows keeps nobody from the short way"
    for name, value in (("sinks", torch.ones(H)), ("dropout", 0.1)):
        attention._sdpa(subject(), q, q, q, None, **{name: value})
        assert given.pop()[name] is value
    monkeypatch.undo()
    theirs, ours = (set(signature(f).parameters) for f in (sdpa_attention_forward, attention._sdpa))
    assert theirs - ours == attention._THEIRS


class Compressed(cache_utils.DynamicLayer):
    """A family's own layer, which holds more than the methods that it inherits know of."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.arange(2.0).reshape(2, 1)
        self.more = {"a": [torch.arange(2.0).reshape(2, 1)], "n": 3}


@pytest.mark.parametrize("kind", [cache_utils.DynamicLayer, Compressed])
def test_a_cache_of_any_class_keeps_the_rows_of_all_that_it_holds(kind):
    held, layer = DynamicCache(), kind()
    keys = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, G, T, D).contiguous()
    layer.update(keys, keys + 10)
    held.layers = [layer]
    caches.select(held, [1, 0, 1])
    assert layer.keys[:, 0, 0, 0].tolist() == [1, 0, 1]
    assert layer.values[:, 0, 0, 0].tolist() == [11, 10, 11]
    if kind is Compressed:
        assert layer.state[:, 0].tolist() == layer.more["a"][0][:, 0].tolist() == [1, 0, 1]


def test_a_linear_layer_keeps_its_rows_though_it_has_no_keys():
    """No method of a subclass is taken for granted in a cache's layer."""
    layer = cache_utils.LinearAttentionLayer()
    state = torch.arange(2.0).reshape(2, 1, 1).expand(2, 3, 4).contiguous()
    layer.update_conv_state(state)
    held = DynamicCache()
    held.layers = [layer]
    caches.select(held, [1, 0, 1])
    found = layer.conv_states
    found = next(iter(found.values())) if isinstance(found, dict) else found
    assert found[:, 0, 0].tolist() == [1, 0, 1]
