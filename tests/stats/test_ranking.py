"""Ranks and their intervals: known orders, ties shown as ties, and the level when all domains are
alike."""

from __future__ import annotations

import numpy as np
import pytest

from auditgap import stats
from auditgap.errors import UsageError


def answers(rng, levels, prompts=15, draws=20):
    """Misaligned answers [K, P] of `draws`, prompts and (domain, prompt) differing as they do."""
    logits = (
        np.asarray(levels)[:, None]
        + rng.normal(0, 1, prompts)
        + rng.normal(0, 0.7, (len(levels), prompts))
    )
    return rng.binomial(draws, 1 / (1 + np.exp(-logits)))


def test_a_clear_order():
    hits = answers(np.random.default_rng(0), [3, -5, 0])
    found = stats.ranking(hits, np.full(hits.shape, 20))
    assert [p.index for p in found] == [0, 2, 1] and [p.rank for p in found] == [1, 2, 3]
    assert [(p.rank_lo, p.rank_hi) for p in found] == [(1, 1), (2, 2), (3, 3)]
    assert (
        all(p.p_next < 0.05 for p in found[:2])
        and found[2].p_next is None
        and found[2].above_next.estimate is None
    )
    assert found[0].above_next.estimate == pytest.approx(found[0].rate - found[1].rate)


def test_equal_domains_share_a_rank_and_all_ranks_are_open():
    hits = np.tile(np.arange(15) % 4, (3, 1))
    found = stats.ranking(hits, np.full(hits.shape, 4))
    assert [p.rank for p in found] == [1, 1, 1] and {(p.rank_lo, p.rank_hi) for p in found} == {
        (1, 3)
    }
    assert [p.p_next for p in found] == [1.0, 1.0, None]


def test_nothing_rated_nothing_ranked():
    hits, trials = np.array([[1, 2], [0, 0], [0, 1]]), np.array([[4, 4], [0, 0], [4, 0]])
    with pytest.raises(UsageError, match="hits ≤ trials"):
        stats.ranking(hits, trials)
    hits[2, 1] = 0
    found = stats.ranking(hits, trials)
    assert sorted(p.index for p in found) == [0, 2] and [p.n_prompts for p in found] == [2, 1]
    assert found[0].p_next is None, "one prompt in common is no test"
    assert (
        stats.ranking(hits[:1], trials[:1]) == []
        and stats.ranking(np.zeros((0, 3)), np.zeros((0, 3))) == []
    )
    lone = stats.ranking([[1], [3]], [[4], [4]])
    assert [p.rank_lo for p in lone] == [None, None] and [p.index for p in lone] == [1, 0]


def test_all_and_none_are_told_apart_only_with_enough_prompts():
    def bounds(prompts):
        found = stats.ranking(
            np.array([np.full(prompts, 5), np.zeros(prompts)]), np.full((2, prompts), 5)
        )
        return [(p.rank_lo, p.rank_hi) for p in found]

    assert bounds(15) == [(1, 1), (2, 2)]


def test_equal_domains_are_seldom_ordered():
    rng, runs, wrong, neighbours = np.random.default_rng(1), 250, 0, 0
    for i in range(runs):
        hits = answers(rng, [-1.0] * 5)
        found = stats.ranking(hits, np.full(hits.shape, 20), n_resamples=500, seed=i)
        wrong += any((p.rank_lo, p.rank_hi) != (1, 5) for p in found)
        neighbours += any(p.p_next is not None and p.p_next < 0.05 for p in found)
    assert wrong / runs <= 0.075, "5 % and two standard errors, over all domains at once"
    assert neighbours / runs <= 0.05


def runs_of(rng, k, seeds, spread, prompts=15, draws=5):
    """Misaligned answers [K, S, P] of domains that are alike and fine-tuning runs that are not."""
    logits = (
        -1
        + rng.normal(0, 1, prompts)
        + rng.normal(0, spread, (k, seeds, 1))
        + rng.normal(0, 0.5, (k, seeds, prompts))
    )
    return rng.binomial(draws, 1 / (1 + np.exp(-logits)))


def test_domains_that_differ_by_their_runs_alone_are_seldom_ordered():
    """Measured over 150 studies: 5 % with 3 seeds (52 % when seeds are taken as fixed)."""
    rng, studies, wrong, fixed = np.random.default_rng(2), 80, 0, 0
    for i in range(studies):
        hits = runs_of(rng, 5, 3, 0.7)
        trials = np.full(hits.shape, 5)
        found = stats.ranking(hits, trials, n_resamples=400, seed=i)
        wrong += any((p.rank_lo, p.rank_hi) != (1, 5) for p in found)
        found = stats.ranking(hits.sum(1), trials.sum(1), n_resamples=400, seed=i)
        fixed += any((p.rank_lo, p.rank_hi) != (1, 5) for p in found)
    assert wrong / studies <= 0.1, "5 % and two standard errors"
    assert fixed / studies >= 0.3, "or there is nothing here to guard against"


def test_seeds_that_agree_leave_a_clear_order_and_two_seeds_no_ranks():
    hits = np.stack([answers(np.random.default_rng(s), [3, -5, 0]) for s in range(3)], axis=1)
    trials = np.full(hits.shape, 20)
    found = stats.ranking(hits, trials)
    assert [p.index for p in found] == [0, 2, 1]
    assert [(p.rank_lo, p.rank_hi) for p in found] == [(1, 1), (2, 2), (3, 3)]
    trials[1, 2], hits[1, 2] = 0, 0
    found = stats.ranking(hits, trials)
    assert [p.index for p in found] == [0, 2, 1], "the order stands"
    assert all(p.rank_lo is None and p.rank_hi is None for p in found), "one has but two seeds"
