"""Intervals over fine-tuning runs as well as prompts: every seed is asked the same prompts.

    # a mean from each prompt's mean over seeds, and each seed's mean over prompts
    seeded_mean([80, 60, 75], [70, 74, 71]).difference
    seeded_rate(hits, prompts, seeds)

Seeds are few, so a resample of them varies too little and a normal quantile is too short. The two
variances, between prompts and between seeds, are estimated apart and added, which counts what they
share twice and errs on the side of caution; the quantile is Student's with Satterthwaite's degrees
of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from auditgap.stats.curves import FEWEST_SEEDS
from auditgap.stats.intervals import (
    Array,
    Interval,
    Values,
    as_floats,
    bounded,
    effective_size,
    quantile_z,
    wilson,
)
from auditgap.stats.paired import Paired


def added(*parts: tuple[npt.ArrayLike, npt.ArrayLike]) -> tuple[Array, Array]:
    """The sum of independent variances, each with its degrees of freedom, and the degrees of
    freedom of the sum (Satterthwaite 1946, Biometrics Bulletin 2:110); infinite where it is 0."""
    variances = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v, _ in parts))
    total = np.sum(variances, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = sum(v**2 / np.asarray(df) for v, (_, df) in zip(variances, parts, strict=True))
        return total, np.where(total > 0, total**2 / spread, np.inf)


def mean_variance(values: Array) -> tuple[float, int]:
    """Variance of the mean of `values` and its degrees of freedom."""
    return float(values.var(ddof=1)) / values.size, values.size - 1


def seeded_mean(
    by_prompt: Values, by_seed: Values, *more: Values, confidence: float = 0.95
) -> Paired:
    """The mean of `by_prompt` [P], each prompt's value over seeds, with an interval over prompts
    and seeds; `by_seed` [S] has each seed's value over prompts. p: that the mean is 0.

    For a difference of two domains, which share prompts but no seed, `by_seed` and one of `more`
    are each domain's. No ends and no p with fewer than 3 seeds or 2 prompts, or where nothing
    varies.
    """
    quantile_z(confidence)
    prompts = as_floats(by_prompt, "by_prompt")
    seeds = [as_floats(values, "by_seed") for values in (by_seed, *more)]
    n = prompts.size
    mean = float(prompts.mean()) if n else math.nan
    none = Paired(bounded(mean, math.nan, math.nan), None, n)
    if n < 2 or min(own.size for own in seeds) < FEWEST_SEEDS:
        return none
    parts = [mean_variance(values) for values in (prompts, *seeds)]
    variance, df = (float(x) for x in added(*parts))
    if variance <= 0:
        return none
    error = math.sqrt(variance)
    reach = float(sps.t.isf((1 - confidence) / 2, df)) * error
    p = 2 * float(sps.t.sf(abs(mean) / error, df))
    return Paired(
        bounded(mean, mean - reach, mean + reach), p, n, "Student’s t, by prompt and seed"
    )


def seeded_rate(
    hits: Values, prompts: Sequence[object], seeds: Sequence[object], *, confidence: float = 0.95
) -> Interval:
    """The rate of `hits` [n, 0 or 1] with an interval over prompts and seeds: Wilson's, of the size
    that both variances leave, with Student's quantile.

    With fewer than 3 seeds over prompts alone, as where all hits agree: seeds that never differ are
    not taken to differ more than prompts do.
    """
    x = as_floats(hits, "hits")
    if not x.size:
        return Interval()
    size, mean = effective_size(x, prompts), float(x.mean())
    alone = wilson(min(mean * size, size), size, confidence=confidence)
    if len(set(seeds)) < FEWEST_SEEDS or len(set(prompts)) < 2 or mean in (0.0, 1.0):
        return alone
    variance, df = (float(v) for v in added(_between(x, prompts), _between(x, seeds)))
    size = mean * (1 - mean) / max(variance, mean * (1 - mean) / (x.size - 1))
    quantile = float(sps.t.isf((1 - confidence) / 2, df))
    return wilson(min(mean * size, size), size, confidence=confidence, quantile=quantile)


def _between(x: Array, groups: Sequence[object]) -> tuple[float, int]:
    """Variance of the mean of `x` between groups, and its degrees of freedom."""
    group = np.unique(np.array([str(g) for g in groups]), return_inverse=True)[1]
    k = int(group.max()) + 1
    pulls = np.bincount(group, weights=x - x.mean(), minlength=k) / x.size
    return k / (k - 1) * float((pulls**2).sum()), k - 1
