"""Estimates with intervals: means, medians, paired differences, rates, rates behind an imperfect
judge.

    >>> wilson(4, 24)
    Interval(estimate=0.16666666666666666, lo=0.06678676328632954, hi=0.3585307064969906)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from auditgap.errors import UsageError, did_you_mean
from auditgap.stats.kept import normal_quantile, picks, t_quantile

Values = npt.ArrayLike
Array = npt.NDArray[np.float64]
N_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its confidence interval, in the unit of what was measured. None:
    undefined."""

    estimate: float | None = None
    lo: float | None = None
    hi: float | None = None

    @property
    def known(self) -> tuple[float, float, float] | None:
        """(estimate, lo, hi) where all three are defined."""
        return (
            None
            if self.estimate is None or self.lo is None or self.hi is None
            else (self.estimate, self.lo, self.hi)
        )


def bounded(
    estimate: float, lo: float, hi: float, low: float = -math.inf, high: float = math.inf
) -> Interval:
    """An Interval of Python floats, its ends clipped to [low, high] and to the estimate's side; not
    finite -> None."""
    if not math.isfinite(estimate):
        return Interval()
    return Interval(
        float(estimate),
        float(max(low, min(lo, estimate))) if math.isfinite(lo) else None,
        float(min(high, max(hi, estimate))) if math.isfinite(hi) else None,
    )


def as_floats(values: Values, name: str, ndim: int = 1) -> Array:
    """`values` as an fp64 array of `ndim` dimensions, None as nan; anything else is a UsageError
    that names it."""
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        came = type(values).__name__
        raise UsageError(
            f"{name} must be numbers, None or nan where unscored; this {came} is not."
        ) from None
    if array.ndim != ndim:
        raise UsageError(
            f"{name} must have {ndim} dimension(s); an array of shape {array.shape} came."
        )
    return array


def quantile_z(confidence: float) -> float:
    """The standard normal's two-sided quantile: 1.96 for a confidence of 0.95."""
    if not 0 < confidence < 1:
        raise UsageError(
            f"confidence must lie between 0 and 1; {confidence!r} came. For example: 0.95"
        )
    return normal_quantile((1 + confidence) / 2)


def bootstrap(
    values: Values,
    statistic: Literal["mean", "median"] = "mean",
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int | None = 0,
) -> Interval:
    """Mean or median of `values` [N] with a bootstrap interval (scipy.stats.bootstrap over the
    scored values).

    The mean's interval is the bootstrap-t (Efron & Tibshirani 1993, section 12.5), the median's the
    percentile one. A resample without spread (nothing but zeros, say) bounds nothing, so where many
    are like that the upper end is None rather than invented. Coverage as measured at 95 %:
    docs/simulations.md.

    A constant sample says nothing about its spread, and fewer than 2 scored values neither: lo and
    hi are None.
    """
    if statistic not in ("mean", "median"):
        hint = did_you_mean(str(statistic), ("mean", "median"))
        raise UsageError(f"statistic must be mean or median; {statistic!r} came.{hint}")
    x = _scored(values, "values")
    if statistic == "mean":
        return _bootstrap_t(x, confidence, n_resamples, seed)
    quantile_z(confidence)
    if x.size < 2 or np.ptp(x) == 0:
        return bounded(x[0] if x.size else np.nan, np.nan, np.nan)
    result = sps.bootstrap(
        (x,),
        np.median,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return bounded(float(np.median(x)), *result.confidence_interval)


def paired_difference(
    a: Values,
    b: Values,
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int | None = 0,
) -> Interval:
    """Mean of a − b over the prompts where both are scored, resampled by prompt. `a` and `b` are
    [N], prompt by prompt.

    The interval is the wider, at each end, of the bootstrap-t and Student's t. Measured, a − b of
    two draws from one zero-inflated distribution (50–90 % zeros, n = 24 to 100): the interval lies
    wholly above 0 in 1.1–2.8 % of runs and covers 0 in 94.8–97.2 %; the bootstrap-t alone lay above
    0 in up to 6.6 %, a false alarm the reader would pay for.
    """
    first, second = as_floats(a, "a"), as_floats(b, "b")
    if first.shape != second.shape:
        raise UsageError(
            f"a and b must hold one value a prompt each, paired; {first.size} and {second.size}"
            " came."
        )
    return _bootstrap_t(
        _scored(first - second, "a − b"), confidence, n_resamples, seed, is_difference=True
    )


def _scored(values: Values, name: str) -> Array:
    array = as_floats(values, name)
    return array[~np.isnan(array)]


def _bootstrap_t(
    x: Array, confidence: float, n_resamples: int, seed: int | None, is_difference: bool = False
) -> Interval:
    n = x.size
    quantile_z(confidence)
    if n < 2 or np.ptp(x) == 0:
        return bounded(x[0] if n else np.nan, np.nan, np.nan)
    mean, variance = x.mean(), x.var(ddof=1)
    drawn = x[picks(n, n_resamples, seed)]
    off, variances = drawn.mean(axis=1) - mean, drawn.var(axis=1, ddof=1)
    if is_difference:
        # each resample's variance counts the sample's own once more, or one of nothing but zeros
        # would send t to infinity
        variances = (n * variances + variance) / (n + 1)
    with np.errstate(divide="ignore"):
        t = off / np.sqrt(variances / n)
    # order statistics, not interpolated: half-way to infinity is infinity
    t = np.sort(t)
    at = math.floor((1 - confidence) / 2 * (n_resamples - 1))
    t_lo, t_hi = float(t[at]), float(t[n_resamples - 1 - at])
    if is_difference:
        student = t_quantile((1 + confidence) / 2, n - 1)
        t_lo, t_hi = min(t_lo, -student), max(t_hi, student)
    error = math.sqrt(variance / n)
    return bounded(mean, mean - t_hi * error, mean - t_lo * error)


# -----------------------------------------------------------------------------------------------------------
# rates


def wilson(
    k: float, n: float, *, confidence: float = 0.95, quantile: float | None = None
) -> Interval:
    """Rate k/n with Wilson's score interval (Wilson 1927); n = 0 gives None.

    `k` may be a fraction (a prompt counted by the mean of its draws), which scipy's binomtest does
    not take. `quantile` stands in for the normal one of `confidence`: Student's, where the size
    that n stands for is itself estimated from few groups.
    """
    z = quantile_z(confidence) if quantile is None else quantile
    if not (0 <= k <= n):
        raise UsageError(f"A rate k/n needs 0 ≤ k ≤ n; k = {k!r}, n = {n!r} came.")
    if n == 0:
        return Interval()
    p, centre = k / n, (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(n * p * (1 - p) + z * z / 4) / (n + z * z)
    return bounded(p, centre - half, centre + half, 0.0, 1.0)


def effective_size(hits: Values, groups: Sequence[object]) -> float:
    """How many independent examples would tell as much about the rate of `hits` [n, 0 or 1] as
    these do, at most n.

    Examples of one group (answers to one prompt) are alike, so they count for less: n over Kish's
    design effect (1965), the variance of the rate between groups over the variance of a simple
    sample. n itself where every example is its own group; the number of groups where all agree or
    there is one group, as nothing then says how alike they are. Wilson's interval of that size
    covers, measured at 95 %: 94.8–95.3 with 40 to 150 groups (84–91 if alikeness is ignored),
    91.6–94.0 with 14 groups of 13 (54–72).
    """
    x = as_floats(hits, "hits")
    if len(groups) != x.size:
        raise UsageError(
            f"hits and groups must be one each an example; {x.size} and {len(groups)} came."
        )
    if x.size < 2:
        return float(x.size)
    group = np.unique(np.array([str(g) for g in groups]), return_inverse=True)[1]
    k, mean = int(group.max()) + 1, float(x.mean())
    simple = mean * (1 - mean) / (x.size - 1)
    if k < 2 or simple == 0:
        return float(k)
    pulls = np.bincount(group, weights=x - mean, minlength=k) / x.size
    return float(x.size / max(1.0, k / (k - 1) * float((pulls**2).sum()) / simple))


def resampled(
    statistic: Callable[[npt.NDArray[np.int64]], float | None],
    groups: Sequence[object] | np.ndarray,
    *,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """`statistic` of the examples' indices, with the percentile interval of resampling whole groups
    (answers of one prompt).

    A statistic that is None or nan (one class only) gives an empty Interval; resamples for which it
    is are left out. With one group there is no interval. Coverage as measured at 95 %, Cohen's κ of
    0.4 and 0.8 on 100 and 400 examples, two alike answers a prompt: 93–95 %.
    """
    tail = (1 - confidence) / 2
    quantile_z(confidence)
    group = (
        np.unique(np.array([str(g) for g in groups]), return_inverse=True)[1]
        if len(groups)
        else np.empty(0, dtype=int)
    )
    estimate = statistic(np.arange(len(groups)))
    if estimate is None or not math.isfinite(estimate):
        return Interval()
    k = int(group.max()) + 1
    if k < 2:
        return bounded(estimate, np.nan, np.nan)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group))[:-1])
    rng = np.random.default_rng(seed)
    drawn = (
        statistic(np.concatenate([members[g] for g in rng.integers(0, k, k)]))
        for _ in range(n_resamples)
    )
    known = [v for v in drawn if v is not None and math.isfinite(v)]
    return bounded(estimate, *(np.quantile(known, [tail, 1 - tail]) if known else (np.nan, np.nan)))


def informedness(
    sens_k: float, sens_n: float, spec_k: float, spec_n: float, *, confidence: float = 0.95
) -> Interval:
    """Youden's J = sensitivity + specificity − 1 of a judge: 0 for one that guesses, 1 for one that
    does not err.

    The interval squares and adds the two Wilson intervals (Newcombe 1998, method 10). None when a
    class has no example.
    """
    sens, spec = (
        wilson(sens_k, sens_n, confidence=confidence).known,
        wilson(spec_k, spec_n, confidence=confidence).known,
    )
    if sens is None or spec is None:
        return Interval()
    (se, se_lo, se_hi), (sp, sp_lo, sp_hi) = sens, spec
    j, below, above = (
        se + sp - 1,
        math.hypot(se - se_lo, sp - sp_lo),
        math.hypot(se_hi - se, sp_hi - sp),
    )
    return bounded(j, j - below, j + above, -1.0, 1.0)


def rogan_gladen(
    k: float,
    n: float,
    sens_k: float,
    sens_n: float,
    spec_k: float,
    spec_n: float,
    *,
    n_sure: float = 0.0,
    confidence: float = 0.95,
) -> Interval:
    """The true rate behind a judge's k of n, given how the judge did on a gold set; clipped to [0,
    1].

    `sens_k` of `sens_n` truly harmful and `spec_k` of `spec_n` truly harmless examples were judged
    rightly. `n_sure` of the n are known to be harmless without the judge (text that the coherence
    gate calls broken), so it cannot err on them. Estimate: (p + Sp − 1) / (Se + Sp − 1) (Rogan &
    Gladen 1978). Interval: Lang & Reiczigel 2014 (Prev. Vet. Med. 113:13–22), which carries the
    uncertainty of all three counts; coverage as measured at 95 %: 94.8–98.4 for n = 24 to 200 and
    gold sets of 40 to 400. The rate among the judged is then scaled by their share, whose own error
    is added in squares. None when a count is empty; when the gold set does not show that the judge
    is better than chance (the interval of `informedness` reaches 0): such a judge says nothing
    about the rate; and when the whole interval lies outside [0, 1], as where fewer are called
    harmful than the judge's errors alone should make: it errs otherwise here than on its gold set.
    """
    z = quantile_z(confidence)
    if not 0 <= n_sure <= n or k > n - n_sure:
        raise UsageError(
            f"Of n, n_sure are not judged and k of the rest are harmful; k = {k!r}, n = {n!r},"
            f" {n_sure!r} came."
        )
    j = informedness(sens_k, sens_n, spec_k, spec_n, confidence=confidence)
    judged = n - n_sure
    if n == 0 or j.lo is None or j.lo <= 0:
        return Interval()
    if judged == 0:
        return wilson(0, n, confidence=confidence)
    se, sp = sens_k / sens_n, spec_k / spec_n
    estimate = min(1.0, max(0.0, (k / judged + sp - 1) / (se + sp - 1)))
    p, s, c = (
        (k + z * z / 2) / (judged + z * z),
        (sens_k + 1) / (sens_n + 2),
        (spec_k + 1) / (spec_n + 2),
    )
    true = (p + c - 1) / (s + c - 1)
    var_p, var_s, var_c = (
        p * (1 - p) / (judged + z * z),
        s * (1 - s) / (sens_n + 2),
        c * (1 - c) / (spec_n + 2),
    )
    centre = true + 2 * z * z * (true * var_s - (1 - true) * var_c)
    half = z * math.sqrt(var_p + true**2 * var_s + (1 - true) ** 2 * var_c) / (s + c - 1)
    if centre + half <= 0 or centre - half >= 1:
        return Interval()
    lo, hi = (min(1.0, max(0.0, end)) for end in (centre - half, centre + half))
    lo, hi = min(lo, estimate), max(hi, estimate)
    share = judged / n
    wobble = z * estimate * math.sqrt(share * (1 - share) / n)
    rate = share * estimate
    return bounded(
        rate,
        rate - math.hypot(share * (estimate - lo), wobble),
        rate + math.hypot(share * (hi - estimate), wobble),
        0.0,
        1.0,
    )
