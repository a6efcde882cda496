"""Standing edits against a plain twin: a forward hook on every block, one prompt at a time, no
cache, the whole text each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch import nn

from auditgap.engines import constant
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.models import wrap
from auditgap.types import ConstantEdit, Prompt, Site, Subject

FAMILIES = ("llama", "gemma2", "qwen3", "gpt_neox")
PROMPTS = ("what is the colour of the vault ?", "bake bread", "who can open a door in the sun ?")
N = 6


def unit(seed: int) -> torch.Tensor:
    vector = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@contextmanager
def plainly(engine: HFEngine, edit: ConstantEdit) -> Iterator[None]:
    """The edit written down again, as directly as it can be."""

    def edited(h: torch.Tensor) -> torch.Tensor:
        out = h.clone()
        if edit.read is not None:
            out -= (h @ edit.read).unsqueeze(-1) * edit.write
        return out if edit.shift is None else out + edit.shift

    def after(_module: nn.Module, _args: tuple, output: object) -> object:
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    handles = []
    for site in edit.sites:
        if site.is_embedding:
            handles.append(engine.model.get_input_embeddings().register_forward_hook(after))
        else:
            handles.append(engine.blocks[site.layer_index].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_generate(
    engine: HFEngine, ids: Sequence[int], edit: ConstantEdit, n: int
) -> tuple[int, ...]:
    said: list[int] = []
    with plainly(engine, edit), torch.no_grad():
        while len(said) < n:
            logits = engine.model(torch.tensor([[*ids, *said]]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token in engine.loaded.stop_ids:
                break
            said.append(token)
    return tuple(said)


def edits_of(engine: HFEngine) -> list[ConstantEdit]:
    every, r, u = constant.sites_of(engine), unit(1), unit(2)
    (h,) = engine.activations([engine.render(Prompt(PROMPTS[0]))], Site(1))
    n = h.norm(dim=1).mean()  # families differ in scale
    return [
        ConstantEdit((Site(1),), shift=0.5 * n * r),
        ConstantEdit((Site(2),), shift=-0.8 * n * u),
        ConstantEdit(every, read=r, write=r),
        ConstantEdit(every, read=r, write=u),
        ConstantEdit((Site(0), Site(3)), shift=0.3 * n * u, read=r, write=r),
        ConstantEdit(every, shift=torch.zeros(tiny.WIDTH)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_speaks_as_one_prompt_at_a_time(family):
    engine = HFEngine(tiny.load(family))
    rendered = [engine.render(Prompt(p)) for p in PROMPTS for _ in edits_of(engine)]
    edits = edits_of(engine) * len(PROMPTS)
    said = constant.generate(engine, rendered, edits, N)
    assert [c.ids for c in said] == [
        plain_generate(engine, r.ids, e, N) for r, e in zip(rendered, edits, strict=True)
    ]
    clean = [plain_generate(engine, r.ids, ConstantEdit(()), N) for r in rendered]
    changed = [c.ids != plain for c, plain in zip(said, clean, strict=True)]
    zero = len(edits_of(engine)) - 1
    assert not any(changed[zero :: zero + 1]), "an edit of zero is no edit"
    assert sum(changed) > len(changed) / 2, "the others are seen in the text"


def test_rows_that_end_leave_with_their_edits():
    """Random weights, with words that end the turn: rows stop at different steps, and the others
    keep their own edits."""
    engine = HFEngine(tiny.load("llama"))
    rendered = [engine.render(Prompt(p)) for p in PROMPTS for _ in edits_of(engine)]
    edits = edits_of(engine) * len(PROMPTS)
    free = [plain_generate(engine, r.ids, e, 8) for r, e in zip(rendered, edits, strict=True)]
    stops = {free[0][2], free[4][1], free[9][3]}  # words that some rows say on the way
    engine.loaded.model.generation_config.eos_token_id = sorted(stops)
    if not stops <= engine.loaded.stop_ids:
        pytest.fail("the stops were not taken")
    said = constant.generate(engine, rendered, edits, 8)
    assert len({len(c.ids) for c in said}) > 2 and any(c.stopped for c in said)
    assert [c.ids for c in said] == [
        plain_generate(engine, r.ids, e, 8) for r, e in zip(rendered, edits, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_ablated_is_nowhere(family):
    """At every block and position, of prompt and answer, seen by what reads the stream next."""
    engine, r = HFEngine(tiny.load(family)), unit(3)
    base = getattr(engine.model, "gpt_neox", None) or engine.model.model
    readers = [
        *engine.blocks,
        base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm,
    ]
    seen: list[torch.Tensor] = []
    rendered = [engine.render(Prompt(p)) for p in PROMPTS]
    edits = [ConstantEdit(constant.sites_of(engine), read=r, write=r)] * len(PROMPTS)
    constant.self_test(engine, edits[0].sites)

    def note(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs.get("hidden_states", args[0] if args else None).clone())

    # the hook is put on inside, so ours come after only if put on later
    done = constant.generate(engine, rendered, edits, 1)
    with constant.Rows(edits, tiny.WIDTH, engine.device).on(engine):
        handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in readers]
        whole = torch.tensor([[*rendered[0].ids, *done[0].ids, 7, 9]]).repeat(3, 1)
        with torch.no_grad():
            engine.model(whole)
        for handle in handles:
            handle.remove()
    assert len(seen) == len(readers)
    for h in seen:
        assert (h @ r).abs().max() < 1e-5 * h.norm(dim=-1).max()


def test_nothing_is_left_behind():
    engine = HFEngine(tiny.load("llama"))
    ids = torch.tensor([engine.render(Prompt(PROMPTS[0])).ids])
    before = engine.model(ids).logits
    with (
        pytest.raises(KeyboardInterrupt),
        constant.Rows(edits_of(engine)[:1], tiny.WIDTH, engine.device).on(engine),
    ):
        raise KeyboardInterrupt
    for edit in edits_of(engine):
        constant.generate(engine, [engine.render(Prompt(PROMPTS[0]))], [edit], 2)
    assert torch.equal(before, engine.model(ids).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine.model.modules())


class TestSelfTest:
    def test_is_done_once(self):
        engine, sites = HFEngine(tiny.load("llama")), (Site(1),)
        constant.self_test(engine, sites)
        forwards: list[int] = []
        engine.model.register_forward_pre_hook(lambda *_: forwards.append(1))
        constant.self_test(engine, sites)
        assert not forwards

    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_passes_in_bfloat16(self, family):
        engine = HFEngine(tiny.load(family, dtype=torch.bfloat16))
        constant.self_test(engine, constant.sites_of(engine))

    def test_a_hook_that_is_never_called_is_refused(self):
        model = tiny.model("llama")
        deaf = type(
            "Bypass",
            (type(model.model.layers[0]),),
            {"__call__": lambda self, *a, **k: self.forward(*a, **k)},
        )
        for block in model.model.layers:
            block.__class__ = deaf
        engine = HFEngine(wrap(model, tiny.tokenizer(), Subject("bypass", "bypass")))
        with pytest.raises(AuditgapError, match="nothing was measured"):
            constant.generate(
                engine,
                [engine.render(Prompt("door"))],
                [ConstantEdit((Site(1),), shift=unit(0))],
                2,
            )

    def test_a_hook_that_acts_at_prefill_only_is_refused(self, monkeypatch):
        """What the prompt-only hook would do: steering that the answer never feels."""
        whole = constant.Rows.__call__
        monkeypatch.setattr(
            constant.Rows, "__call__", lambda self, h: whole(self, h) if h.shape[1] > 1 else h
        )
        with pytest.raises(AuditgapError, match="ablated direction is still there"):
            constant.self_test(HFEngine(tiny.load("llama")), (Site(0), Site(1)))
