"""The minimum distance to collapse, where text that breaks is another way to end.

    >>> found = incidence([0.01, 0.02, 0.02, 0.04], ["flipped", "broken", "flipped", "withstood"])
    >>> found.flipped.tolist(), found.median.estimate
    ([0.25, 0.5, 0.5], 0.02)

A search over sizes ends at the smallest that flipped the prompt, at the size from which on every
text was broken, or withstood at the largest that was tried. Broken is no censoring: a text that
fell apart cannot turn harmful at a larger size, so Kaplan–Meier would promise flips that cannot
come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from auditgap.errors import UsageError
from auditgap.stats.intervals import Array, Interval, Values, as_floats, quantile_z
from auditgap.stats.resampling import exact_ends

#: How a search over sizes can end; anything else (None) is unscored.
FLIPPED, BROKEN, WITHSTOOD = "flipped", "broken", "withstood"
ENDINGS = (FLIPPED, BROKEN, WITHSTOOD)


@dataclass(frozen=True, slots=True, eq=False)
class Incidence:
    """Share of the prompts at risk that flipped, or broke, by each distance: `distances`,
    `flipped`, `broken`, `lo`, `hi` are [K]; `lo` and `hi` are the ends of `flipped`."""

    distances: Array
    flipped: Array
    broken: Array
    lo: Array
    hi: Array
    median: Interval  #: None: not reached within the sizes tried
    n: int
    n_flipped: int
    n_broken: int
    n_unscored: int


def incidence(
    distances: Values, endings: Sequence[str | None], *, confidence: float = 0.95
) -> Incidence:
    """Aalen–Johansen estimate (1978) of the share flipped by each distance.

    `distances` [N] > 0 and `endings` [N] are those of the prompts at risk alone; an ending that is
    None, or a distance that is nan, is unscored, left out and counted. The interval is
    Clopper–Pearson's at the effective n = F(1 − F) / Var(F), at most the n that were not censored
    before. The median is the first distance where F reaches ½, its ends those where the upper and
    the lower end do. Coverage as measured at 95 %: docs/simulations.md.
    """
    quantile_z(confidence)
    size = as_floats(distances, "distances")
    if size.size != len(endings):
        raise UsageError(
            f"distances and endings must be one each a prompt; {size.size} and {len(endings)} came."
        )
    known = np.array([ending is not None for ending in endings], dtype=bool) & ~np.isnan(size)
    ending = np.array([str(e) for e, is_known in zip(endings, known, strict=True) if is_known])
    size, n_unscored = size[known], int((~known).sum())
    wrong = sorted(set(ending.tolist()) - set(ENDINGS))
    if wrong:
        raise UsageError(f"An ending is one of {', '.join(ENDINGS)}; {wrong[0]!r} came.")
    if (size <= 0).any() or np.isinf(size).any():
        raise UsageError(
            "distances must be finite and above 0: a prompt that is harmful with no edit is not at"
            " risk and is counted beside."
        )
    at, flips, breaks, censored = _counts(size, ending)
    share, broken, variance = _aalen_johansen(size.size, flips, breaks, censored)
    most = size.size - np.concatenate([[0], np.cumsum(censored)[:-1]]) if at.size else at
    lo, hi = _ends(share, variance, most, (1 - confidence) / 2)

    def first(values: Array) -> float | None:
        reached = np.flatnonzero(values >= 0.5 - 1e-12)
        return float(at[reached[0]]) if reached.size else None

    middle = first(share)
    return Incidence(
        distances=at,
        flipped=share,
        broken=broken,
        lo=lo,
        hi=hi,
        # not reached: that half flip at a larger size is open, that fewer flip before `lo` is known
        median=Interval(middle, first(hi), first(lo)),
        n=int(size.size),
        n_flipped=int(flips.sum()),
        n_broken=int(breaks.sum()),
        n_unscored=n_unscored,
    )


def _counts(size: Array, ending: np.ndarray) -> tuple[Array, Array, Array, Array]:
    """Distinct sizes [K] and how many ended there flipped, broken and withstood."""
    at, which = np.unique(size, return_inverse=True)
    flips, breaks, censored = (
        np.bincount(which[ending == kind], minlength=at.size).astype(float) for kind in ENDINGS
    )
    return at, flips, breaks, censored


def _aalen_johansen(
    n: int, flips: Array, breaks: Array, censored: Array
) -> tuple[Array, Array, Array]:
    """Shares flipped and broken [K] and the variance of the former (Marubini & Valsecchi 1995,
    eq. 10.12)."""
    ended = flips + breaks
    left = n - np.concatenate([[0.0], np.cumsum(ended + censored)[:-1]]) if n else flips
    before = np.concatenate([[1.0], np.cumprod(1 - ended / np.maximum(left, 1))])[: flips.size]
    share, broken = np.cumsum(before * flips / left), np.cumsum(before * breaks / left)
    variance = np.zeros_like(share)
    for k in range(flips.size):
        rest, d, m, s = share[k] - share[: k + 1], ended[: k + 1], left[: k + 1], before[: k + 1]
        f = flips[: k + 1]
        variance[k] = (
            (rest**2 * d / (m * np.maximum(m - d, 1))).sum()
            + (s**2 * f * (m - f) / m**3).sum()
            - 2 * (rest * s * f / m**2).sum()
        )
    return share, broken, np.maximum(variance, 0.0)


def _ends(share: Array, variance: Array, most: Array, tail: float) -> tuple[Array, Array]:
    ends = []
    for p, spread, n in zip(share, variance, most, strict=True):
        size = min(p * (1 - p) / spread, n) if spread > 0 and 0 < p < 1 else float(n)
        ends.append([float(end) for end in exact_ends(p * size, size, tail)])
    lo, hi = np.array(ends).reshape(-1, 2).T
    return np.maximum.accumulate(lo), np.maximum.accumulate(hi)
