"""The batched, short-circuited attack against the most obvious way to write it, on nine families
and four sites.

The obvious way: one prompt, fp64, eager attention, the whole model at every step, all logits, and a
hook that replaces a block's output. It shares no code with the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def plain_nll(
    variant: str, ids: tuple[int, ...], site: Site, target: tuple[int, ...] = TARGET
) -> Callable[[torch.Tensor], torch.Tensor]:
    """NLL of the target under δ [T, D], as a function of δ."""
    model = plain_model(variant)
    blocks = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    tokens, t = torch.tensor([[*ids, *target]]), len(ids)

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

    return nll


def plain_paper(
    nll: Callable[[torch.Tensor], torch.Tensor], t: int, radius: float
) -> tuple[torch.Tensor, list[float]]:
    """δ [T, D] after sign steps of radius/4, the last iterate, and the NLL of every iterate."""
    delta, curve = torch.zeros(t, tiny.WIDTH, dtype=torch.float64), []
    for _ in range(PGD_STEPS):
        leaf = delta.clone().requires_grad_(True)
        loss = nll(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        curve.append(loss.item())
        delta = (delta - radius / 4 * gradient.sign()).clamp(-radius, radius)
    return delta, [*curve, nll(delta).item()]


def plain_decreasing(
    nll: Callable[[torch.Tensor], torch.Tensor], t: int, radius: float
) -> tuple[torch.Tensor, list[float]]:
    """The same with a step that falls from 2 · radius to 0 along a momentum, and the best
    iterate."""
    delta = torch.zeros(t, tiny.WIDTH, dtype=torch.float64)
    momentum, seen = torch.zeros_like(delta), []
    for k in range(PGD_STEPS):
        leaf = delta.clone().requires_grad_(True)
        loss = nll(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        seen.append((loss.item(), delta))
        momentum = momentum / 2 + gradient / gradient.abs().mean()
        size = radius * (1 + math.cos(math.pi * k / PGD_STEPS))
        delta = (delta - size * momentum.sign()).clamp(-radius, radius)
    seen.append((nll(delta).item(), delta))
    return min(seen, key=lambda one: one[0])[1], [loss for loss, _ in seen]


SEARCHES = {
    "paper": (PGD(steps=PGD_STEPS), plain_paper),
    "decreasing": (PGD(steps=PGD_STEPS, schedule="decreasing", iterate="best"), plain_decreasing),
}


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of entries that agree."""
    assert a.shape == b.shape
    return torch.isclose(a.double(), b.double(), rtol=0, atol=1e-6).double().mean().item()


def as_good(
    nll: Callable[[torch.Tensor], torch.Tensor], one: torch.Tensor, other: torch.Tensor
) -> bool:
    """Two iterates of a way may differ by less than fp32 can tell: then either is the best."""
    return abs(nll(one.double()) - nll(other.double())).item() < 1e-5


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_is_single_is_plain(variant, site, search):
    pgd, plainly = SEARCHES[search]
    goals = [Goal(r, TARGET, RADII) for r in prompts()]
    padded = engine(variant, 0.9)
    assert padded.packing.packs([len(g.rendered.ids) + len(TARGET) for g in goals], len(RADII)) == [
        [1, 2, 0]
    ]  # padding is forced
    batched = attack(padded, goals, site, pgd)
    for goal, together in zip(goals, batched, strict=True):
        nll = plain_nll(variant, goal.rendered.ids, site)
        alone = attack(engine(variant, 0.0), [goal], site, pgd)[0]
        for radius, found, single in zip(RADII, together, alone, strict=True):
            plain, curve = plainly(nll, len(goal.rendered.ids), radius)
            for other in (single.delta, plain):
                assert same(found.delta, other) >= SAME or as_good(nll, found.delta, other)
            assert found.curve == pytest.approx(curve, abs=2e-3)
            assert found.nll_clean == pytest.approx(curve[0], abs=1e-4)
            # at the same δ the two ways agree far better than along their own ways
            assert found.nll_edited == pytest.approx(nll(found.delta.double()).item(), abs=1e-5)
            assert found.nll_edited == pytest.approx(nll(plain).item(), abs=2e-3)
            check_ball(found, goal, radius)
            assert found.nll_edited < found.nll_clean - 1e-3


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_of_other_lengths_share_a_batch(variant, site):
    """Shorter targets are padded behind, where nothing reads the padding."""
    targets = [(13,), (13, 9, 14, 20, 21), (9, 14)]
    goals = [Goal(r, target, (0.4,)) for r, target in zip(prompts(), targets, strict=True)]
    pgd, _ = SEARCHES["decreasing"]
    for goal, (found,) in zip(goals, attack(engine(variant, 0.9), goals, site, pgd), strict=True):
        ((alone,),) = attack(engine(variant, 0.0), [goal], site, pgd)
        nll = plain_nll(variant, goal.rendered.ids, site, goal.target)
        assert same(found.delta, alone.delta) >= SAME or as_good(nll, found.delta, alone.delta)
        assert found.nll_edited == pytest.approx(nll(found.delta.double()).item(), abs=1e-5)


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
