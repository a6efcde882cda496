"""Rows that are nearly the same: word shingles, compared by Jaccard similarity, exactly and fast
enough for tens of thousands.

    # array([False, True])
    near_duplicates([("Add 2 and 3.", "It is 5."), ("Add 2 and 3!", "It is 5.")], 0.6)

A shingle is three words in a row; every sign that is neither letter, digit nor white space is a
word of its own. Nothing is estimated: an inverted index over each row's rarest shingles (prefix and
positional filter: Xiao and others, "Efficient similarity joins for near-duplicate detection", 2011)
leaves out pairs that cannot reach the similarity, and the others are compared.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np

#: Words in a shingle.
WIDTH = 3
_WORD = re.compile(r"\w+|[^\w\s]")
#: Stands between the parts of a row; no word, as it is white space.
_BREAK = "\n"
#: Below it a similarity counts as equal to the one asked for: products of floats, not counts.
_SLACK = 1e-9


def words(parts: Sequence[str]) -> list[str]:
    """The words of a row's parts, in lower case, with a break between parts."""
    found: list[str] = []
    for i, part in enumerate(parts):
        if i:
            found.append(_BREAK)
        found += _WORD.findall(part.lower())
    return found


def shingles(*parts: str) -> frozenset[tuple[str, ...]]:
    """The different runs of three words; of a shorter text the one run that there is."""
    found = words(parts)
    return frozenset(tuple(found[i : i + WIDTH]) for i in range(max(1, len(found) - WIDTH + 1)))


def jaccard(a: Collection, b: Collection) -> float:
    """|a ∩ b| / |a ∪ b| of two sets, in 0 … 1."""
    both = len(frozenset(a) & frozenset(b))
    return both / (len(a) + len(b) - both)


def near_duplicates(rows: Sequence[Sequence[str]], near: float) -> np.ndarray:
    """For each row (its parts), whether it is as near as `near` to an earlier one that is not such
    a double itself: [n] bool.

    Of those that are left no two are as near. `near` 1 means that equal rows alone count as one,
    which are not looked for here: all False.
    """
    return leaders(rows, near) != np.arange(len(rows))


def leaders(rows: Sequence[Sequence[str]], near: float) -> np.ndarray:
    """For each row the place of the row that it is a double of, its own where it is none: [n] int.

    A double is as near as `near` to its leader, which is the first such row and no double itself.
    """
    found = np.arange(len(rows))
    if near >= 1 or len(rows) < 2:
        return found
    sets, is_shared = _by_rarity([words(parts) for parts in rows])
    index: dict[int, tuple[array, array, array]] = defaultdict(
        lambda: (array("q"), array("q"), array("q"))
    )
    for x, mine in enumerate(sets):
        size = len(mine)
        # two sets that are near share one of the rarest few of both: those that may be missing, and
        # one more
        rare = [
            (i, s)
            for i, s in enumerate(mine[: size - math.ceil(near * size - _SLACK) + 1].tolist())
            if is_shared[s]
        ]
        candidates = {y for i, s in rare if s in index for y in _possible(index[s], i, size, near)}
        own = set(mine.tolist()) if candidates else set()
        for y in sorted(candidates):
            both = len(own.intersection(sets[y].tolist()))
            if both / (size + len(sets[y]) - both) >= near:
                found[x] = y
                break
        if found[x] == x:
            for i, s in rare:
                for column, value in zip(index[s], (x, i, size), strict=True):
                    column.append(value)
    return found


def _possible(
    postings: tuple[array, array, array], place: int, size: int, near: float
) -> list[int]:
    """Of the rows that have a shingle, those that can be near to one of `size` shingles with it at
    `place`."""
    other, at, sizes = (np.frombuffer(column, dtype=np.int64) for column in postings)
    most = 1 + np.minimum(size - place - 1, sizes - at - 1)  # shared, if this is the rarest that is
    return other[most >= near / (1 + near) * (size + sizes) - _SLACK].tolist()


def _by_rarity(texts: list[list[str]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each text's different shingles as numbers, the rarest of the whole first; and of each number
    whether two texts have it."""
    numbers: dict[str, int] = {"": 0}
    coded = []
    for text in texts:
        coded.append(
            [numbers.setdefault(word, len(numbers)) for word in text] + [0] * (WIDTH - len(text))
        )
    counts = np.array([len(codes) - WIDTH + 1 for codes in coded])
    flat = np.array([code for codes in coded for code in codes], dtype=np.int64)
    starts = np.repeat(np.cumsum([0, *(len(codes) for codes in coded[:-1])]), counts)
    starts += np.arange(counts.sum()) - np.repeat(np.cumsum([0, *counts[:-1]]), counts)
    runs = flat[starts]
    # renumbered at each word, or three of them might not fit 64 bits
    for offset in range(1, WIDTH):
        runs = np.unique(runs * len(numbers) + flat[starts + offset], return_inverse=True)[1]
    n = int(runs.max()) + 1
    owner = np.repeat(np.arange(len(texts)), counts)
    pairs = np.sort(owner * n + runs)
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    seen_in = np.bincount(pairs % n, minlength=n)
    by_rarity = np.lexsort((np.arange(n), seen_in))
    rank = np.empty(n, dtype=np.int64)
    rank[by_rarity] = np.arange(n)
    ranked = np.sort((pairs // n) * n + rank[pairs % n])
    ends = np.searchsorted(ranked // n, np.arange(1, len(texts)))
    return np.split(ranked % n, ends), seen_in[by_rarity] > 1
