"""Paired differences: known numbers, what is recovered, the level under no difference, and Holm's
correction."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as sps

from auditgap import stats
from auditgap.errors import UsageError
from auditgap.stats import Interval

NAN = float("nan")


def test_holm_by_hand():
    # 0.01 × 4; 0.02 × 3; 0.03 × 2; 0.04 × 1, then never below the one before
    assert stats.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # the example of R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm"): 0.03 0.06 0.06 0.02
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([None, 0.2, None]) == [None, 0.2, None], "what was not tested does not count"
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).uniform(size=17)
    assert stats.holm(list(p)) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_mcnemar_and_newcombe_by_hand():
    # 20 pairs: 6 only in the first, 1 only in the second, 5 in both, 8 in neither
    a, b = [1] * 6 + [0] + [1] * 5 + [0] * 8, [0] * 6 + [1] + [1] * 5 + [0] * 8
    found = stats.paired_shares(a, b)
    assert found.difference.estimate == pytest.approx(0.25) and found.n == 20
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7), "7 pairs disagree, 6 to 1"
    one, two = stats.wilson(11, 20), stats.wilson(6, 20)
    phi = (5 * 8 - 6 * 1 - 10) / np.sqrt(11 * 9 * 6 * 14)
    below, above = 11 / 20 - one.lo, two.hi - 6 / 20
    assert found.difference.lo == pytest.approx(
        0.25 - np.sqrt(below**2 - 2 * phi * below * above + above**2)
    )


def test_turning_a_pair_round_turns_the_difference():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    one, two = stats.paired_shares(a, b), stats.paired_shares(b, a)
    assert one.p == two.p and one.difference.estimate == -two.difference.estimate
    assert one.difference.lo == pytest.approx(
        -two.difference.hi
    ) and one.difference.hi == pytest.approx(-two.difference.lo)


@pytest.mark.parametrize("test", [stats.paired_means, stats.paired_shares])
def test_pairs_that_lack_a_side_are_left_out(test):
    found = test([1, 0, NAN, None, 1, 1], [0, 0, 1, 1, NAN, 1])
    assert found.n == 3 and found.difference.estimate == pytest.approx(1 / 3)
    nothing = test([NAN], [1])
    assert nothing.n == 0 and nothing.p is None and nothing.difference.estimate is None
    with pytest.raises(UsageError, match="paired"):
        test([1, 2], [1])


def test_equal_pairs_are_no_difference():
    same = stats.paired_means([0.0] * 8, [0.0] * 8)
    assert (same.p, same.difference.estimate) == (1.0, 0.0)
    apart = stats.paired_means([2.0] * 8, [1.0] * 8)
    assert apart.p == 2 * 0.5**8 and apart.difference.estimate == 1.0
    shares = stats.paired_shares([1] * 8, [1] * 8)
    assert shares.p == 1.0 and shares.difference.lo < 0 < shares.difference.hi, (
        "eight pairs do not prove equality"
    )


def test_p_and_interval_of_means_agree():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.2, 0.35, 0.5):
        found = stats.paired_means(rng.gamma(1, 1, 30) + shift, rng.gamma(1, 1, 30))
        outside = found.difference.lo > 0 or found.difference.hi < 0
        assert outside == (found.p < 0.05) or abs(found.p - 0.05) < 0.002


def test_a_known_difference_is_recovered():
    rng = np.random.default_rng(0)
    base = rng.gamma(1, 2, 60)
    found = stats.paired_means(base + 1 + rng.normal(0, 0.5, 60), base)
    assert found.difference.lo < 1 < found.difference.hi and found.p < 0.001
    assert found.difference.hi - found.difference.lo < 0.4, (
        "pairing takes the prompts' own spread out"
    )


def zero_inflated(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.uniform(size=n) < 0.6, 0.0, rng.gamma(1, 2, n))


def test_the_level_of_the_tests_when_nothing_differs():
    rng, runs = np.random.default_rng(7), 300
    means = [
        stats.paired_means(zero_inflated(rng, 24), zero_inflated(rng, 24), seed=i).p
        for i in range(runs)
    ]
    shares = [
        stats.paired_shares(rng.integers(0, 2, 24), rng.integers(0, 2, 24)).p for _ in range(runs)
    ]
    gaps = []
    for i in range(runs):
        easy = rng.uniform(size=24) < 0.3  # prompts that give way in both models
        clean, reached = (
            rng.uniform(size=(2, 24)) < 0.05,
            (rng.uniform(size=(2, 3, 24)) < 0.3) | easy,
        )
        given = [v.astype(float) for pair in zip(clean, reached, strict=True) for v in pair]
        gaps.append(stats.paired_gaps(*given, n_resamples=400, seed=i).p)
    for p in (means, shares, gaps):
        false_alarms = np.mean([v is not None and v < 0.05 for v in p])
        assert false_alarms <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / runs)
    assert np.mean([v < 0.05 for v in means]) > 0.005, "a test that never alarms would pass too"


def test_a_gap_that_differs_is_found():
    rng = np.random.default_rng(2)
    clean = np.zeros(50)
    strong, weak = (
        (rng.uniform(size=(3, 50)) < 0.7).astype(float),
        (rng.uniform(size=(2, 50)) < 0.1).astype(float),
    )
    found = stats.paired_gaps(clean, strong, clean, weak)
    assert found.difference.estimate == pytest.approx(strong.mean(1).max() - weak.mean(1).max())
    assert found.p < 1e-4 and found.n == 50
    same = stats.paired_gaps(clean, strong, clean, strong)
    assert (same.difference.estimate, same.p) == (
        0.0,
        1.0,
    ) and same.difference.lo < 0 < same.difference.hi
    assert stats.paired_gaps(clean, np.full((1, 50), NAN), clean, weak).p is None


def test_the_p_value_of_an_interval():
    z = sps.norm.ppf(0.975)
    assert stats.p_of_interval(Interval(z, 0.0, 2 * z)) == pytest.approx(0.05)
    assert stats.p_of_interval(Interval(-z, -2 * z, 0.0)) == pytest.approx(0.05)
    assert (
        stats.p_of_interval(Interval(1.0, None, 2.0)) is None
        and stats.p_of_interval(Interval()) is None
    )


# -------------------------------------------------------------------------------------------------------------
# welch


def test_welch_is_scipys():
    rng = np.random.default_rng(5)
    a, b = rng.normal(1, 1, 30), rng.normal(0, 3, 12)
    found, known = stats.welch([*a, NAN], b), sps.ttest_ind(a, b, equal_var=False)
    assert found.p == pytest.approx(known.pvalue) and found.n == 42
    assert (found.difference.lo, found.difference.hi) == pytest.approx(
        tuple(known.confidence_interval())
    )


def test_welch_says_what_it_cannot_test():
    few, flat = "fewer than 2", "do not vary"
    for a, b, why in (
        ([1.0], [1, 2, 3], few),
        ([None, None], [1, 2], few),
        ([2, 2, 2], [1, 1], flat),
    ):
        found = stats.welch(a, b)
        assert found.p is None and why in found.test and found.difference.lo is None
    assert stats.welch([2, 2, 2], [1, 1]).difference.estimate == 1.0


def test_welch_alarms_where_answers_to_one_prompt_are_alike():
    """Why it stands beside the paired test and does not replace it: prompts that move by themselves
    are no effect."""
    rng, runs = np.random.default_rng(6), 200
    alarms = np.zeros(2)
    for _ in range(runs):
        prompt = rng.normal(0, 0.7, (15, 1)) + rng.normal(0, 0.7, (2, 15, 1))
        with_, without = prompt + rng.normal(0, 0.7, (2, 15, 10))
        paired = stats.paired_means(with_.mean(1), without.mean(1))
        alarms += (stats.welch(with_.ravel(), without.ravel()).p < 0.05, paired.p < 0.05)
    assert alarms[0] / runs > 0.15 and alarms[1] / runs <= 0.085
