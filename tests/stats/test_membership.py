"""Membership scores by hand, AUROC with a known answer, and its level when members and others are
alike."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from auditgap import stats
from auditgap.errors import UsageError


def test_min_k_takes_the_least_likely_tokens():
    nlls = [0.1, 0.2, 4.0, 2.0, 0.1]
    assert stats.min_k(nlls, 0.4) == 3.0 and stats.min_k(nlls, 1.0) == pytest.approx(np.mean(nlls))
    assert stats.min_k(nlls, 0.2) == 4.0 and stats.min_k(nlls, 0.01) == 4.0, "at least one token"
    assert stats.min_k(list(range(10)), 0.3) == 8.0, (
        "0.3 · 10 is 3 tokens, whatever fp64 makes of it"
    )
    assert stats.min_k([], 0.2) is None and stats.min_k([1.0, float("nan")], 0.2) is None
    with pytest.raises(UsageError, match=r"0\.2"):
        stats.min_k(nlls, 0.0)


def test_min_k_pp_is_standardised_over_the_vocabulary():
    # two tokens, vocabulary of three: μ = E[log p], σ = its standard deviation under p, by hand
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    mean = (p * np.log(p)).sum(1)
    std = np.sqrt((p * np.log(p) ** 2).sum(1) - mean**2)
    z = stats.standardise(np.log(p[[0, 1], [0, 1]]), mean, std)
    assert z == pytest.approx((np.log([0.7, 0.1]) - mean) / std)
    assert stats.min_k_pp(z, 0.5) == pytest.approx(-z.min()), "turned: larger = less likely"
    flat = stats.standardise([np.log(1 / 3)], [np.log(1 / 3)], [0.0])
    assert np.isnan(flat).all() and stats.min_k_pp(flat, 0.5) is None


def test_zlib_counts_repetition_less():
    text = "blue " * 40
    assert stats.zlib_ratio(30.0, text) == pytest.approx(30.0 / len(zlib.compress(text.encode())))
    assert stats.zlib_ratio(30.0, text) > stats.zlib_ratio(
        30.0, "q7#Lz!0pWv9@xKt3" * 12 + "".join(map(chr, range(33, 126)))
    )
    assert stats.zlib_ratio(None, text) is None and stats.zlib_ratio(1.0, "") is None
    assert stats.zlib_ratio(1.0, "a\ud800") > 0, "a lone surrogate is text that models write"


def test_premia_is_the_log_ratio_of_whole_responses():
    # log π_θ = −2·10, log π_ref = −2.5·10: the ratio is +5, as a loss −5
    assert stats.premia([2.0], [2.5], [10]) == pytest.approx([-5.0])


def test_auroc_of_known_separation():
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.normal(0, 1, 4000), rng.normal(1, 1, 4000)])
    found = stats.membership_auroc(losses, np.arange(8000) < 4000)
    assert found.estimate == pytest.approx(0.7602, abs=0.012), "Φ(1/√2)"
    assert found.lo < 0.7602 < found.hi
    assert stats.membership_auroc([0.2, 0.3, 1.5, 1.2], [True, True, False, False]).estimate == 1.0
    assert stats.membership_auroc([1.5, 1.2, 0.2, 0.3], [True, True, False, False]).estimate == 0.0
    assert stats.membership_auroc([1.0, 1.0], [True, True]).estimate is None
    assert stats.membership_auroc([1.0, float("nan"), 2.0], [True, False, False]).estimate == 1.0


def test_rows_that_seeds_repeat_are_counted_once():
    rng = np.random.default_rng(1)
    x, member = rng.normal(size=60), np.arange(60) < 40
    one = stats.membership_auroc(x, member, np.arange(60))
    three = stats.membership_auroc(
        np.repeat(x, 3), np.repeat(member, 3), np.repeat(np.arange(60), 3)
    )
    assert (three.lo, three.hi) == pytest.approx((one.lo, one.hi))
    naive = stats.membership_auroc(np.repeat(x, 3), np.repeat(member, 3))
    assert naive.hi - naive.lo < 0.7 * (one.hi - one.lo)


def test_no_membership_no_alarm():
    rng, alarms, runs = np.random.default_rng(2), 0, 1000
    # few held-out rows beside many trained: where one shared variance alarms too often
    for _ in range(runs):
        x = rng.normal(size=(220, 1)) * np.sqrt(0.5) + rng.normal(size=(220, 3)) * np.sqrt(0.5)
        found = stats.membership_auroc(
            x.ravel(), np.repeat(np.arange(220) < 200, 3), np.repeat(np.arange(220), 3)
        )
        alarms += not found.lo <= 0.5 <= found.hi
    assert alarms / runs <= 0.064, "5 % and two standard errors"


def test_roc_by_hand():
    misses, hits = stats.roc([1, 2, 2, 3], [True, True, False, False])
    assert misses.tolist() == [0, 0, 0.5, 1] and hits.tolist() == [0, 0.5, 1, 1]
    area = np.trapezoid(hits, misses)
    assert (
        area == stats.membership_auroc([1, 2, 2, 3], [True, True, False, False]).estimate == 0.875
    )
    assert stats.roc([1.0], [True])[0].size == 0
