"""Minimum distance to collapse: the smallest budget at which a prompt's completion turns harmful,
by doubling, then bisection.

    search(evaluate, n=200, start=0.01, limit=0.64, bisections=3)

`evaluate(rows, sizes)` attacks row i with a budget of sizes[i] and says whether it collapsed (None:
could not tell); all rows go through it together, each at its own size. A row that never collapses
is right-censored at the largest size tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from auditgap.errors import UsageError

Evaluate = Callable[[Sequence[int], Sequence[float]], Sequence[bool | None]]


@dataclass(frozen=True)
class Distance:
    """`size` is where it collapsed; or, not collapsed, the largest size it withstood; or None when
    it could not be told."""

    size: float | None
    collapsed: bool | None
    evaluations: int


def search(
    evaluate: Evaluate, n: int, *, start: float, limit: float, bisections: int
) -> list[Distance]:
    """Distances of n rows. The bracket [withstood, collapsed] halves `bisections` times once
    doubling has found it.

    A collapse is reported at the bracket's upper end, so that it is a size at which collapse was
    seen. Raises UsageError unless 0 < start ≤ limit and bisections ≥ 0.
    """
    if not 0 < start <= limit or bisections < 0:
        raise UsageError(
            f"The search needs 0 < start ≤ limit and bisections ≥ 0; {start}, {limit}, {bisections}"
            " came."
        )
    withstood, collapsed = [0.0] * n, [float("inf")] * n
    tries, left, lost = [0] * n, [bisections] * n, [False] * n

    def next_size(i: int) -> float | None:
        if lost[i]:
            return None
        if collapsed[i] == float("inf"):
            size = min(limit, max(start, 2 * withstood[i]))
            return size if size > withstood[i] else None
        return (withstood[i] + collapsed[i]) / 2 if left[i] else None

    while tried := {i: size for i in range(n) if (size := next_size(i)) is not None}:
        for (i, size), fell in zip(
            tried.items(), evaluate(list(tried), list(tried.values())), strict=True
        ):
            tries[i] += 1
            left[i] -= collapsed[i] != float("inf")
            if fell is None:
                lost[i] = True
            elif fell:
                collapsed[i] = size
            else:
                withstood[i] = size
    return [
        (
            Distance(None, None, tries[i])
            if lost[i]
            else (
                Distance(collapsed[i], True, tries[i])
                if collapsed[i] < float("inf")
                else Distance(withstood[i], False, tries[i])
            )
        )
        for i in range(n)
    ]
