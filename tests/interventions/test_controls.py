"""The controls: as large as the attack's edit, aimless, and the same on every machine."""

from __future__ import annotations

import math

import pytest
import torch

from auditgap.interventions import controls
from auditgap.types import Budget, Site


def draw(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 16, generator=generator) for n in lengths]


class TestGenerator:
    names = ("random", "51f0", Site(3), Budget(0.03, "rms"), 0)

    def numbers(self, seed: int, *names: object) -> list[float]:
        return torch.rand(4, generator=controls.generator(seed, *names)).tolist()

    def test_one_name_one_draw(self):
        assert self.numbers(0, *self.names) == self.numbers(0, *self.names)

    @pytest.mark.parametrize("changed", range(5))
    def test_every_name_counts(self, changed):
        names = list(self.names)
        names[changed] = ("matched", "51f1", Site(4), Budget(0.031, "rms"), 1)[changed]
        assert self.numbers(0, *names) != self.numbers(0, *self.names)

    def test_the_seed_counts(self):
        assert self.numbers(1, *self.names) != self.numbers(0, *self.names)

    def test_it_is_the_same_on_every_machine(self):
        """The first draw as it was when this was written: a change of the naming would change every
        stored control."""
        pinned = [0.18679064512252808, 0.2525254487991333, 0.03920400142669678, 0.84338504076004]
        assert self.numbers(0, *self.names) == pytest.approx(pinned, abs=1e-7)


def test_uniform_fills_the_ball():
    delta = controls.uniform(200, 64, 0.5, controls.generator(0, "u"))
    assert delta.shape == (200, 64) and delta.dtype == torch.float32
    assert delta.abs().max() <= 0.5
    assert delta.mean().abs() < 0.02
    assert delta.norm() / (0.5 * math.sqrt(delta.numel())) == pytest.approx(
        1 / math.sqrt(3), abs=0.01
    )


class TestMatched:
    def test_same_magnitudes_and_support(self):
        (delta,) = draw(9)
        delta[:5] = 0
        control = controls.matched(delta, controls.generator(0, "m"))
        assert torch.equal(control.abs(), delta.abs())
        assert control.norm() == delta.norm() and control.dtype == delta.dtype

    def test_the_signs_are_a_fair_draw(self):
        (delta,) = draw(500)
        agreement = (
            (controls.matched(delta, controls.generator(0, "m")).sign() == delta.sign())
            .float()
            .mean()
        )
        assert agreement == pytest.approx(0.5, abs=0.03)

    def test_of_nothing_is_nothing(self):
        assert torch.equal(
            controls.matched(torch.zeros(3, 4), controls.generator(0, "m")), torch.zeros(3, 4)
        )


def shuffled(deltas):
    """Every prompt's borrowed edit, as the audit hands them out."""
    donors = controls.donors([len(d) for d in deltas])
    return [
        controls.borrowed(deltas[d], len(own), d == i)
        for i, (own, d) in enumerate(zip(deltas, donors, strict=True))
    ]


class TestShuffled:
    def test_nobody_keeps_their_own(self):
        deltas = draw(5, 9, 5, 7)
        given = shuffled(deltas)
        assert [g.shape for g in given] == [d.shape for d in deltas]
        for own, other in zip(deltas, given, strict=True):
            assert not torch.equal(own, other)

    def test_everybody_gives_once_aligned_at_the_end(self):
        deltas = draw(5, 9, 5, 7)
        givers = [
            next(
                j
                for j, d in enumerate(deltas)
                if torch.equal(g[-min(len(g), len(d)) :], d[-min(len(g), len(d)) :])
            )
            for g in shuffled(deltas)
        ]
        assert sorted(givers) == [0, 1, 2, 3]
        assert all(i != j for i, j in enumerate(givers))

    def test_a_longer_prompt_gets_nothing_before_the_other_edit(self):
        short, long = draw(3, 8)
        given = shuffled([short, long])
        assert torch.equal(given[0], long[-3:])
        assert torch.equal(given[1][-3:], short) and given[1][:5].abs().max() == 0

    def test_the_inputs_stay(self):
        deltas = draw(5, 9)
        before = [d.clone() for d in deltas]
        shuffled(deltas)[0].mul_(2)
        shuffled(deltas)[1].mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))

    def test_alone_it_is_rolled(self):
        (delta,) = draw(4)
        (given,) = shuffled([delta])
        assert not torch.equal(given, delta) and given.norm() == pytest.approx(delta.norm().item())
