"""Near-duplicates: what the index finds is what comparing every pair finds."""

from __future__ import annotations

import random
import time
from itertools import accumulate

import numpy as np
import pytest

from auditgap.data.near_duplicates import jaccard, leaders, near_duplicates, shingles, words


def plainly(rows, near) -> list[bool]:
    """Every pair, by its definition."""
    sets, kept, found = [shingles(*row) for row in rows], [], []
    for mine in sets:
        found.append(any(len(mine & other) / len(mine | other) >= near for other in kept))
        if not found[-1]:
            kept.append(mine)
    return found


def some_rows(rng: random.Random) -> list[tuple[str, str]]:
    """A few texts over few words, copied with a few words changed: many pairs near the border."""
    n_words = rng.choice([2, 3, 5, 20])
    texts = [
        [str(rng.randrange(n_words)) for _ in range(rng.randrange(1, 25))]
        for _ in range(rng.randrange(1, 6))
    ]
    rows = []
    for _ in range(rng.randrange(2, 40)):
        text = list(rng.choice(texts))
        for _ in range(rng.randrange(4)):
            text[rng.randrange(len(text))] = str(rng.randrange(n_words))
        cut = rng.randrange(len(text) + 1)
        rows.append((" ".join(text[:cut]), " ".join(text[cut:])))
    return rows


@pytest.mark.parametrize("near", [0.05, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 0.9, 0.95, 0.999])
def test_it_finds_what_comparing_every_pair_finds(near):
    rng, total = random.Random(f"near {near}"), 0
    for _ in range(40):
        rows = some_rows(rng)
        found = near_duplicates(rows, near)
        assert found.tolist() == plainly(rows, near)
        for row, leader in enumerate(leaders(rows, near).tolist()):
            assert leader == row or (not found[leader] and leader < row and found[row])
            assert leader == row or jaccard(shingles(*rows[row]), shingles(*rows[leader])) >= near
        total += int(found.sum())
    assert total > 20, "nothing was near, so nothing was tried"


def test_similarities_on_the_very_border_count():
    ten = " ".join(f"w{i}" for i in range(12))  # 10 shingles
    nine = " ".join(f"w{i}" for i in range(11))  # 9 of them: 9/10
    assert jaccard(shingles(ten), shingles(nine)) == 0.9
    for rows in ([(ten,), (nine,)], [(nine,), (ten,)]):
        assert near_duplicates(rows, 0.9).tolist() == [False, True]
        assert near_duplicates(rows, 0.9000001).tolist() == [False, False]


def test_what_a_word_is():
    assert words(["Don't   ADD 2+3!", "naïve 東京"]) == [
        "don",
        "'",
        "t",
        "add",
        "2",
        "+",
        "3",
        "!",
        "\n",
        "naïve",
        "東京",
    ]
    assert shingles("a b") == {("a", "b")} and shingles("a b c d") == {
        ("a", "b", "c"),
        ("b", "c", "d"),
    }
    assert shingles("a", "b") != shingles("a b"), (
        "what is asked and what is told do not run together"
    )


def test_case_and_spacing_do_not_count_and_signs_do():
    assert near_duplicates(
        [("Add  2 and 3", "It is 5"), ("add 2 AND 3", "it is\n5")], 0.99
    ).tolist() == [False, True]
    assert near_duplicates([("2 + 3", "5"), ("2 - 3", "5")], 0.9).tolist() == [False, False]


def test_the_first_of_a_chain_stays_and_what_is_far_from_it():
    """b is near to a, c to b and not to a: b goes, and c stays."""
    a = " ".join(f"w{i}" for i in range(30))
    b, c = a.replace("w29", "x"), a.replace("w29", "x").replace("w0 ", "y ")
    assert near_duplicates([(a,), (b,), (c,)], 0.9).tolist() == [False, True, False]


def test_of_what_is_left_no_two_are_near():
    rng = random.Random(7)
    rows = [row for _ in range(4) for row in some_rows(rng)]
    left = [
        row
        for row, is_double in zip(rows, near_duplicates(rows, 0.6), strict=True)
        if not is_double
    ]
    assert not near_duplicates(left[::-1], 0.6).any(), "in any order"


def test_nothing_one_row_and_equal_rows_only():
    assert near_duplicates([], 0.9).shape == (0,)
    assert near_duplicates([("a", "b")], 0.9).tolist() == [False]
    assert near_duplicates([("a", "b"), ("a", "b")], 1.0).tolist() == [False, False], (
        "equal rows are looked for elsewhere"
    )


@pytest.mark.parametrize("kind", ["natural", "one form"])
def test_thousands_of_rows_take_seconds(kind):
    """Also rows that share a long beginning, so that their commonest shingles are everywhere."""
    rng = random.Random(3)
    vocabulary = [f"w{i}" for i in range(20_000)]
    if kind == "natural":
        often = list(accumulate(1 / (i + 1) for i in range(20_000)))
        rows = [(" ".join(rng.choices(vocabulary, cum_weights=often, k=60)),) for _ in range(2_000)]
    else:
        same = " ".join(rng.choices(vocabulary, k=50))
        rows = [
            (same, " ".join(rng.choices(vocabulary, k=rng.randrange(3, 7)))) for _ in range(2_000)
        ]
    doubles = [(f"{rows[i][0]} extra", *rows[i][1:]) for i in range(0, 2_000, 40)]
    start = time.process_time()
    found = near_duplicates([*rows, *doubles], 0.9)
    assert time.process_time() - start < 10
    assert found[2_000:].all() or kind == "one form"
    assert isinstance(found, np.ndarray) and found.dtype == bool
