"""Rank correlation and leave-one-out prediction: by hand, recovered, and their level where there is
nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as sps

from auditgap import stats
from auditgap.errors import UsageError


def test_exact_p_of_few_domains():
    assert stats.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]).p == pytest.approx(2 / 24)
    found = stats.rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 5, 4])
    assert (
        found.rho.estimate
        == pytest.approx(sps.spearmanr([1, 2, 3, 4, 5], [2, 1, 3, 5, 4]).statistic)
        == pytest.approx(0.8)
    )
    assert found.p == pytest.approx(16 / 120), "the table of Spearman's ρ: 8 of 120 orders reach .8"
    assert found.rho.lo < 0.8 < found.rho.hi


def test_ties_and_gaps_as_scipy_has_them():
    x, y = [1, 1, 2, 3, None, 5], [0.1, 0.2, 0.2, 0.5, 0.9, 0.4]
    found = stats.rank_correlation(x, y)
    assert found.n == 5 and found.rho.estimate == pytest.approx(
        sps.spearmanr([1, 1, 2, 3, 5], [0.1, 0.2, 0.2, 0.5, 0.4]).statistic
    )


def test_many_domains_draw_orders():
    rng = np.random.default_rng(0)
    x = rng.normal(size=11)
    y = x + rng.normal(size=11)
    found = stats.rank_correlation(x, y)
    assert found.p == pytest.approx(sps.spearmanr(x, y).pvalue, abs=0.01)
    assert stats.rank_correlation(x, x).p == pytest.approx(1e-4), (
        "as small as 9,999 orders can tell"
    )


def test_what_cannot_be_told_says_why():
    assert (
        stats.rank_correlation([1, 2], [1, 2]).reason == "2 domains with both values; 3 are needed"
    )
    assert (
        stats.predict_left_out([1, 2, 3], [1, 2, 3]).reason
        == "3 domains with both values; 4 are needed"
    )
    assert "same in all domains" in stats.rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).reason
    flat = stats.predict_left_out([1, 2, 3, 4], [0, 0, 0, 0])
    assert flat.p is None and flat.rho is None and "rate is the same" in flat.reason
    with pytest.raises(UsageError, match="one value a domain"):
        stats.rank_correlation([1, 2], [1])


def test_leave_one_out_is_a_fit_to_the_others():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=8), rng.normal(size=8)
    found = stats.leave_one_out(x, y)
    for i in range(8):
        slope, offset = np.polyfit(np.delete(x, i), np.delete(y, i), 1)
        assert found[i] == pytest.approx(offset + slope * x[i])
    assert stats.leave_one_out(x, np.stack([y, 2 * y])) == pytest.approx(
        np.stack([found, 2 * found])
    )
    assert stats.leave_one_out([1, 1, 1, 5], [1, 2, 3, 9])[3] == 2.0, (
        "no slope among the others: their mean"
    )


def test_a_line_is_foretold():
    found = stats.predict_left_out([0.1, 0.2, 0.3, 0.4, None], [1.0, 2.0, 3.0, 4.0, 9.0])
    assert found.predicted == pytest.approx((1.0, 2.0, 3.0, 4.0, None)) and found.n == 4
    assert found.rho == 1.0 and found.p == pytest.approx(2 / 24), (
        "the order turned round is a line too"
    )
    assert found.error == pytest.approx(0) and found.error_of_mean == pytest.approx(4 / 3)
    rng = np.random.default_rng(2)
    x = rng.uniform(0.5, 1, 9)
    strong = stats.predict_left_out(x, x + 0.01 * rng.normal(size=9))
    assert strong.rho > 0.9 and strong.p < 0.001


@pytest.mark.parametrize("n", [5, 9])
def test_nothing_to_foretell_is_seldom_foretold(n):
    rng, runs = np.random.default_rng(n), 500
    found = [
        stats.predict_left_out(rng.normal(size=n), rng.normal(size=n), draws=999)
        for _ in range(runs)
    ]
    assert np.mean([f.rho for f in found]) < -0.25, (
        "predictions without a relation lie on the wrong side"
    )
    assert np.mean([f.p <= 0.05 for f in found]) <= 0.07, "5 % and two standard errors"
    p = np.sort([f.p for f in found])
    assert (p - np.arange(runs) / runs).min() > -0.07, (
        "nowhere do small p come more often than they may"
    )


def test_the_naive_test_would_alarm():
    """What the permutation of the whole procedure is for: Spearman's own test takes predictions for
    independent."""
    rng, runs = np.random.default_rng(3), 300
    alarms = 0
    for _ in range(runs):
        y = rng.normal(size=9)
        alarms += sps.spearmanr(stats.leave_one_out(rng.normal(size=9), y), y).pvalue < 0.05
    assert alarms / runs > 0.2


@pytest.mark.parametrize("n", [7, 10])
def test_no_correlation_no_alarm(n):
    rng, runs = np.random.default_rng(n), 600
    found = [
        stats.rank_correlation(rng.normal(size=n), rng.normal(size=n), draws=999)
        for _ in range(runs)
    ]
    assert np.mean([f.p <= 0.05 for f in found]) <= 0.068
    assert np.mean([f.rho.lo <= 0 <= f.rho.hi for f in found if f.rho.lo is not None]) >= 0.93
