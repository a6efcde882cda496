"""Cohen's κ against scikit-learn, undefined where it is, and an interval that covers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from auditgap.errors import UsageError
from auditgap.stats import Interval, kappa, resampled


def test_it_is_cohens():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.integers(0, 2, 50)
        b = np.where(rng.uniform(size=50) < 0.7, a, 1 - a)
        assert kappa(a, b, range(50)).estimate == pytest.approx(cohen_kappa_score(a, b))


def test_unscored_is_left_out_and_constants_are_undefined():
    assert kappa([1, 0, np.nan, 1], [1, 0, 1, None], range(4)).estimate == 1.0
    assert (
        kappa([0, 0], [0, 0], [1, 2])
        == kappa([], [], [])
        == kappa([np.nan], [1], [1])
        == Interval()
    )
    assert kappa([1, 1], [0, 0], [1, 2]).estimate == 0.0, (
        "they never agree, and chance would not either"
    )
    with pytest.raises(UsageError, match="one each an answer"):
        kappa([1, 0], [1], [1, 2])


def test_one_prompt_has_no_interval():
    found = kappa([1, 0, 1], [1, 0, 0], ["p"] * 3)
    assert found.estimate is not None and found.lo is None
    assert kappa([1, 0, 1], [1, 0, 1], range(3)) == Interval(1.0, None, None), (
        "agreement throughout says nothing of its spread"
    )


def test_the_interval_resamples_prompts():
    rng = np.random.default_rng(1)
    a = np.repeat(rng.integers(0, 2, 40), 3)
    b = np.where(np.repeat(rng.uniform(size=40), 3) < 0.8, a, 1 - a)
    prompts = np.repeat(np.arange(40), 3)
    slow = resampled(lambda i: cohen_kappa_score(a[i], b[i]), prompts)
    fast, alone = kappa(a, b, prompts), kappa(a, b, range(120))
    assert (fast.lo, fast.hi) == (
        pytest.approx(slow.lo, abs=0.05),
        pytest.approx(slow.hi, abs=0.05),
    )
    assert fast.hi - fast.lo > 1.3 * (alone.hi - alone.lo), "answers to one prompt are alike"
