"""Two models on the same prompts: the difference of their means, shares or audit gaps, its
interval, its p-value; and Holm's.

    >>> paired_shares([1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]).p
    0.03125
    >>> holm([0.01, 0.04, 0.03, None])
    [0.03, 0.06, 0.06, None]

Prompts that either model lacks a score for are left out, and `n` says how many pairs were left.
p-values are two-sided, of the hypothesis that the models do not differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats as sps

from auditgap.errors import UsageError
from auditgap.stats.intervals import Array, Interval, Values, as_floats, bounded, quantile_z, wilson
from auditgap.stats.kept import picks, t_quantile

#: Resamples behind a p-value: the smallest that they can tell is 2 / (RESAMPLES + 1), which Holm
#: multiplies.
RESAMPLES, LARGE = 9999, 1000


@dataclass(frozen=True, slots=True)
class Paired:
    """First − second over `n` pairs. `p` is None where nothing can be tested; `test` names what was
    done."""

    difference: Interval = field(default_factory=Interval)
    p: float | None = None
    n: int = 0
    test: str = ""


def _both(first: Values, second: Values) -> tuple[Array, Array]:
    a, b = as_floats(first, "first"), as_floats(second, "second")
    if a.shape != b.shape:
        raise UsageError(
            f"first and second must hold one value a prompt each, paired; {a.size} and {b.size}"
            " came."
        )
    keep = ~(np.isnan(a) | np.isnan(b))
    return a[keep], b[keep]


def paired_means(
    first: Values, second: Values, *, confidence: float = 0.95, seed: int | None = 0
) -> Paired:
    """Mean of first − second [N], resampled by prompt.

    Interval and p-value are the more cautious of the bootstrap-t's and Student's, as in
    `intervals.paired_difference`, and both come from the same resamples, so that they agree. Where
    all pairs differ alike there is nothing to resample: the interval has no ends, and p is the sign
    test's (1 when no pair differs). False alarms as measured at 5 %, two draws of one zero-inflated
    distribution (60 % zeros), 1,000 runs each: 3.9 % at n = 12, 5.5 at 24, 5.1 at 50.
    """
    quantile_z(confidence)
    a, b = _both(first, second)
    d, n = a - b, a.size
    if n < 2:
        return Paired(bounded(d[0] if n else math.nan, math.nan, math.nan), None, n)
    mean, variance = float(d.mean()), float(d.var(ddof=1))
    if np.ptp(d) == 0:
        return Paired(
            bounded(mean, math.nan, math.nan),
            min(1.0, 2 * 0.5**n) if mean else 1.0,
            n,
            "sign test: all pairs differ alike",
        )
    error, tail = math.sqrt(variance / n), (1 - confidence) / 2
    draws = RESAMPLES if n <= LARGE else RESAMPLES // 5
    drawn = d[picks(n, draws, seed)]
    # each resample's variance counts the sample's own once more, or one of nothing but zeros would
    # send t to infinity
    t = (drawn.mean(1) - mean) / np.sqrt((n * drawn.var(1, ddof=1) + variance) / (n + 1) / n)
    student = t_quantile(1 - tail, n - 1)
    t_lo, t_hi = np.quantile(t, [tail, 1 - tail])
    seen = mean / error
    beyond = int((t >= seen).sum()) if seen > 0 else int((t <= seen).sum())
    p = max(2 * (1 + beyond) / (draws + 1), 2 * float(sps.t.sf(abs(seen), n - 1)))
    interval = bounded(
        mean, mean - max(float(t_hi), student) * error, mean - min(float(t_lo), -student) * error
    )
    return Paired(interval, min(1.0, p), n, "bootstrap-t and Student’s t, by prompt")


def welch(first: Values, second: Values, *, confidence: float = 0.95) -> Paired:
    """Mean of `first` [n] − mean of `second` [m], unpaired: Welch's t (1947) over single answers,
    as papers report it.

    For parity alone: it takes every answer as independent and pairs none; `n` is n + m. `p` is
    None, and `test` says why, with fewer than 2 answers on a side or where neither side varies.
    False alarms as measured at 5 %, 15 prompts, 10 answers to each on either side, prompts and
    answers of equal variance, 2,000 runs each: 1.0 % where both sides share the prompts'
    differences (pairing would have taken them out); 20 and 30 % where besides each prompt moves by
    itself between the sides, with half or all of that variance. `paired_means` of the prompts'
    means alarms in 3.6, 3.4 and 4.6 % (500 runs each).
    """
    a, b = as_floats(first, "first"), as_floats(second, "second")
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    n = a.size + b.size
    quantile_z(confidence)
    if a.size < 2 or b.size < 2:
        return Paired(n=n, test="none: fewer than 2 answers on a side")
    difference = float(a.mean() - b.mean())
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return Paired(
            bounded(difference, math.nan, math.nan), None, n, "none: the answers do not vary"
        )
    found: Any = sps.ttest_ind(a, b, equal_var=False)
    ends = found.confidence_interval(confidence)
    return Paired(
        bounded(difference, ends.low, ends.high), float(found.pvalue), n, "Welch’s t, by answer"
    )


def paired_shares(first: Values, second: Values, *, confidence: float = 0.95) -> Paired:
    """Share of 1s in first − share in second; both [N] of 1, 0 and nan.

    p: McNemar's exact test (1947; the binomial over the pairs that disagree). Interval: Newcombe's
    square-and-add of two Wilson intervals for paired shares (1998, Statist. Med. 17:2635, method
    10). The two are different methods and may disagree where the interval ends near 0: the exact
    test alarms falsely in 0.9 to 2.4 % of runs at 5 % (n = 12 to 50), the interval covers in 95 to
    96 %. Values that are no 0 or 1 (a prompt's mean over draws) fall to `paired_means`.
    """
    a, b = _both(first, second)
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        return paired_means(a, b, confidence=confidence)
    n = a.size
    if n == 0:
        return Paired()
    both, only_a, only_b = (int(v.sum()) for v in (a * b, a * (1 - b), (1 - a) * b))
    neither = n - both - only_a - only_b
    one, two = (
        wilson(both + only_a, n, confidence=confidence).known,
        wilson(both + only_b, n, confidence=confidence).known,
    )
    if one is None or two is None:
        return Paired()
    (p1, lo1, hi1), (p2, lo2, hi2) = one, two
    product = float((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    cross = both * neither - only_a * only_b
    phi = (
        0.0
        if product == 0
        else (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)
    )

    def reach(below: float, above: float) -> float:
        return math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))

    difference = (only_a - only_b) / n
    lo, hi = difference - reach(p1 - lo1, hi2 - p2), difference + reach(hi1 - p1, p2 - lo2)
    changed = only_a + only_b
    p = float(sps.binomtest(only_a, changed, 0.5).pvalue) if changed else 1.0
    return Paired(bounded(difference, lo, hi, -1.0, 1.0), p, n, "McNemar, exact")


def paired_gaps(
    first_clean: Values,
    first_reached: Values,
    second_clean: Values,
    second_reached: Values,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int | None = 0,
) -> Paired:
    """Audit gap of the first model − that of the second, both on the same prompts.

    `…_clean` [N]: harmful with no edit; `…_reached` [S, N]: the envelope at each site (1, 0, nan),
    S each model's own. A gap is max over sites of mean(reached) − mean(clean), with the max taken
    inside each resample. Interval and p: Student's t with the
    bootstrap's standard error, widened by √(N/(N − 1)); where resamples do not vary, what Wilson's
    interval for N of N leaves open, and p = 1 for equal gaps, else none. With zeros for `…_clean`
    it is the difference in 1 − robustness. False alarms as measured at 5 %, six sites, 1,000 runs
    each: 1.6 % at n = 12, 3.3 at 24, 2.5 at 50.
    """
    quantile_z(confidence)
    stacks = []
    for clean, reached in ((first_clean, first_reached), (second_clean, second_reached)):
        rows = np.vstack([as_floats(clean, "clean"), as_floats(reached, "reached", ndim=2)])
        stacks.append(rows)
    n = stacks[0].shape[1]
    if stacks[1].shape[1] != n:
        raise UsageError(
            f"Both models must be given on the same prompts; {n} and {stacks[1].shape[1]} came."
        )

    def gaps(weights: Array) -> Array:
        """Weights [R, N] to the difference of gaps [R]."""
        found = []
        for rows in stacks:
            scored = ~np.isnan(rows)
            with np.errstate(invalid="ignore", divide="ignore"):
                rates = (weights @ np.nan_to_num(rows).T) / (weights @ scored.T.astype(float))
            found.append(np.fmax.reduce(rates[:, 1:], axis=1) - rates[:, 0])
        return found[0] - found[1]

    told = [~np.isnan(rows[0]) & (~np.isnan(rows[1:])).any(axis=0) for rows in stacks]
    pairs = int((told[0] & told[1]).sum())
    if n < 2 or pairs < 2 or any(len(rows) < 2 for rows in stacks):
        return Paired(n=pairs)
    estimate = float(gaps(np.ones((1, n)))[0])
    if not math.isfinite(estimate):
        return Paired(n=pairs)
    drawn = gaps(
        np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples).astype(float)
    )
    error = float(np.nanstd(drawn, ddof=1)) * math.sqrt(n / (n - 1))
    test = "Student’s t with the bootstrap’s error, by prompt"
    if error < 1e-12:
        rest = (1.0 - (wilson(n, n, confidence=confidence).lo or 0.0)) * (1.0 + abs(estimate))
        ends = bounded(estimate, estimate - rest, estimate + rest, -2.0, 2.0)
        return Paired(ends, 1.0 if estimate == 0 else None, pairs, "none: resamples do not vary")
    reach = float(sps.t.ppf((1 + confidence) / 2, n - 1)) * error
    p = 2 * float(sps.t.sf(abs(estimate) / error, n - 1))
    return Paired(
        bounded(estimate, estimate - reach, estimate + reach, -2.0, 2.0), min(1.0, p), pairs, test
    )


def p_of_interval(interval: Interval, *, confidence: float = 0.95) -> float | None:
    """The two-sided p-value of 0 that an interval implies, if it is normal on the side towards 0;
    None without one.

    For differences whose method gives an interval alone (DeLong's, a curve's crossing). At p = 1 −
    confidence it agrees with the interval by construction.
    """
    estimate = interval.estimate
    end = None if estimate is None else interval.lo if estimate > 0 else interval.hi
    if estimate is None or end is None:
        return None
    error = abs(estimate - end) / quantile_z(confidence)
    if error == 0:
        return 1.0 if estimate == 0 else None
    return float(2 * sps.norm.sf(abs(estimate) / error))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979): holds the chance of any false alarm among these tests.
    None: no test, none counted."""
    known = [(p, i) for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(sorted(known)):
        running = max(running, min(1.0, (len(known) - rank) * p))
        adjusted[i] = running
    return adjusted
