"""Vendi score and 1 − mean cosine: known values, and what cannot be told."""

from __future__ import annotations

import numpy as np
import pytest

from auditgap.stats import one_minus_cosine, vendi
from auditgap.stats.diversity import why_not


def test_vendi_counts_different_rows():
    eye = np.eye(8)
    assert vendi(eye) == pytest.approx(8) and vendi(np.repeat(eye[:3], 5, axis=0)) == pytest.approx(
        3
    )
    assert vendi(np.ones((6, 4)) * np.arange(1, 7)[:, None]) == pytest.approx(1), (
        "lengths do not count"
    )
    assert vendi([[1, 0], [0, 1], [1, 0], [0, 1]]) == pytest.approx(2)


def test_vendi_of_unequal_shares_is_their_perplexity():
    rows = np.repeat(np.eye(3), [5, 3, 2], axis=0)
    share = np.array([0.5, 0.3, 0.2])
    assert vendi(rows) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_orders_are_hills_numbers_of_the_shares():
    rows, share = np.repeat(np.eye(3), [5, 3, 2], axis=0), np.array([0.5, 0.3, 0.2])
    assert vendi(rows, 2.0) == pytest.approx(1 / (share**2).sum())
    assert vendi(rows, 0.5) == pytest.approx((share**0.5).sum() ** 2)
    assert vendi(rows, 0.5) > vendi(rows) > vendi(rows, 2.0)
    assert all(vendi(np.eye(4), q) == pytest.approx(4) for q in (0.5, 1.0, 2.0))


def test_either_side_of_the_square_gives_the_same():
    x = np.random.default_rng(0).normal(size=(40, 12))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    e = np.linalg.eigvalsh(u @ u.T / 40)
    e = e[e > 1e-12]
    assert vendi(x) == pytest.approx(np.exp(-(e * np.log(e)).sum()))
    assert (
        vendi(x[:7]) == pytest.approx(vendi(np.pad(x[:7], ((0, 0), (0, 99))))) and vendi(x[:7]) <= 7
    )


def test_one_minus_cosine_by_hand():
    assert one_minus_cosine(np.eye(5)) == pytest.approx(1) and one_minus_cosine(
        np.ones((4, 3))
    ) == pytest.approx(0)
    assert one_minus_cosine([[1, 0], [1, 1], [0, 1]]) == pytest.approx(
        1 - (2 * np.sqrt(0.5) + 0) / 3
    )
    x = np.random.default_rng(1).normal(size=(30, 6))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert one_minus_cosine(x) == pytest.approx(1 - (u @ u.T)[np.triu_indices(30, 1)].mean())


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((0, 3)), "0 rows; diversity needs 2"),
        (np.ones((1, 3)), "1 row; diversity needs 2"),
        ([[1, 2], [0, 0]], "1 rows have a vector of zeros"),
        ([[1, 2], [np.nan, 0]], "not finite"),
    ],
)
def test_what_cannot_be_told_says_why(x, said):
    assert said in why_not(x) and vendi(x) is None and one_minus_cosine(x) is None


def test_size_of_vectors_does_not_overflow():
    assert vendi(np.eye(4) * 1e200) == pytest.approx(4) and one_minus_cosine(
        np.eye(4) * 1e-200
    ) == pytest.approx(1)
