"""Intervals over fine-tuning runs and prompts: coverage where the truth is known, and what is left
open."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as sps

from auditgap import stats
from auditgap.stats.seeds import added


def run(rng, level, seeds, spread, prompts=15, draws=5):
    """Misaligned answers [S, P] of `draws`: prompts, seeds and their pairs differ."""
    logits = (
        level
        + rng.normal(0, 1, prompts)
        + rng.normal(0, spread, (seeds, 1))
        + rng.normal(0, 0.5, (seeds, prompts))
    )
    return rng.binomial(draws, 1 / (1 + np.exp(-logits)))


def truth(level, spread):
    """The mean rate over all seeds and prompts, by quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(80)
    sd = np.sqrt(1 + spread**2 + 0.5**2)
    return float((w / (1 + np.exp(-(level + sd * x)))).sum() / w.sum())


def as_answers(hits, draws=5):
    """One entry an answer: hits, prompts, seeds."""
    seeds, prompts = np.divmod(np.arange(hits.size), hits.shape[1])
    x = np.concatenate([[1.0] * k + [0.0] * (draws - k) for k in hits.ravel()])
    return x, np.repeat(prompts, draws).tolist(), np.repeat(seeds, draws).tolist()


@pytest.mark.parametrize(("level", "spread"), [(-2.0, 0.7), (0.0, 0.7), (0.0, 1.5)])
def test_rates_and_means_cover_the_truth_over_seeds(level, spread):
    """Measured at 95 %, 300 studies each, 3 seeds: rates 92-96 %, means 91-94 (over prompts alone:
    50-77)."""
    rng, studies, rate, mean, fixed = np.random.default_rng(6), 150, 0, 0, 0
    true = truth(level, spread)
    for _ in range(studies):
        hits = run(rng, level, 3, spread)
        x, prompts, seeds = as_answers(hits)
        found = stats.seeded_rate(x, prompts, seeds)
        rate += found.lo <= true <= found.hi
        middle = stats.seeded_mean(hits.mean(axis=0) / 5, hits.mean(axis=1) / 5).difference
        mean += middle.lo <= true <= middle.hi
        size = stats.effective_size(x, prompts)
        alone = stats.wilson(min(x.mean() * size, size), size)
        fixed += alone.lo <= true <= alone.hi
    assert rate / studies >= 0.88 and mean / studies >= 0.86, "three standard errors below"
    assert fixed / studies <= 0.85, "or seeds do not matter here"


def test_no_effect_is_seldom_found_over_seeds():
    rng, studies = np.random.default_rng(7), 400
    alarms = 0
    for _ in range(studies):
        values = rng.normal(0, 5, (3, 1)) + rng.normal(0, 4, (1, 15)) + rng.normal(0, 4, (3, 15))
        found = stats.seeded_mean(values.mean(axis=0), values.mean(axis=1))
        alarms += found.p < 0.05
        assert (found.p < 0.05) == (not found.difference.lo <= 0 <= found.difference.hi)
    assert alarms / studies <= 0.075, "5 % and two standard errors"


def test_fewer_than_three_seeds_say_nothing_of_seeds():
    assert stats.seeded_mean([1.0, 2.0, 3.0], [2.0, 2.5]).difference == stats.Interval(2.0)
    assert stats.seeded_mean([1.0, 2.0], [1.0, 2.0, 1.5], [1.0]).p is None
    assert stats.seeded_mean([1.0, 1.0], [1.0] * 3).p is None, "nothing varies"
    assert stats.seeded_mean([], []).difference == stats.Interval()
    x, prompts, seeds = as_answers(run(np.random.default_rng(0), 0.0, 2, 1.0))
    size = stats.effective_size(x, prompts)
    assert stats.seeded_rate(x, prompts, seeds) == stats.wilson(x.mean() * size, size)
    assert stats.seeded_rate([], [], []) == stats.Interval()


def test_what_all_seeds_agree_on_is_left_as_open_as_the_prompts_leave_it():
    x, prompts, seeds = as_answers(np.zeros((3, 15), dtype=int))
    found = stats.seeded_rate(x, prompts, seeds)
    assert found.lo == 0.0 and found.hi == pytest.approx(stats.wilson(0, 15).hi)


def test_seeds_alone_are_a_one_sample_t_test():
    values = [3.0, 5.0, 9.0, 4.0]
    found = stats.seeded_mean([5.25, 5.25], values)
    expected = sps.ttest_1samp(values, 0).confidence_interval()
    assert (found.difference.lo, found.difference.hi) == pytest.approx(tuple(expected))
    variance, df = added((4.0, 2), (4.0, 6))
    assert variance == 8.0 and df == pytest.approx(64 / (16 / 2 + 16 / 6))
