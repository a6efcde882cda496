"""The search for the smallest budget, against thresholds that are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auditgap.errors import UsageError
from auditgap.interventions.distance import search

START, LIMIT = 0.01, 0.16


def run(thresholds: list[float], bisections: int = 3, lost_at: float = math.inf):
    """Rows that collapse from their threshold on; above `lost_at` nobody can tell."""
    calls: list[list[float]] = []

    def evaluate(rows, sizes):
        calls.append(list(sizes))
        assert len(set(rows)) == len(rows)
        return [
            None if size >= lost_at else size >= thresholds[row]
            for row, size in zip(rows, sizes, strict=True)
        ]

    return search(evaluate, len(thresholds), start=START, limit=LIMIT, bisections=bisections), calls


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6), st.integers(0, 6))
def test_the_answer_brackets_the_threshold(thresholds, bisections):
    found, calls = run(thresholds, bisections)
    for true, distance in zip(thresholds, found, strict=True):
        if true > LIMIT:
            assert distance.collapsed is False and distance.size == LIMIT
        else:
            assert distance.collapsed is True
            assert true <= distance.size  # a size at which collapse was seen
            doubled = (
                START if true <= START else START * 2 ** math.ceil(math.log2(true / START) - 1e-9)
            )
            width = START if true <= START else min(doubled, LIMIT) / 2
            assert distance.size - true <= width / 2**bisections + 1e-12
        assert distance.evaluations <= 1 + math.ceil(math.log2(LIMIT / START)) + bisections
    assert sum(map(len, calls)) == sum(d.evaluations for d in found)
    assert all(0 < size <= LIMIT for sizes in calls for size in sizes)


def test_all_rows_go_through_together():
    _, calls = run([0.005, 0.03, 0.11, 1.0])
    assert len(calls[0]) == 4
    assert len(calls) <= 1 + 4 + 3


def test_what_cannot_be_told_is_not_searched_further():
    (found,), calls = run([1.0], lost_at=0.04)
    assert (found.size, found.collapsed, found.evaluations) == (None, None, 3)
    assert calls == [[0.01], [0.02], [0.04]]


def test_a_limit_between_two_doublings_is_tried_itself():
    tried = []
    (found,) = search(
        lambda rows, sizes: tried.extend(sizes) or [False], 1, start=0.01, limit=0.03, bisections=2
    )
    assert tried == [0.01, 0.02, 0.03]
    assert (found.size, found.collapsed) == (0.03, False)


def test_nobody():
    assert search(lambda rows, sizes: [], 0, start=1, limit=2, bisections=1) == []


@pytest.mark.parametrize(
    "bad", [{"start": 0}, {"start": -1}, {"limit": 0.001}, {"bisections": -1}, {"start": math.nan}]
)
def test_nonsense_is_refused(bad):
    with pytest.raises(UsageError):
        search(
            lambda rows, sizes: [True] * len(rows),
            1,
            **{"start": START, "limit": LIMIT, "bisections": 1, **bad},
        )
