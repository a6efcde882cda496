"""The one hook: it bites, it goes away whatever happens inside, and it says when a model cannot be
edited."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.models import Rendered, wrap
from auditgap.types import Edit, Prompt, Site, Subject

SITES = [Site(-1), Site(0), Site(2), Site(3)]
IDS = torch.tensor([[5, 9, 30, 14, 61, 22]])
RENDERED = Rendered(Prompt("vault"), tuple(IDS[0].tolist()), (True,) * 6)


def logits(engine: HFEngine) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(IDS).logits


def hooks(engine: HFEngine) -> int:
    return sum(
        len(m._forward_hooks)
        + len(m._forward_pre_hooks)
        + len(m._forward_hooks_with_kwargs)
        + ("forward" in m.__dict__)
        for m in engine.model.modules()
    )


class TestPutBack:
    @pytest.fixture(params=list(tiny.FAMILIES))
    def engine(self, request):
        return HFEngine(tiny.load(request.param))

    @pytest.mark.parametrize("skip_trunk", [False, True])
    @pytest.mark.parametrize("site", SITES, ids=str)
    def test_after_an_exception(self, engine, site, skip_trunk):
        before = logits(engine)
        assert hooks(engine) == 0
        for error in (ValueError, torch.OutOfMemoryError, KeyboardInterrupt):
            with pytest.raises(error), engine.edited(site, lambda h: h + 1, skip_trunk=skip_trunk):
                assert hooks(engine) > 0
                raise error("inside")
        assert hooks(engine) == 0
        assert torch.equal(before, logits(engine))

    def test_after_an_exception_in_the_edit_itself(self, engine):
        before = logits(engine)
        for site in SITES:
            with (
                pytest.raises(RuntimeError),
                engine.edited(site, lambda h: h + torch.zeros(tiny.WIDTH + 1)),
            ):  # too wide
                logits(engine)
            with pytest.raises((RuntimeError, AuditgapError)):
                engine.generate([Request(RENDERED, Edit(site, torch.zeros(6, tiny.WIDTH + 1)))], 2)
        assert hooks(engine) == 0
        assert torch.equal(before, logits(engine))

    def test_after_all_that_the_engine_does(self, engine):
        before = logits(engine)
        for site in SITES:
            engine.self_test(site)
            found = attack(engine, [Goal(RENDERED, (13, 9), (0.2,))], site, PGD(steps=2))
            edit = Edit(site, found[0][0].delta)
            engine.generate([Request(RENDERED, edit)], 2)
            engine.nll([RENDERED], [(13, 9)], [edit])
            engine.activations([RENDERED], site)
        assert hooks(engine) == 0
        assert torch.equal(before, logits(engine))
        assert all(p.grad is None and not p.requires_grad for p in engine.model.parameters())

    def test_a_forward_that_was_there_before_is_there_after(self, engine):
        """accelerate's dispatch puts its wrapper into `block.forward`."""
        before = logits(engine)
        calls: list[int] = []

        def dispatched(i: int, inner: Callable) -> Callable:
            return lambda *args, **kwargs: (calls.append(i), inner(*args, **kwargs))[1]

        wrappers = []
        for i, block in enumerate(engine.blocks):
            wrappers.append(dispatched(i, block.forward))
            block.forward = wrappers[-1]
        for site in SITES:
            attack(engine, [Goal(RENDERED, (13, 9), (0.2,))], site, PGD(steps=1))
            with pytest.raises(ValueError), engine.edited(site, lambda h: h, skip_trunk=True):
                raise ValueError
        assert [block.__dict__["forward"] for block in engine.blocks] == wrappers
        assert {*calls} == {0, 1, 2, 3}
        calls.clear()
        assert torch.equal(before, logits(engine))
        assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_trunk_is_skipped_and_nothing_above_it(family, site):
    engine = HFEngine(tiny.load(family))
    engine.self_test(site)
    ran: list[int] = []
    mlps = [
        b.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, b in enumerate(engine.blocks)
    ]
    h = engine.capture(site, IDS, torch.ones_like(IDS))
    assert ran == list(range(site.layer_index + 1))
    ran.clear()
    whole = engine.logits_from(site, h, IDS, torch.ones_like(IDS), keep=6)
    assert ran == list(range(site.layer_index + 1, 4))
    for hook in mlps:
        hook.remove()
    assert torch.allclose(whole, logits(engine), atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_known_edit_arrives_where_it_was_meant(family):
    """Seen from outside: the input of the next block (or of the final norm) moves by exactly δ."""
    engine = HFEngine(tiny.load(family))
    base = getattr(engine.model, "gpt_neox", None) or engine.model.model
    after = [
        *engine.blocks,
        base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm,
    ]
    delta = torch.randn(1, 6, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    for site in SITES:
        seen: list[torch.Tensor] = []
        reader = after[site.layer_index + 1]

        def read(
            site: Site, edit: torch.Tensor, reader: nn.Module = reader, seen: list = seen
        ) -> None:
            with engine.edited(site, lambda h: h + edit):
                hook = reader.register_forward_pre_hook(
                    lambda _, args: seen.append(args[0].clone())
                )  # runs after the edit
                logits(engine)
                hook.remove()

        read(site, torch.zeros_like(delta))
        read(site, delta)
        assert torch.equal(seen[1], seen[0] + delta)


#: These expand their masks from the shape of h, so that a probe under the hook would fail.
OLDER = ("bloom", "gpt_bigcode", "xglm")


def test_an_edit_is_asked_once_a_forward():
    engine = HFEngine(tiny.load("llama"))
    asked: list[torch.Size] = []
    with engine.edited(Site(1), lambda h: (asked.append(h.shape), h)[1], skip_trunk=True):
        logits(engine)
    assert asked == [(1, 6, tiny.WIDTH)]


class Deaf(nn.Module):
    """A decoder block that answers from the token ids it has seen elsewhere, not from what it is
    handed."""

    def __init__(self, block: nn.Module, memory: list[torch.Tensor]) -> None:
        super().__init__()
        self.block, self.memory = block, memory
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return self.block(self.memory[-1], **kwargs)


def deaf_engine(at: int) -> HFEngine:
    """A llama whose block `at` ignores its input: it reads the embeddings again."""
    model = tiny.model("llama")
    memory: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: memory.append(out))
    model.model.layers = nn.ModuleList(
        Deaf(b, memory) if i == at else Deaf(b, []) for i, b in enumerate(model.model.layers)
    )
    for i, block in enumerate(model.model.layers):
        if i != at:
            block.forward = block.block.forward
    return HFEngine(wrap(model, tiny.tokenizer(), Subject("deaf", "deaf")))


class TestSelfTest:
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    @pytest.mark.parametrize("site", SITES, ids=str)
    def test_passes_and_is_done_once(self, family, site):
        engine = HFEngine(tiny.load(family))
        forwards: list[int] = []
        engine.model.register_forward_pre_hook(lambda *_: forwards.append(1))
        engine.self_test(site)
        assert (n := len(forwards)) > 0
        engine.self_test(site)
        assert len(forwards) == n

    def test_a_block_that_does_not_hear_is_refused(self):
        engine = deaf_engine(at=2)
        for site in (Site(-1), Site(0), Site(1)):
            with pytest.raises(
                AuditgapError, match=r"Self-test failed at .*deaf.*nothing was measured"
            ) as caught:
                engine.self_test(site)
            assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        engine.self_test(Site(2))

    def test_nothing_is_measured_with_it(self):
        engine = deaf_engine(at=2)
        edit = Edit(Site(0), torch.zeros(6, tiny.WIDTH))
        for call in (
            lambda: engine.generate([Request(RENDERED, edit)], 2),
            lambda: engine.nll([RENDERED], [(13,)], [edit]),
            lambda: attack(engine, [Goal(RENDERED, (13,), (0.1,))], Site(0), PGD(steps=1)),
        ):
            with pytest.raises(AuditgapError, match="Self-test failed"):
                call()
        assert len(engine.generate([Request(RENDERED)], 2)) == 1  # without an edit it can speak

    def test_a_hook_that_is_never_called_is_refused(self):
        """A model that calls the class's forward itself goes past every hook."""
        model = tiny.model("llama")
        deaf = type(
            "Bypass",
            (type(model.model.layers[0]),),
            {"__call__": lambda self, *a, **k: self.forward(*a, **k)},
        )
        for block in model.model.layers:
            block.__class__ = deaf
        engine = HFEngine(wrap(model, tiny.tokenizer(), Subject("bypass", "bypass")))
        with pytest.raises(AuditgapError, match="Self-test failed"):
            engine.self_test(Site(1))

    def test_a_family_that_reads_both_ways_is_refused_in_a_sentence(self):
        with pytest.raises(AuditgapError, match="Self-test failed") as caught:
            HFEngine(other("bert")).self_test(Site(1))
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)

    def test_a_family_that_cannot_be_cut_runs_whole(self):
        engine = HFEngine(other("rwkv"))
        engine.self_test(Site(1))
        assert "the whole model above the site" in engine.ways(Site(1))

    @pytest.mark.parametrize("family", ["recurrent_gemma", "jamba", "qwen3_next"])
    def test_families_whose_state_padding_reaches_run_a_row_at_a_time(self, family):
        """Recurrent blocks that read the padding give other numbers in a batch than alone."""
        engine = HFEngine(other(family))
        short = Rendered(Prompt("short"), RENDERED.ids[:3], (True,) * 3)
        edits = [Edit(Site(1), torch.ones(len(r.ids), tiny.WIDTH)) for r in (RENDERED, short)]
        both = engine.nll([RENDERED, short], [(13, 9), (7,)], edits)
        apart = [
            engine.nll([r], [a], [e])[0]
            for r, a, e in zip((RENDERED, short), ((13, 9), (7,)), edits, strict=True)
        ]
        assert both == pytest.approx(apart, abs=1e-5)

    @pytest.mark.parametrize(
        "family",
        ["gpt2", "opt", "gemma", "mixtral", "qwen3_moe", "olmo3", "cohere2", "glm4", "phi", *OLDER],
    )
    def test_other_families_work_without_a_line_of_their_own(self, family):
        engine = HFEngine(other(family), pad_tolerance=0.9)
        for site in SITES:
            engine.self_test(site)
        short = Rendered(Prompt("short"), RENDERED.ids[:3], (True,) * 3)
        goals = [Goal(r, (13, 9), (0.2,)) for r in (RENDERED, short)]
        for goal, (found,) in zip(goals, attack(engine, goals, Site(1), PGD(steps=2)), strict=True):
            ((alone,),) = attack(engine, [goal], Site(1), PGD(steps=2))
            assert (found.delta == alone.delta).float().mean() > 0.99


def other(family: str):
    torch.manual_seed(0)
    settings = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": tiny.WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    extra = {
        "gemma": {"head_dim": 8},
        "mixtral": {"num_local_experts": 4},
        "glm4": {"head_dim": 8},
        "qwen3_moe": {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        "bloom": {"n_layer": 4, "n_head": 4},
        "olmo3": {"sliding_window": 5},
        "cohere2": {"sliding_window": 5},
    }
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**{**settings, **extra.get(family, {})})
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    return wrap(model, tiny.tokenizer(), Subject(family, family))


@pytest.mark.parametrize("length", [1, 5, 7])
def test_an_edit_of_another_length_than_the_prompt_is_refused(length):
    engine = HFEngine(tiny.load("llama"))
    with pytest.raises(AuditgapError):
        engine.generate([Request(RENDERED, Edit(Site(0), torch.ones(length, tiny.WIDTH)))], 2)


def test_compiled_blocks_are_put_back():
    """`--compile` patches the blocks above the site for the length of a step (backend `eager`: no
    compiler is needed)."""
    engine = HFEngine(tiny.load("llama"), compile=True)
    plain = HFEngine(tiny.load("llama"))
    before = logits(engine)
    compile_ = torch.compile
    try:
        torch.compile = lambda f, dynamic: compile_(f, dynamic=dynamic, backend="eager")
        (found,) = attack(engine, [Goal(RENDERED, (13, 9), (0.2,))], Site(1), PGD(steps=2))[0]
        assert sorted(engine._compiled) == [2, 3]
    finally:
        torch.compile = compile_
    (wanted,) = attack(plain, [Goal(RENDERED, (13, 9), (0.2,))], Site(1), PGD(steps=2))[0]
    assert (found.delta == wanted.delta).float().mean() > 0.99
    assert hooks(engine) == 0
    assert torch.equal(before, logits(engine))
    assert math.isclose(found.nll_edited, wanted.nll_edited, abs_tol=1e-3)
