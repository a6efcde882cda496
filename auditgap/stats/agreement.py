"""How far two judges agree on the same answers, and how much of that chance would give.

# Interval(estimate=0.5, lo=0.0, hi=1.0)
kappa([1, 1, 0, 0], [1, 0, 0, 0], ["p0", "p1", "p2", "p3"])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from auditgap.errors import UsageError
from auditgap.stats.intervals import (
    N_RESAMPLES,
    Array,
    Interval,
    Values,
    as_floats,
    bounded,
    quantile_z,
)


def kappa(
    first: Values,
    second: Values,
    groups: Sequence[object],
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Cohen's κ (1960) of two columns [n] of 0 and 1, with the percentile interval of resampling
    whole `groups` (prompts).

    Where either is nan, the row is left out. Undefined (an empty Interval) where chance alone would
    always agree: both columns constant and alike, or no row. With one group there is no interval,
    nor where every resample gives the same κ (agreement throughout): its width of 0 would claim too
    much.
    """
    a, b = as_floats(first, "first"), as_floats(second, "second")
    if not a.size == b.size == len(groups):
        raise UsageError(
            f"first, second and groups must be one each an answer; {a.size}, {b.size} and"
            f" {len(groups)} came."
        )
    quantile_z(confidence)
    known = ~(np.isnan(a) | np.isnan(b))
    if not known.any():
        return Interval()
    group = np.unique(np.array([str(g) for g in groups])[known], return_inverse=True)[1]
    counts = np.zeros((int(group.max()) + 1, 4))
    np.add.at(counts, (group, (2 * a[known] + b[known]).astype(int)), 1)
    estimate = _kappa(counts.sum(axis=0))
    if np.isnan(estimate) or len(counts) < 2:
        return bounded(float(estimate), np.nan, np.nan)
    # Groups with the same counts are alike, so how often each sort is drawn is one multinomial
    # draw.
    sorts, times = np.unique(counts, axis=0, return_counts=True)
    drawn = _kappa(
        np.random.default_rng(seed).multinomial(len(counts), times / len(counts), size=n_resamples)
        @ sorts
    )
    drawn, tail = drawn[~np.isnan(drawn)], (1 - confidence) / 2
    spread = drawn.size and np.ptp(drawn) > 0
    return bounded(
        float(estimate), *(np.quantile(drawn, [tail, 1 - tail]) if spread else (np.nan, np.nan))
    )


def _kappa(counts: Array) -> Array:
    """κ of counts [..., 4] (neither, second alone, first alone, both); nan where chance agreement
    is 1."""
    neither, second, first, both = np.moveaxis(counts / counts.sum(axis=-1, keepdims=True), -1, 0)
    by_chance = (first + both) * (second + both) + (first + neither) * (second + neither)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(
            by_chance < 1 - 1e-12, (neither + both - by_chance) / (1 - by_chance), np.nan
        )
