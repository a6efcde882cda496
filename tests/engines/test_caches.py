"""The cache that grows in place against transformers' own, which copies itself at every token."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from auditgap.engines import caches
from auditgap.engines.caches import Growing, closed_up, growing, select
from auditgap.engines.hf import HFEngine

H, D = 2, 4


@given(
    left=st.lists(st.booleans(), min_size=1, max_size=40).map(
        lambda on: [i for i, o in enumerate(on) if o]
    )
)
def test_the_last_rows_take_the_places_of_those_that_are_gone(left: list[int]) -> None:
    order = closed_up(left)
    assert sorted(order) == left
    assert all(at == to or at >= len(left) for to, at in enumerate(order))


#: Tokens that are written, or rows that are kept: gone, in another order, shared out
STEPS = st.one_of(
    st.integers(1, 40).map(lambda n: ("write", n)),
    st.randoms(use_true_random=False).map(lambda r: ("keep", r)),
    st.randoms(use_true_random=False).map(lambda r: ("close up", r)),
    st.just(("copy", None)),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=12), n=st.integers(1, 6))
def test_it_holds_what_transformers_own_layer_holds(steps: list, n: int) -> None:
    ours, theirs = Growing(), DynamicLayer()
    torch.manual_seed(0)
    for what, how in [("write", 3), *steps]:
        held = DynamicCache()
        held.layers = [ours]
        if what == "write":
            new = torch.randn(2, n, H, how, D)
            for mine, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(mine, wanted)
        elif what == "copy":  # as the target is scored on
            before, ours = ours, copy.deepcopy(ours)
            before.keys.zero_()
            before.update(*torch.zeros(2, n, H, 1, D))
        else:
            rows = (
                how.choices(range(n), k=how.randint(1, 6))
                if what == "keep"
                else closed_up(sorted(how.sample(range(n), how.randint(1, n))))
            )
            select(held, rows)
            theirs.reorder_cache(torch.tensor(rows))
            n = len(rows)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_token_is_written_behind_the_others_and_rows_leave_in_place() -> None:
    layer = Growing()
    layer.update(*torch.randn(2, 5, H, 7, D))
    at = layer.keys.data_ptr()
    layer.update(*torch.randn(2, 5, H, 1, D))
    layer.keep(closed_up([0, 2, 4]))
    assert layer.keys.shape == (3, H, 8, D) and layer.keys.data_ptr() == at
    for _ in range(caches._ROOM - 1):
        layer.update(*torch.randn(2, 3, H, 1, D))
    assert layer.keys.data_ptr() == at
    layer.update(*torch.randn(2, 3, H, 1, D))
    assert layer.keys.data_ptr() != at and len(layer.rooms["keys"][0]) == 3  # what left is let go


def test_keys_that_another_owner_put_in_its_place_are_not_written_over() -> None:
    layer = Growing()
    layer.update(*torch.randn(2, 2, H, 3, D))
    layer.crop(-1)
    cropped = layer.keys.clone()
    foreign = torch.randn(2, H, 2, D)
    assert torch.equal(layer.update(*torch.zeros(2, 2, H, 1, D))[0][:, :, :2], cropped)
    layer.keys = foreign
    kept = foreign.clone()
    assert torch.equal(layer.update(*torch.zeros(2, 2, H, 1, D))[0][:, :, :2], kept)
    layer.keys = foreign
    layer.keep(closed_up([1]))
    assert torch.equal(layer.keys, kept[[1]]) and torch.equal(foreign, kept)
    layer.reset()
    assert layer.update(*torch.ones(2, 4, H, 1, D))[0].shape == (4, H, 1, D)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_only_full_attention_is_replaced(family: str) -> None:
    config = tiny.load(family).model.config
    plain, ours = DynamicCache(config=config).layers, growing(config).layers
    assert [type(o) for o in ours] == [
        Growing if type(p) is DynamicLayer else type(p) for p in plain
    ]
    assert family != "llama" or all(isinstance(layer, Growing) for layer in ours)


def test_texts_are_those_of_the_cache_that_copies_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end at other steps, so that the batch closes up again and again."""
    engine = HFEngine(tiny.load("llama"))
    ids = torch.randint(3, 60, (12, 9))
    mask = torch.ones_like(ids)

    class Ends:
        """Greedy, but row r ends after 2 + 5 r steps."""

        def __init__(self) -> None:
            self.step = 0

        def __call__(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
            self.step += 1
            stop = next(iter(engine.loaded.stop_ids))
            logits[:, list(engine.loaded.stop_ids)] = -9.0
            ends = torch.tensor([self.step >= 2 + 5 * r for r in rows])
            return torch.where(ends, stop, logits.argmax(-1))

    def said() -> list[list[int]]:
        cache = engine.new_cache()
        with torch.inference_mode():
            logits = engine.forward(ids, mask, keep=1, cache=cache).logits
            return [w.ids for w in engine.decode(cache, logits, mask, 90, Ends())]

    ours = said()
    monkeypatch.setattr("auditgap.engines.hooked.growing", lambda c: DynamicCache(config=c))
    assert ours == said() and [len(one) for one in ours] == [1 + 5 * r for r in range(12)]
