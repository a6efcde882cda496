"""auditgap.stats against figures worked out by hand, published values and properties that must hold
for any data."""

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import binomtest

from auditgap import stats
from auditgap.errors import UsageError
from auditgap.stats import Interval, intervals, vulnerability
from auditgap.stats.incidence import incidence

NAN = float("nan")


@pytest.mark.parametrize("module", [stats, intervals, vulnerability])
def test_the_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# -------------------------------------------------------------------------------------------------------------
# LVS


def test_lvs_is_the_drop_in_reward_over_the_log_of_the_norm():
    score = stats.lvs([2.0, 1.0, 0.0], [-1.0, 1.5, 0.0], [math.e - 1, 4.0, 4.0], eta=0.0)
    assert score == pytest.approx([3.0, 0.0, 0.0])


def test_lvs_is_undefined_where_an_input_is():
    score = stats.lvs(
        [NAN, 1.0, 1.0, 1.0, None], [0.0, NAN, 0.0, 0.0, 0.0], [1.0, 1.0, NAN, -1.0, 1.0]
    )
    assert np.isnan(score).all()


def test_lvs_of_a_zero_edit_divides_by_eta_alone():
    assert stats.lvs(1.0, 0.0, 0.0) == pytest.approx(1e6)
    assert stats.lvs(1.0, 1.0, 0.0) == 0.0


def test_lvs_broadcasts_over_budgets():
    assert stats.lvs(np.ones((3, 1)), np.zeros((3, 1)), np.ones((1, 4))).shape == (3, 4)


# ------------------------------------------------------------------------------------------------
# means and medians


def test_bootstrap_leaves_out_the_unscored_and_is_repeatable():
    values = np.r_[np.arange(30.0), [NAN] * 5]
    first = stats.bootstrap(values, seed=7)
    assert first.estimate == 14.5 and first.lo < 14.5 < first.hi
    assert first == stats.bootstrap(values[:30], seed=7)
    assert first != stats.bootstrap(values, seed=8)
    assert stats.bootstrap(values, "median").estimate == 14.5


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_of_too_little_or_constant_data(statistic):
    assert stats.bootstrap([], statistic) == Interval(None, None, None)
    assert stats.bootstrap([None, NAN], statistic) == Interval(None, None, None)
    assert stats.bootstrap([3.0, None], statistic) == Interval(3.0, None, None)
    assert stats.bootstrap([0.0] * 24, statistic) == Interval(0.0, None, None), "no certainty"


def test_the_mean_of_skewed_data_is_less_certain_above():
    interval = stats.bootstrap(np.random.default_rng(0).lognormal(0, 1, 40))
    assert interval.hi - interval.estimate > 1.2 * (interval.estimate - interval.lo)


def test_more_confidence_is_wider():
    values = np.random.default_rng(0).gamma(2, 1, 50)
    narrow, wide = (stats.bootstrap(values, confidence=c) for c in (0.8, 0.99))
    assert wide.lo < narrow.lo and narrow.hi < wide.hi


def test_paired_difference_uses_only_pairs():
    interval = stats.paired_difference([3.0, NAN, 5.0, 9.0], [1.0, 2.0, None, 5.0])
    assert interval.estimate == 3.0
    assert stats.paired_difference([1, 2, 3], [0, 1, 2]) == Interval(1.0, None, None)
    assert stats.paired_difference([1.0], [NAN]) == Interval(None, None, None)


def test_pairing_removes_what_prompts_have_in_common():
    rng = np.random.default_rng(0)
    prompt, noise = rng.normal(0, 10, 50), rng.normal(0, 1, 50)
    assert stats.paired_difference(prompt + 1 + noise, prompt).lo > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: stats.bootstrap([1.0, 2.0], "medain"), "Did you mean 'median'"),
        (lambda: stats.bootstrap([1.0, 2.0], confidence=95), "between 0 and 1"),
        (lambda: stats.bootstrap(["high"]), "must be numbers"),
        (lambda: stats.bootstrap([[1.0]]), "1 dimension"),
        (lambda: stats.paired_difference([1.0], [1.0, 2.0]), "paired; 1 and 2 came"),
        (lambda: stats.wilson(3, 2), "0 ≤ k ≤ n"),
        (lambda: stats.wilson(NAN, 2), "0 ≤ k ≤ n"),
        (lambda: stats.asr_envelope([[0.5]]), "must be 1"),
        (lambda: incidence([-1.0], ["flipped"]), "finite and above 0"),
        (lambda: incidence([1.0], ["flipped", None]), "1 and 2 came"),
        (lambda: incidence([1.0], ["vanished"]), "An ending is one of"),
        (lambda: stats.detectable_difference(0, 0.1), "n ≥ 1"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(call, says):
    with pytest.raises(UsageError, match=says):
        call()


# -----------------------------------------------------------------------------------------------------------
# rates


@pytest.mark.parametrize(("k", "n"), [(0, 24), (1, 24), (12, 24), (24, 24), (3, 200)])
def test_wilson_is_scipys_where_scipy_has_one(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    found = stats.wilson(k, n)
    assert (found.lo, found.hi) == pytest.approx((expected.low, expected.high))


def test_wilson_takes_fractions_and_nothing():
    assert stats.wilson(0, 0) == Interval(None, None, None)
    assert stats.wilson(1, 10).lo < stats.wilson(1.5, 10).lo < stats.wilson(2, 10).lo


def test_rogan_gladen_undoes_the_judges_errors():
    # of 1000, 200 harmful: 180 found (sensitivity .9) and 40 of 800 accused (specificity .95)
    interval = stats.rogan_gladen(220, 1000, 900, 1000, 950, 1000)
    assert interval.estimate == pytest.approx(0.2)
    assert interval.lo < 0.2 < interval.hi
    raw = stats.wilson(220, 1000)
    assert interval.hi - interval.lo > raw.hi - raw.lo, (
        "the judge's own uncertainty must widen the interval"
    )


def test_rogan_gladen_ends_by_lang_and_reiczigels_formula():
    """Worked out apart from the code: 30 of 100, sensitivity 15 of 20, specificity 18 of 20."""
    interval = stats.rogan_gladen(30, 100, 15, 20, 18, 20)
    assert (interval.lo, interval.hi) == pytest.approx((0.034098, 0.526441), abs=1e-6)


def test_rogan_gladen_stays_within_rates_and_knows_when_it_cannot():
    assert stats.rogan_gladen(8, 100, 90, 100, 90, 100).estimate == 0.0
    assert stats.rogan_gladen(0, 100, 90, 100, 90, 100) == stats.Interval(), (
        "fewer than false alarms alone"
    )
    assert stats.rogan_gladen(92, 100, 90, 100, 90, 100).estimate == 1.0
    assert stats.rogan_gladen(100, 100, 90, 100, 90, 100) == stats.Interval()
    assert stats.rogan_gladen(10, 100, 50, 100, 50, 100) == Interval(None, None, None)
    assert stats.rogan_gladen(10, 100, 0, 0, 90, 100) == Interval(None, None, None)
    assert stats.informedness(2, 3, 2, 3).estimate > 0 and stats.rogan_gladen(
        1, 2, 2, 3, 2, 3
    ) == Interval(None, None, None)
    assert stats.rogan_gladen(9, 10, 3, 10, 1, 1) == Interval(None, None, None), (
        "better than chance by one example only"
    )


def test_a_judge_is_believed_when_its_interval_lies_above_chance():
    """Se 6/10 and Sp 7/10 by hand: Wilson [.3127, .8318] and [.3968, .8922], squared and added."""
    j = stats.informedness(6, 10, 7, 10)
    assert (j.estimate, j.lo, j.hi) == pytest.approx((0.3, 0.3 - 0.4177, 0.3 + 0.3011), abs=1e-4)
    assert stats.rogan_gladen(5, 10, 6, 10, 7, 10) == Interval(None, None, None)
    more = stats.rogan_gladen(50, 100, 60, 100, 70, 100)
    assert stats.informedness(60, 100, 70, 100).lo > 0 and more.estimate == pytest.approx(0.2 / 0.3)


def test_text_known_to_be_broken_is_no_false_alarm_and_no_news_of_the_judge():
    counts = (90, 100, 70, 100)
    assert stats.rogan_gladen(15, 100, *counts, n_sure=50).estimate == 0.0, (
        "15 of 50 are what a harmless half would give"
    )
    half = stats.rogan_gladen(33, 100, *counts, n_sure=50)
    assert half.estimate == pytest.approx(0.5 * (0.66 - 0.3) / 0.6)
    judged = stats.rogan_gladen(33, 50, *counts)
    assert half.hi - half.lo > (judged.hi - judged.lo) / 2, "how many are broken is uncertain too"
    assert stats.rogan_gladen(0, 40, *counts, n_sure=40) == stats.wilson(0, 40)
    with pytest.raises(UsageError, match="not judged"):
        stats.rogan_gladen(8, 10, *counts, n_sure=3)


def test_answers_to_one_prompt_count_for_less():
    own = list(range(6))
    assert stats.effective_size([1, 0, 1, 1, 0, 1], own) == 6
    assert stats.effective_size([1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2]) == pytest.approx(2.4), (
        "3 groups that each agree"
    )
    assert (
        stats.effective_size([1, 1, 1, 1], ["a", "a", "b", "b"]) == 2
        and stats.effective_size([1, 1], ["a", "a"]) == 1
    )
    assert stats.effective_size([], []) == 0


def test_resampling_by_group_is_wider_than_by_example_and_admits_ignorance():
    x = np.repeat(np.random.default_rng(0).random(30), 4)
    mean = lambda i: float(x[i].mean())  # noqa: E731
    grouped, single = (
        stats.resampled(mean, g, seed=1) for g in (np.repeat(range(30), 4), range(120))
    )
    assert grouped.estimate == single.estimate == pytest.approx(x.mean())
    assert grouped.hi - grouped.lo > 1.6 * (single.hi - single.lo)
    assert (
        stats.resampled(lambda i: None, [1, 2]) == Interval()
        and stats.resampled(mean, [7] * 120).lo is None
    )


counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, counts, counts)
def test_rates_are_rates_and_ends_lie_around_the_estimate(rate, sens, spec):
    for interval in (stats.wilson(*rate), stats.rogan_gladen(*rate, *sens, *spec)):
        if interval.estimate is not None:
            assert 0 <= interval.lo <= interval.estimate <= interval.hi <= 1


# --------------------------------------------------------------------------------------------------------
# envelope

outcomes = arrays(
    float,
    array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([0.0, 1.0, NAN]),
)


def test_the_envelope_keeps_the_first_harm_and_admits_ignorance():
    found = stats.asr_envelope([[0, 1, 0], [NAN, 1, NAN], [0, NAN, 0], [1, NAN, 0], [0, 0, 0]])
    np.testing.assert_array_equal(
        found, [[0, 1, 1], [NAN, 1, 1], [0, NAN, NAN], [1, 1, 1], [0, 0, 0]]
    )


@given(outcomes)
def test_the_envelope_rate_cannot_fall_as_the_budget_grows(array):
    envelope = stats.asr_envelope(array)
    ones, zeros = (envelope == 1).sum(axis=0), (envelope == 0).sum(axis=0)
    scored = ones + zeros > 0
    rates = ones[scored] / (ones + zeros)[scored]
    assert (np.diff(rates) >= -1e-12).all()
    assert (envelope[array == 1] == 1).all(), "a harm that was seen is never lost"


# -------------------------------------------------------------------------------------------------------
# audit gap


# -----------------------------------------------------------------------------------------------------------
# power


def test_the_power_of_24_prompts():
    assert stats.detectable_difference(24, 0.05) == pytest.approx(8 / 24)
    assert round(100 * stats.detectable_difference(24, 0.05)) == 33


def test_power_by_simulation():
    """The rise it names is found in about 80 % of runs of the z-test it is about, and a step less
    in fewer."""
    n, base = 200, 0.05
    rise = stats.detectable_difference(n, base)
    rng = np.random.default_rng(0)

    def found(rate):
        a, b = rng.binomial(n, base, 20_000) / n, rng.binomial(n, rate, 20_000) / n
        pooled = (a + b) / 2
        return (np.abs(b - a) > 1.96 * np.sqrt(2 * pooled * (1 - pooled) / n)).mean()

    assert 0.79 < found(base + rise) < 0.86
    assert found(base + rise - 0.02) < 0.75


def test_more_prompts_show_smaller_differences_and_few_show_none():
    rises = [stats.detectable_difference(n, 0.05) for n in (12, 24, 100, 1000)]
    assert rises == sorted(rises, reverse=True)
    assert stats.detectable_difference(3, 0.05) is None
    assert stats.detectable_difference(24, 1.0) is None
    assert 0 < stats.detectable_difference(1000, 0.0) < 0.02
