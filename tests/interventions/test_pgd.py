"""What the attack's options promise: starts, restarts, the best iterate, maximising, budgets,
broken gradients."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError, UsageError
from auditgap.interventions.pgd import PGD, AttackResult, Ball, Goal, attack
from auditgap.models import LoadedModel, Rendered
from auditgap.types import Budget, Prompt, Site

TARGET = (13, 9, 14)
SITES = [Site(-1), Site(0), Site(2), Site(3)]


def rendered(*lengths: int, seed: int = 4) -> list[Rendered]:
    draw = torch.Generator().manual_seed(seed)
    ids = [tuple(torch.randint(4, tiny.VOCABULARY, (n,), generator=draw).tolist()) for n in lengths]
    return [Rendered(Prompt(f"prompt {i}"), own, (True,) * len(own)) for i, own in enumerate(ids)]


def engine(loaded: LoadedModel | None = None, **options: float) -> HFEngine:
    return HFEngine(
        loaded or tiny.load("llama"), **{"batch_tokens": 4096, "pad_tolerance": 0.9, **options}
    )


@pytest.fixture(scope="module")
def llama() -> HFEngine:
    return engine()


def one(found: list[list[AttackResult]]) -> list[AttackResult]:
    return [f[0] for f in found]


def worse(found: AttackResult, than: AttackResult, maximise: bool) -> bool:
    gap = found.nll_edited - than.nll_edited
    return (-gap if maximise else gap) > 1e-6


def goals(maximise: bool) -> list[Goal]:
    return [Goal(r, TARGET, (0.3,), maximise) for r in rendered(9, 5, 12)]


@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("site", SITES, ids=str)
class TestOptionsNeverHurt:
    def test_direction(self, llama, site, maximise):
        for found in one(attack(llama, goals(maximise), site, PGD(steps=4))):
            assert (
                found.nll_edited > found.nll_clean + 1e-3
                if maximise
                else found.nll_edited < found.nll_clean - 1e-3
            )

    def test_best_iterate(self, llama, site, maximise):
        last = one(attack(llama, goals(maximise), site, PGD(steps=4)))
        best = one(attack(llama, goals(maximise), site, PGD(steps=4, iterate="best")))
        for b, found in zip(best, last, strict=True):
            assert not worse(b, found, maximise)
            # the zero start is an iterate too
            assert not worse(b, AttackResult(b.delta, 0, b.nll_clean, True), maximise)

    @pytest.mark.parametrize("iterate", ["last", "best"])
    def test_restarts(self, llama, site, maximise, iterate):
        first = one(attack(llama, goals(maximise), site, PGD(steps=4, iterate=iterate)))
        more = one(attack(llama, goals(maximise), site, PGD(steps=4, iterate=iterate, restarts=3)))
        assert not any(worse(m, f, maximise) for m, f in zip(more, first, strict=True))
        again = one(attack(llama, goals(maximise), site, PGD(steps=4, iterate=iterate, restarts=3)))
        assert all(torch.equal(a.delta, b.delta) for a, b in zip(more, again, strict=True))

    def test_warm_starts(self, llama, site, maximise):
        cold = one(attack(llama, goals(maximise), site, PGD(steps=4)))
        warmed = [
            Goal(g.rendered, g.target, g.radii, g.maximise, (c.delta,))
            for g, c in zip(goals(maximise), cold, strict=True)
        ]
        warm = one(attack(llama, warmed, site, PGD(steps=4, iterate="best")))
        assert not any(worse(w, c, maximise) for w, c in zip(warm, cold, strict=True))
        assert all(
            w.nll_clean == pytest.approx(c.nll_clean, abs=1e-6)
            for w, c in zip(warm, cold, strict=True)
        )


def test_a_warm_start_larger_than_the_ball_is_projected(llama):
    (prompt,) = rendered(7)
    start = torch.full((7, tiny.WIDTH), 5.0)
    (found,) = one(
        attack(llama, [Goal(prompt, TARGET, (0.01,), warm=(start,))], Site(0), PGD(steps=1))
    )
    assert found.delta.abs().max() <= torch.tensor(0.01, dtype=torch.float32)


def test_each_prompt_has_random_starts_of_its_own(llama):
    prompts, pgd = rendered(7, 7), PGD(steps=1, restarts=2, step_share=1e-3)

    def start(prompt: Rendered) -> torch.Tensor:
        """Zero is the first start; the random one is better at lowering or at raising the NLL."""
        ways = [Goal(prompt, TARGET, (0.5,), maximise) for maximise in (False, True)]
        return max((f.delta for f in one(attack(llama, ways, Site(1), pgd))), key=torch.norm)

    first, second = map(start, prompts)
    assert min(first.abs().max(), second.abs().max()) > 0.4
    assert (first - second).abs().max() > 0.1
    assert torch.equal(start(prompts[0]), first)


def test_random_starts_fill_the_ball_and_stay_in_it(llama):
    (prompt,) = rendered(7)
    found = attack(
        llama,
        [Goal(prompt, TARGET, (0.01, 3.0))],
        Site(3),
        PGD(steps=1, restarts=8, step_share=1e-3),
    )[0]
    for f, radius in zip(found, (0.01, 3.0), strict=True):
        assert f.delta.abs().max() <= torch.tensor(radius, dtype=torch.float32)


def test_goals_of_one_call_may_differ_in_everything(llama):
    a, b, c = rendered(9, 5, 12)
    asked = [
        Goal(a, TARGET, (0.1, 0.2)),
        Goal(b, (20,), (0.3,)),
        Goal(c, TARGET, (0.1, 0.2, 0.4), maximise=True),
    ]
    together = attack(llama, asked, Site(1), PGD(steps=3))
    assert [len(found) for found in together] == [2, 1, 3]
    for goal, found in zip(asked, together, strict=True):
        alone = attack(llama, [goal], Site(1), PGD(steps=3))[0]
        for f, s in zip(found, alone, strict=True):
            assert (f.delta == s.delta).float().mean() > 0.99
            assert f.nll_edited == pytest.approx(s.nll_edited, abs=1e-3)


def test_no_goals(llama):
    assert attack(llama, [], Site(0), PGD()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"restarts": 0},
        {"step_share": 0},
        {"step_share": 1.1},
        {"step_share": math.nan},
        {"iterate": "first"},
    ],
)
def test_nonsense_is_refused(options):
    with pytest.raises(UsageError):
        PGD(**options)


class TestBall:
    h = torch.tensor([[30.0, 0.0], [3.0, 4.0], [0.0, 5.0]])
    ball = Ball.of(h, [False, True, True])

    def test_template_positions_are_left_out_of_the_statistic(self):
        assert self.ball.h_norm == pytest.approx(math.sqrt(50))
        assert self.ball.rms == pytest.approx(math.sqrt(50 / 4))

    def test_but_not_of_the_largest(self):
        assert self.ball.largest == 30

    def test_radii(self):
        assert self.ball.radius(Budget(0.5, "absolute")) == 0.5
        assert self.ball.radius(Budget(0.5, "max")) == 15
        assert self.ball.radius(Budget(0.5, "rms")) == pytest.approx(0.5 * math.sqrt(12.5))

    def test_the_fp32_radius_never_exceeds_the_budget(self):
        sizes = [0.0005 * 1.37**i for i in range(40)]
        assert all(self.ball.radius(Budget(size, "absolute")) <= size for size in sizes)


BAD = 95  # the token whose embedding is broken


def poisoned(value: float) -> LoadedModel:
    loaded = tiny.load("llama")
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[BAD] = value
    return loaded


@pytest.mark.parametrize("iterate", ["last", "best"])
@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_broken_gradient_marks_its_prompt_and_no_other(site, value, restarts, iterate):
    pgd = PGD(steps=3, restarts=restarts, iterate=iterate)
    good, bad, other = rendered(9, 6, 12)
    assert BAD not in {*good.ids, *bad.ids, *other.ids}
    bad = Rendered(bad.prompt, (*bad.ids[:3], BAD, *bad.ids[4:]), bad.content)
    found = one(
        attack(
            engine(poisoned(value)),
            [Goal(r, TARGET, (0.3,)) for r in (good, bad, other)],
            site,
            pgd,
        )
    )
    clean = one(attack(engine(), [Goal(r, TARGET, (0.3,)) for r in (good, bad, other)], site, pgd))
    if value != 3e38:  # that one stays finite where the first norm divides it away
        assert not found[1].finite
    assert found[1].delta.isfinite().all()
    assert found[1].delta.abs().max() <= torch.tensor(0.3)
    for f, c in zip(found[::2], clean[::2], strict=True):
        assert f.finite
        assert torch.equal(f.delta, c.delta)
        assert f.nll_edited == pytest.approx(c.nll_edited, abs=1e-6)


def test_a_nan_in_one_row_of_the_head_is_said_as_such():
    loaded = tiny.load("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight[BAD] = math.nan
    with pytest.raises(AuditgapError, match="finite"):
        attack(
            engine(loaded), [Goal(r, TARGET, (0.3,)) for r in rendered(9, 5)], Site(0), PGD(steps=2)
        )
