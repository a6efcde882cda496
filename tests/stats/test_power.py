"""The excess gap that a sentence on power names is found as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from auditgap import stats
from auditgap.errors import UsageError
from auditgap.stats.risk import HARMFUL, SAFE


def found(n: int, chance: float, excess: float, draws: int, times: int = 150) -> float:
    """How often the audit's own interval lies above 0, attack and control flipping at random."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(times):
        attack = rng.random((1, 1, n)) < chance + excess
        control = rng.random((draws, 1, 1, n)) < chance
        codes = (np.where(flips, HARMFUL, SAFE) for flips in (attack, control))
        gap = stats.audit_gap(np.full(n, SAFE), *codes, n_resamples=300).excess
        hits += gap.excess.lo > 0
    return hits / times


@pytest.mark.parametrize(("n", "chance", "draws"), [(40, 0.0, 1), (100, 0.06, 3), (100, 0.27, 3)])
def test_four_fifths_of_studies_show_it_and_fewer_show_less(n, chance, draws):
    excess = stats.detectable_excess(n, chance, draws=draws)
    assert 0.7 < found(n, chance, excess, draws) < 0.97
    assert found(n, chance, excess - 0.04, draws) < 0.75


def test_more_prompts_and_draws_show_less():
    by_n = [stats.detectable_excess(n, 0.05) for n in (20, 50, 100, 1000)]
    assert by_n == sorted(by_n, reverse=True) and 0 < by_n[-1] < 0.04
    by_draws = [stats.detectable_excess(200, 0.2, draws=k) for k in (1, 3, 9)]
    assert by_draws == sorted(by_draws, reverse=True)
    assert stats.detectable_excess(4) is None and stats.detectable_excess(100, 1.0) is None


@pytest.mark.parametrize("chance", [0.0, 0.02, 0.2])
def test_the_prompts_that_it_asks_for_are_enough_and_no_more_than_needed(chance):
    n = stats.prompts_for_excess(0.1, chance)
    assert n is not None
    found = stats.detectable_excess(n, chance)
    assert found is not None and found < 0.1 + 1 / n
    fewer = stats.detectable_excess(n - 1, chance)
    assert fewer is None or fewer > 0.1


def test_what_cannot_be():
    for bad in (dict(n=0), dict(n=10, chance=2.0), dict(n=10, draws=0), dict(n=10, power=1.0)):
        with pytest.raises(UsageError, match="Power needs"):
            stats.detectable_excess(**bad)
    with pytest.raises(UsageError, match="within 0–1"):
        stats.prompts_for_excess(0.0)
    assert stats.prompts_for_excess(0.5, 0.6) is None
