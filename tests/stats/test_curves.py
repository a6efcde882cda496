"""Curves: crossings and areas by hand, censoring that stays typed, intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from auditgap import stats
from auditgap.errors import UsageError
from auditgap.stats.crossing import Crossing, area_under, steps_to
from auditgap.stats.curves import curve, curve_difference

STEPS = np.arange(0.0, 45.0, 5.0)


def planted(rng, n_seeds=3, n=24, *, middle=20.0, between_seeds=3.0, steps=STEPS):
    """Outcomes of prompts that give way at a step of their own, shifted by the seed's luck; probit
    in the step."""
    at = (
        rng.normal(middle, 8, n)[None]
        + rng.normal(0, between_seeds, n_seeds)[:, None]
        + rng.normal(0, 4, (n_seeds, n))
    )
    return (steps[None, :, None] >= at[:, None, :]).astype(float)


# -- by hand
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "threshold", "step"),
    [
        ([0.1, 0.3, 0.7], 0.5, 15.0),
        ([0.1, 0.5, 0.7], 0.5, 10.0),
        ([0.6, 0.2, 0.9], 0.5, 0.0),  # reached before the first step
        ([0.0, 0.9, 0.1], 0.5, 10 * 0.5 / 0.9),  # the first time counts, not the last
        ([0.0, math.nan, 0.8], 0.4, 10.0),  # an unmeasured step is bridged
        ([math.nan, 0.6, 0.8], 0.5, 10.0),  # the first measured one
        ([0.0, 0.0, 1.0], 1.0, 20.0),
    ],
)
def test_steps_to_by_hand(rates, threshold, step):
    assert steps_to([0, 10, 20], rates, threshold) == Crossing(pytest.approx(step))


def test_never_reached_is_a_bound_and_no_number():
    found = steps_to([0, 10, 20], [0.1, 0.2, 0.49], 0.5)
    assert found.step is None and not found.reached and found.censored_at == 20.0
    assert steps_to([0, 10, 20], [0.1, 0.2, math.nan], 0.5).censored_at == 10.0, (
        "nobody looked at step 20"
    )
    assert steps_to([0, 10], [math.nan, math.nan], 0.5) == Crossing()


def test_area_by_hand():
    assert area_under([0, 10, 40], [0.0, 1.0, 1.0]) == pytest.approx((5 + 30) / 40)
    assert area_under([0, 10, 40], [1, 1, 1]) == 1.0 and area_under([0, 10], [0, 0]) == 0.0
    assert area_under([0, 10, 20], [0.0, math.nan, 1.0]) == pytest.approx(0.5)
    assert area_under([0, 10, 20], [0.0, 1.0, math.nan]) is None, "half the span is another area"
    assert area_under([5], [1.0]) is None


def test_the_mean_curve_weighs_seeds_alike_whatever_was_unscored():
    outcomes = np.array([[[1, 1, 1, 1]], [[0, math.nan, math.nan, math.nan]]])
    assert curve([0], outcomes).rates[0].estimate == pytest.approx(0.5)
    assert curve([0], np.full((1, 1, 3), math.nan)).rates[0] == stats.Interval()


@pytest.mark.parametrize(
    ("steps", "outcomes", "says"),
    [
        ([0, 10, 5], np.zeros((1, 3, 2)), "rise"),
        ([0, 10], np.zeros((1, 3, 2)), "seeds, 2 steps"),
        ([0], np.full((1, 1, 2), 0.5), "1 (it happened)"),
        ([0], np.zeros((1, 2)), "3 dimension"),
        ([0], np.zeros((1, 1, 0)), "none of them empty"),
    ],
)
def test_bad_input_is_a_sentence(steps, outcomes, says):
    with pytest.raises(UsageError) as error:
        curve(steps, outcomes)
    assert says in str(error.value)
    with pytest.raises(UsageError, match="threshold"):
        steps_to([0, 1], [0, 1], 50)
    with pytest.raises(UsageError, match="same seeds"):
        curve_difference([0, 1], np.zeros((1, 2, 3)), np.zeros((2, 2, 3)))


# -- intervals
# -------------------------------------------------------------------------------------------------------------


def test_fewer_than_three_seeds_say_nothing_of_seeds():
    rng = np.random.default_rng(0)
    outcomes = planted(rng, 3)
    assert [curve(STEPS, outcomes[:s]).over for s in (1, 2, 3)] == [
        "prompts",
        "prompts",
        "seeds and prompts",
    ]
    one, twice = curve(STEPS, outcomes[:1]), curve(STEPS, np.concatenate([outcomes[:1]] * 2))
    widths = [sum(r.hi - r.lo for r in found.rates[2:6]) for found in (one, twice)]
    assert widths[1] > 0.9 * widths[0], "the same seed again adds no certainty"


def test_one_seed_is_wilson():
    outcomes = planted(np.random.default_rng(1), 1)
    found = curve(STEPS, outcomes)
    assert all(
        r == stats.wilson(k, 24) for r, k in zip(found.rates, outcomes[0].sum(1), strict=True)
    )


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(2)
    alike, apart = (curve(STEPS, planted(rng, 3, 200, between_seeds=s)) for s in (0.1, 10.0))
    assert apart.area.hi - apart.area.lo > 2 * (alike.area.hi - alike.area.lo)


def test_certainty_is_not_claimed_where_all_agree():
    outcomes = np.zeros((3, 3, 24))
    outcomes[:, 1:] = 1
    found = curve([0, 10, 20], outcomes)
    assert found.rates[0].hi == pytest.approx(stats.wilson(0, 24).hi)
    assert found.rates[1].lo == pytest.approx(stats.wilson(24, 24).lo)
    crossing = found.crossings[0.5]
    assert (
        crossing.lo < crossing.step == 5.0 < crossing.hi
        and found.area.lo < found.area.estimate < found.area.hi
    )
    assert 0 < found.rises[1].lo < found.rises[1].estimate == 1.0
    same = curve_difference([0, 10, 20], outcomes, outcomes)
    assert same.crossings[0.5].lo < 0 < same.crossings[0.5].hi and same.area.lo < 0 < same.area.hi


def test_the_rise_is_paired_and_zero_by_definition_at_the_first_step():
    outcomes = planted(np.random.default_rng(4))
    found = curve(STEPS, outcomes)
    assert found.rises[0] == stats.Interval(0.0)
    assert found.rises[5].estimate == pytest.approx(
        found.rates[5].estimate - found.rates[0].estimate
    )
    shifted = outcomes.copy()
    # prompts that complied all along widen the rate, and say nothing of the rise
    shifted[:, :, :8] = 1
    assert curve(STEPS, shifted).rises[5].hi <= found.rises[5].hi + 0.05


def test_an_unreached_threshold_leaves_an_open_end():
    rng = np.random.default_rng(5)
    slow = planted(rng, middle=36.0, between_seeds=1.0)
    found = curve(STEPS, slow).crossings
    assert found[0.5].reached and found[0.8].step is None and found[0.8].censored_at == 40.0
    assert found[0.8].lo is not None and found[0.8].lo > 25 and found[0.8].hi is None


def test_differences_with_an_unreached_side_are_half_lines():
    rng = np.random.default_rng(6)
    fast, never = planted(rng, middle=8.0, between_seeds=0.5), np.zeros((3, len(STEPS), 24))
    base_never = curve_difference(STEPS, never, fast).crossings[0.5]
    assert base_never.estimate is None and base_never.hi is None and 20 < base_never.lo < 40
    subject_never = curve_difference(STEPS, fast, never).crossings[0.5]
    assert (
        subject_never.estimate is None and subject_never.lo is None and -40 < subject_never.hi < -20
    )
    neither = curve_difference(STEPS, never, never).crossings[0.5]
    assert neither == stats.Interval(), "nothing was seen of either"


def test_pairing_by_prompt_tightens_the_difference():
    rng = np.random.default_rng(7)
    base = planted(rng, 1, 60)
    near = np.roll(base, 1, axis=1)
    near[:, 0] = 0  # the same prompts, a step later
    paired = curve_difference(STEPS, base, near).area
    shuffled = curve_difference(STEPS, base, near[:, :, rng.permutation(60)]).area
    assert paired.estimate == pytest.approx(shuffled.estimate) and paired.lo > 0
    assert paired.hi - paired.lo < 0.6 * (shuffled.hi - shuffled.lo)


def test_it_is_the_same_again_and_another_with_another_seed():
    outcomes = planted(np.random.default_rng(8))
    assert curve(STEPS, outcomes) == curve(STEPS, outcomes)
    assert curve(STEPS, outcomes, seed=1).area != curve(STEPS, outcomes).area


@pytest.mark.parametrize(("n_seeds", "n", "between"), [(3, 24, 6.0), (5, 24, 4.0), (1, 32, 0.0)])
def test_intervals_cover(n_seeds, n, between):
    """At least 90 % of 120 nominal 95 % intervals hold the truth (a tenth of the runs would be
    chance at p < .01)."""
    from scipy.stats import norm

    truth = norm.cdf((STEPS - 20.0) / math.sqrt(8**2 + between**2 + 4**2))
    rng = np.random.default_rng(9)
    hits = np.zeros(4)
    runs = 120
    for _ in range(runs):
        first, second = (planted(rng, n_seeds, n, between_seeds=between) for _ in range(2))
        found = curve(STEPS, first, n_resamples=400)
        cross, target = found.crossings[0.5], steps_to(STEPS, truth, 0.5).step
        hits[0] += found.rates[3].lo <= truth[3] <= found.rates[3].hi
        hits[1] += cross.lo <= target and (cross.hi is None or target <= cross.hi)
        hits[2] += found.area.lo <= area_under(STEPS, truth) <= found.area.hi
        between_them = curve_difference(STEPS, first, second, n_resamples=400).area
        hits[3] += between_them.lo <= 0 <= between_them.hi
    assert (hits / runs >= 0.9).all(), hits / runs
