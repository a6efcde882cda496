"""The batched, short-circuited attack against the most obvious way to write it, on nine families
and four sites.

The obvious way: one prompt, fp64, eager attention, the whole model at every step, all logits, and a
hook that replaces a block's output. It shares no code with the engine.
"""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch

from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import PGD, AttackResult, Goal, attack
from auditgap.models import Rendered, wrap
from auditgap.types import Prompt, Site, Subject

# beside the nine, the families that slide a window over the past, with one that is shorter than the
# prompts
VARIANTS = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "gemma3_text, window 5": ("gemma3_text", {"sliding_window": 5}),
    "mistral, window 5": ("mistral", {"sliding_window": 5}),
}
SITES = [Site(-1), Site(0), Site(tiny.N_BLOCKS // 2), Site(tiny.N_BLOCKS - 1)]
PGD_STEPS, TARGET, RADII = 5, (13, 9, 14), (0.05, 0.4)
#: Where a gradient is within rounding of 0 its sign is arbitrary: in fp32 a few entries of δ may
#: take the other step.
SAME = 0.995


@cache
def engine(variant: str, pad_tolerance: float) -> HFEngine:
    family, changes = VARIANTS[variant]
    loaded = wrap(tiny.model(family, **changes), tiny.tokenizer(), Subject(variant, variant))
    return HFEngine(loaded, batch_tokens=4096, pad_tolerance=pad_tolerance)


@cache
def plain_model(variant: str) -> torch.nn.Module:
    family, changes = VARIANTS[variant]
    model = tiny.model(family, **changes)
    model.set_attn_implementation("eager")
    return model.double().requires_grad_(False)


@cache
def prompts() -> tuple[Rendered, ...]:
    draw = torch.Generator().manual_seed(4)
    ids = [
        tuple(torch.randint(4, tiny.VOCABULARY, (n,), generator=draw).tolist()) for n in (12, 4, 9)
    ]
    return tuple(
        Rendered(Prompt(f"prompt {i}"), own, (True,) * len(own)) for i, own in enumerate(ids)
    )


def plain_attack(
    variant: str, ids: tuple[int, ...], site: Site, radius: float
) -> tuple[torch.Tensor, float, float]:
    """δ [T, D] after PGD_STEPS sign steps of radius/4, with the NLL of the target before and
    after."""
    model = plain_model(variant)
    blocks = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    tokens, t = torch.tensor([[*ids, *TARGET]]), len(ids)

    def nll(delta: torch.Tensor) -> torch.Tensor:
        def replaced(h: torch.Tensor) -> torch.Tensor:
            return torch.cat([h[:, :t] + delta, h[:, t:]], 1)

        if site.is_embedding:
            hook = blocks[0].register_forward_pre_hook(
                lambda _, args: (replaced(args[0]), *args[1:])
            )
        else:
            hook = blocks[site.layer_index].register_forward_hook(lambda _, __, out: replaced(out))
        try:
            logits = model(tokens, use_cache=False).logits
        finally:
            hook.remove()
        return torch.nn.functional.cross_entropy(logits[0, t - 1 : -1], tokens[0, t:])

    delta = torch.zeros(t, tiny.WIDTH, dtype=torch.float64)
    before = nll(delta).item()
    for _ in range(PGD_STEPS):
        leaf = delta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(nll(leaf), leaf)
        delta = (delta - radius / 4 * gradient.sign()).clamp(-radius, radius)
    return delta, before, nll(delta).item()


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of entries that agree."""
    assert a.shape == b.shape
    return torch.isclose(a.double(), b.double(), rtol=0, atol=1e-6).double().mean().item()


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_is_single_is_plain(variant, site):
    goals = [Goal(r, TARGET, RADII) for r in prompts()]
    padded = engine(variant, 0.9)
    assert padded.packing.packs([len(g.rendered.ids) + len(TARGET) for g in goals], len(RADII)) == [
        [1, 2, 0]
    ]  # padding is forced
    batched = attack(padded, goals, site, PGD(steps=PGD_STEPS))
    for goal, together in zip(goals, batched, strict=True):
        alone = attack(engine(variant, 0.0), [goal], site, PGD(steps=PGD_STEPS))[0]
        for radius, found, single in zip(RADII, together, alone, strict=True):
            plain, before, after = plain_attack(variant, goal.rendered.ids, site, radius)
            assert same(found.delta, single.delta) >= SAME
            assert same(found.delta, plain) >= SAME
            assert found.nll_clean == pytest.approx(before, abs=1e-4)
            assert found.nll_edited == pytest.approx(after, abs=2e-3)
            check_ball(found, goal, radius)
            assert found.nll_edited < found.nll_clean - 1e-3


def check_ball(found: AttackResult, goal: Goal, radius: float) -> None:
    assert found.finite and found.delta.dtype == torch.float32 and found.delta.device.type == "cpu"
    assert found.delta.shape == (len(goal.rendered.ids), tiny.WIDTH)
    assert found.delta.abs().max() <= torch.tensor(radius, dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_the_last_block_only_the_final_position_is_edited(variant):
    found = attack(
        engine(variant, 0.9),
        [Goal(r, TARGET[:1], (0.1,)) for r in prompts()],
        SITES[-1],
        PGD(steps=2),
    )
    for (one,) in found:
        assert one.delta[:-1].abs().max() == 0
        assert one.delta[-1].abs().max() > 0
