"""Directions with known answers: what is planted comes back, noise has its ceiling, nothing has no
cosine."""

from __future__ import annotations

import numpy as np
import pytest

from auditgap import stats
from auditgap.errors import UsageError
from auditgap.stats import geometry


def planted(rng, direction, n, noise):
    """n answers on either side of a direction [L, D]."""
    return direction + noise * rng.normal(size=(n, *direction.shape)), noise * rng.normal(
        size=(n, *direction.shape)
    )


def test_the_difference_of_means():
    high, low = np.arange(12.0).reshape(2, 3, 2), np.ones((4, 3, 2))
    assert stats.direction(high, low) == pytest.approx(high.mean(0) - 1)
    assert np.isnan(stats.direction(high[:0], low)).all()
    with pytest.raises(UsageError, match=r"\[n, L, D\]"):
        stats.direction(high, low[:, :2])


def test_split_half_knows_the_reliability():
    # ‖s‖² / (‖s‖² + 2‖e‖²), ‖e‖² = D·σ²·(1/n + 1/m), exactly in expectation for large D
    rng, width, n, noise = np.random.default_rng(0), 4000, 20, 0.5
    s = rng.normal(size=(2, width))
    s *= np.array([[3.0], [10.0]]) / np.linalg.norm(s, axis=1, keepdims=True)
    halves = stats.split_half(*planted(rng, s, n, noise), seed=1)
    error = width * noise**2 * 2 / n
    assert halves == pytest.approx([9 / (9 + 2 * error), 100 / (100 + 2 * error)], abs=0.03)
    assert geometry.reliability(halves) == pytest.approx(
        [9 / (9 + error), 100 / (100 + error)], abs=0.04
    )


def test_no_direction_has_no_reliability():
    rng = np.random.default_rng(1)
    found = [
        stats.split_half(rng.normal(size=(40, 2, 256)), rng.normal(size=(40, 2, 256)), seed=i)
        for i in range(60)
    ]
    assert abs(np.mean(found)) < 0.02, "the halves of noise agree by chance alone"
    assert np.isnan(geometry.reliability([-0.1, 0.0])).all()


def test_the_ceiling_is_what_two_measurements_of_one_direction_show():
    rng, cosines, ceilings = np.random.default_rng(2), [], []
    for i in range(60):
        s = rng.normal(size=(1, 256))
        s *= 2 / np.linalg.norm(s)
        one, two = planted(rng, s, 20, 0.3), planted(rng, s, 30, 0.3)
        cosines.append(geometry.cosine(stats.direction(*one), stats.direction(*two))[0])
        ceilings.append(
            geometry.ceiling(stats.split_half(*one, seed=i), stats.split_half(*two, seed=i))[0]
        )
    assert np.mean(cosines) < 0.8 and np.mean(ceilings) == pytest.approx(np.mean(cosines), abs=0.02)


def test_splits_are_seeded_and_few_answers_say_nothing():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(9, 2, 8)), rng.normal(size=(7, 2, 8))
    assert (stats.split_half(a, b, seed=4) == stats.split_half(a, b, seed=4)).all()
    assert (stats.split_half(a, b, seed=4) != stats.split_half(a, b, seed=5)).any()
    assert (
        np.isnan(stats.split_half(a[:1], b, seed=0)).all()
        and np.isnan(stats.split_half(a, b[:0], seed=0)).all()
    )
    same = np.tile(rng.normal(size=(1, 2, 8)), (10, 1, 1))
    assert np.isnan(stats.split_half(same, same[:7], seed=0)).all(), (
        "no direction, not a cosine of rounding errors"
    )
    a[0, 1, 0] = np.nan
    found = stats.split_half(a, b, seed=0)
    assert np.isfinite(found[0]) and np.isnan(found[1])


def test_random_directions():
    rng = np.random.default_rng(5)
    for width in (3, 64, 576):
        x = rng.normal(size=(2, 20000, width))
        drawn = np.abs(geometry.cosine(x[0], x[1]))
        assert np.mean(drawn < stats.chance_cosine(width)) == pytest.approx(0.95, abs=0.006)
    assert stats.chance_cosine(4096) == pytest.approx(1.96 / 64, rel=0.01)


def test_every_pair_and_block():
    e = np.eye(4)
    vectors = {
        ("a", 0): e[:2],
        ("a", 1): e[[0, 2]],
        ("b", 0): np.array([[1.0, 1, 0, 0], [0, 0, 0, 0]]),
        ("c", 0): None,
    }
    halves = {("a", 0): [0.5, 0.5], ("a", 1): [0.8, -0.1], ("b", 0): [1.0, 0.9], ("c", 0): None}
    found = {(a.first, a.second, a.block): a for a in stats.compare(vectors, halves)}
    assert len(found) == 6 * 2
    ab = found["a", "b", 0]
    assert ab.cosine == pytest.approx(np.sqrt(0.5)) and ab.n_pairs == 2
    assert ab.ceiling == pytest.approx((np.sqrt(2 / 3) + np.sqrt(1.6 / 1.8)) / 2)
    assert ab.corrected == pytest.approx(ab.cosine / ab.ceiling) and (ab.lowest, ab.highest) == (
        ab.cosine,
        ab.cosine,
    )
    assert found["a", "a", 0].cosine == 1.0 and found["a", "a", 1].cosine == 0.0, (
        "one domain: between its seeds"
    )
    assert found["a", "a", 1].ceiling is None and "halves" in found["a", "a", 1].reason
    assert found["a", "b", 1].cosine is None and "no length" in found["a", "b", 1].reason
    assert found["a", "c", 0].cosine is None and "no direction" in found["a", "c", 0].reason
    alone = found["b", "b", 0]
    assert alone.cosine is None and alone.ceiling == 1.0 and "two seeds" in alone.reason
    assert stats.compare({}, {}) == [] and stats.compare({("a", 0): None}, {}) == []
    with pytest.raises(UsageError, match="one model"):
        stats.compare({("a", 0): e, ("b", 0): e[:2]}, {})
