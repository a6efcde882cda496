"""AUROC, gap, ECE and Platt's scaling against scikit-learn, sums by hand, and made-up data whose
truth is known."""

import doctest

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from auditgap import stats
from auditgap.errors import UsageError
from auditgap.stats import classification

NAN = float("nan")


def answers(
    n_prompts: int, distance: float, seed: int, alike: float = 0.5
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores of a safe and an unsafe answer a prompt, `distance` apart; `alike` is the share of
    variance that they share."""
    rng = np.random.default_rng(seed)
    common, own = (
        rng.standard_normal(n_prompts) * alike**0.5,
        rng.standard_normal((2, n_prompts)) * (1 - alike) ** 0.5,
    )
    scores = np.concatenate([common + own[0] - distance / 2, common + own[1] + distance / 2])
    return scores, np.repeat([0.0, 1.0], n_prompts), [f"p{i}" for i in range(n_prompts)] * 2


def test_the_example_in_the_docstring_is_true():
    result = doctest.testmod(classification)
    assert result.attempted and not result.failed


# ------------------------------------------------------------------------------------------------------------
# AUROC


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_scikit_learns_with_ties_too(seed):
    rng = np.random.default_rng(seed)
    labels = np.r_[0.0, 1.0, rng.integers(0, 2, 60)]
    scores = rng.integers(0, 12, 62) / 3  # many ties
    assert stats.auroc(scores, labels).estimate == pytest.approx(
        roc_auc_score(labels, scores), abs=1e-12
    )


def test_delongs_variance_is_that_of_the_textbook():
    """Against the two variance components written out, one example at a time (DeLong et al. 1988),
    no clusters."""
    scores, labels, _ = answers(30, 1.0, seed=3, alike=0.0)
    low, high = scores[labels == 0], scores[labels == 1]
    won = np.array([[float(h > x) + 0.5 * (h == x) for x in low] for h in high])
    exact = won.mean(1).var(ddof=1) / len(high) + won.mean(0).var(ddof=1) / len(low)
    part = classification._auroc_part(scores, labels, np.arange(60), 60)
    # K/(K−1) instead of one a class
    assert classification._error(part.pulls) ** 2 == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(("n", "distance"), [(24, 1.0), (24, 2.0), (100, 1.0)])
def test_the_intervals_of_auroc_and_gap_cover_what_they_should(n, distance):
    truth = norm.cdf(distance / np.sqrt(2))
    grid = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    gap = expit(grid + distance / 2).mean() - expit(grid - distance / 2).mean()
    hits = np.zeros(2)
    for seed in range(300):
        scores, labels, groups = answers(n, distance, seed)
        found = stats.auroc(scores, labels, groups), stats.separation(expit(scores), labels, groups)
        hits += [i.lo <= t <= i.hi for i, t in zip(found, (truth, gap), strict=True)]
    assert (hits / 300 >= 0.92).all() and (hits / 300 <= 0.995).all()


def test_copies_of_a_prompt_add_no_certainty():
    scores, labels, groups = answers(40, 1.0, seed=1)
    once = stats.auroc(scores, labels, groups)
    copied = stats.auroc(np.tile(scores, 5), np.tile(labels, 5), groups * 5)
    assert copied.estimate == pytest.approx(once.estimate)
    assert copied.hi - copied.lo == pytest.approx(once.hi - once.lo, rel=1e-9)
    # as if they were five times as many prompts
    believed = stats.auroc(np.tile(scores, 5), np.tile(labels, 5))
    assert believed.hi - believed.lo < 0.6 * (once.hi - once.lo)


def test_a_perfect_auroc_still_has_an_interval():
    found = stats.auroc([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert found.estimate == 1.0 and found.hi == 1.0 and 0.3 < found.lo < 0.6
    assert stats.auroc([5, 4, 1, 0], [0, 0, 1, 1]).estimate == 0.0


@pytest.mark.parametrize("measure", [stats.auroc, stats.separation])
def test_one_class_alone_tells_nothing(measure):
    assert measure([0.1, 0.2], [1, 1]) == stats.Interval()
    assert measure([0.1, NAN], [1, 0]) == stats.Interval()
    assert measure([], []) == stats.Interval()


def test_unscored_examples_are_left_out():
    scores, labels, groups = answers(20, 1.0, seed=0)
    more = np.r_[scores, NAN, NAN], np.r_[labels, 0, 1], [*groups, "x", "x"]
    assert stats.auroc(*more) == stats.auroc(scores, labels, groups)


def test_labels_that_are_no_labels_are_refused():
    with pytest.raises(UsageError, match="0 or 1"):
        stats.auroc([0.1, 0.2], [0, 2])
    with pytest.raises(UsageError, match="one each"):
        stats.auroc([0.1, 0.2], [0])


def test_paired_differences_know_that_the_examples_are_the_same():
    scores, labels, groups = answers(60, 1.0, seed=2)
    other = scores + 0.1 * np.random.default_rng(0).standard_normal(len(scores))
    apart = stats.auroc(scores, labels, groups)
    found = stats.paired_auroc_difference(scores, other, labels, groups)
    assert found.estimate == pytest.approx(
        apart.estimate - stats.auroc(other, labels, groups).estimate
    )
    assert found.hi - found.lo < 0.3 * (apart.hi - apart.lo) and found.lo < 0 < found.hi
    gap = stats.paired_separation_difference(expit(scores), expit(0 * scores), labels, groups)
    assert (
        gap.estimate == pytest.approx(stats.separation(expit(scores), labels, groups).estimate)
        and gap.lo > 0
    )


# ------------------------------------------------------------------------------------------------------
# calibration


def test_ece_by_hand():
    p = [0.05, 0.05, 0.95, 0.95, 0.5]
    y = [0, 1, 1, 1, 0]
    # bin 0: |0.05 − 0.5| of 2; bin 14: |0.95 − 1| of 2; bin 7: |0.5 − 0| of 1
    assert stats.ece(p, y).estimate == pytest.approx((2 * 0.45 + 2 * 0.05 + 0.5) / 5)
    assert stats.ece([1.0], [1]).estimate == 0.0  # the last bin is closed
    # 1/15 lies between the two
    assert stats.ece([0.06, 0.07], [0, 1]).estimate == pytest.approx((0.06 + 0.93) / 2)


def test_ece_of_a_calibrated_score_is_about_what_chance_gives():
    rng = np.random.default_rng(0)
    p = rng.random(300)
    y = (rng.random(300) < p).astype(float)
    chance = stats.ece_by_chance(p)
    assert stats.ece(p, y).estimate == pytest.approx(chance, abs=0.03)
    assert stats.ece(p, y).lo < 0.02  # biased estimate, but the interval reaches down to the truth
    assert stats.ece(expit(4 * np.log(p / (1 - p))), y).lo > 0.03  # overconfident
    assert stats.ece_by_chance([]) is None


# truths of a million answers
@pytest.mark.parametrize(("slope", "truth"), [(1.4, 0.001), (0.3, 0.170), (4.0, 0.137)])
def test_the_interval_of_ece_covers_in_spite_of_its_bias(slope, truth):
    found = []
    for seed in range(60):
        scores, labels, _ = answers(50, 1.4, seed, alike=0.5)
        found.append(stats.ece(expit(slope * scores), labels))
    assert np.mean([i.lo <= truth <= i.hi for i in found]) >= 0.82
    assert np.mean([i.estimate for i in found]) > truth  # what the interval has to make up for


def test_the_difference_of_two_eces_carries_both_intervals():
    scores, labels, _ = answers(100, 1.4, seed=0)
    good, bad = expit(1.4 * scores), expit(20 * scores)
    found = stats.ece_difference(good, bad, labels)
    assert (
        found.estimate
        == pytest.approx(stats.ece(good, labels).estimate - stats.ece(bad, labels).estimate)
        and found.hi < 0
    )
    assert (
        stats.ece_difference(good, good, labels).lo
        < 0
        < stats.ece_difference(good, good, labels).hi
    )
    assert stats.ece_difference([NAN], [0.5], [1]) == stats.Interval()


def test_platts_scaling_finds_slope_and_offset():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(20_000) * 300
    labels = (rng.random(20_000) < expit(0.01 * logits - 0.7)).astype(float)
    found = stats.platt(logits, labels)
    assert found.slope == pytest.approx(0.01, rel=0.05) and found.offset == pytest.approx(
        -0.7, abs=0.06
    )
    assert found([0.0])[0] == pytest.approx(expit(-0.7), abs=0.02)


def test_platts_scaling_stays_finite_where_classes_are_apart_and_never_turns_a_probe_round():
    apart = stats.platt([-2000.0, -1000.0, 1000.0, 2000.0], [0, 0, 1, 1])
    assert np.isfinite([apart.slope, apart.offset]).all() and 0.1 < apart([-1500.0])[0] < 0.4
    turned = stats.platt([2.0, 1.0, -1.0, -2.0], [0, 0, 1, 1])
    assert turned.slope == 0.0 and turned([5.0])[0] == pytest.approx(0.5)
    assert stats.platt([1.0, 2.0], [1, 1]) is None
