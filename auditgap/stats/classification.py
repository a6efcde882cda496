"""How well a score tells two classes apart, and whether its probabilities mean what they say; with
intervals.

    >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]).estimate
    0.75

Examples of one prompt are alike, so intervals count prompts (`groups`), not examples. nan (or None)
scores are left out. Where one class is empty nothing can be told: every number is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special
from scipy import stats as sps

from auditgap.errors import UsageError
from auditgap.stats.intervals import Array, Interval, Values, as_floats, bounded, wilson

#: Bins of the expected calibration error.
BINS = 15


@dataclass(frozen=True)
class _Part:
    """A statistic with what each group adds to its error: the error is nearly the sum of `pulls`
    [K], which average 0."""

    estimate: float
    pulls: Array


def _checked(
    scores: Values, labels: Values, groups: Sequence[object] | np.ndarray | None
) -> tuple[Array, Array, np.ndarray]:
    """Scores, labels (0 or 1) and group numbers [n], all of one length."""
    s, y = as_floats(scores, "scores"), as_floats(labels, "labels")
    if len(s) != len(y) or (groups is not None and len(groups) != len(s)):
        raise UsageError(
            f"Scores, labels and groups must be one each an example; {len(s)} and {len(y)} came."
        )
    if not np.isin(y, (0.0, 1.0)).all():
        raise UsageError("Labels must be 0 or 1; leave out examples that have neither.")
    names = list(range(len(s))) if groups is None else [str(g) for g in groups]
    return (
        s,
        y,
        np.unique(np.array(names), return_inverse=True)[1] if len(s) else np.empty(0, dtype=int),
    )


def _sums(values: Array, groups: np.ndarray, n_groups: int) -> Array:
    return np.bincount(groups, weights=values, minlength=n_groups).astype(float)


def _auroc_part(s: Array, y: Array, g: np.ndarray, n_groups: int) -> _Part | None:
    high, low = s[y == 1], s[y == 0]
    if not len(high) or not len(low):
        return None
    ranks_low, ranks_high = np.sort(low), np.sort(high)
    # each example's own share of won comparisons, a tie counting half
    won = (np.searchsorted(ranks_low, high, "left") + np.searchsorted(ranks_low, high, "right")) / (
        2 * len(low)
    )
    lost = 1 - (
        np.searchsorted(ranks_high, low, "left") + np.searchsorted(ranks_high, low, "right")
    ) / (2 * len(high))
    estimate = float(won.mean())
    pull = np.empty(len(s))
    pull[y == 1], pull[y == 0] = (won - estimate) / len(high), (lost - estimate) / len(low)
    return _Part(estimate, _sums(pull, g, n_groups))


def _gap_part(p: Array, y: Array, g: np.ndarray, n_groups: int) -> _Part | None:
    high, low = p[y == 1], p[y == 0]
    if not len(high) or not len(low):
        return None
    pull = np.where(y == 1, (p - high.mean()) / len(high), -(p - low.mean()) / len(low))
    return _Part(float(high.mean() - low.mean()), _sums(pull, g, n_groups))


def _error(pulls: Array) -> float:
    """The standard error from the groups' pulls; nan with fewer than two groups."""
    k = len(pulls)
    return math.nan if k < 2 else math.sqrt(k / (k - 1) * float((pulls**2).sum()))


def auroc(
    scores: Values,
    labels: Values,
    groups: Sequence[object] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Area under the ROC curve (ties count half): P(a random 1 scores above a random 0), with
    DeLong's interval by group.

    DeLong, DeLong & Clarke-Pearson 1988 with Obuchowski's 1997 sum over clusters, taken on the
    logit scale with Student's t of (groups − 1). At 0 or 1 that variance is 0; there Wilson's
    interval of as many trials as the smaller class has groups stands in. `groups` None: every
    example is its own. Coverage as measured at 95 %, two alike answers a prompt, AUROC .5 to .98:
    97–99 % of 10 prompts, 96–98 of 24, 94–97 of 50 and 200; of the paired difference 91, 93 and 97
    % of 10, 24 and 100.
    """
    s, y, g = _checked(scores, labels, groups)
    keep = np.isfinite(s)
    s, y, g = s[keep], y[keep], np.unique(g[keep], return_inverse=True)[1]
    part = _auroc_part(s, y, g, int(g.max()) + 1 if len(g) else 0)
    if part is None:
        return Interval()
    a, error = part.estimate, _error(part.pulls)
    if not 0 < a < 1 or error == 0:
        trials = min(len(set(g[y == 1])), len(set(g[y == 0])))
        rate = wilson(a * trials, trials, confidence=confidence).known
        return Interval() if rate is None else bounded(a, *rate[1:], 0.0, 1.0)
    reach = _t(len(part.pulls), confidence) * error / (a * (1 - a))
    return bounded(
        a,
        float(special.expit(special.logit(a) - reach)),
        float(special.expit(special.logit(a) + reach)),
        0.0,
        1.0,
    )


def separation(
    probabilities: Values,
    labels: Values,
    groups: Sequence[object] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """The safe–unsafe gap: mean probability of the 1s minus mean of the 0s, in [−1, 1] (arXiv
    2606.08044, section 4.1).

    Interval: the groups' summed errors (linearised, so a prompt's two answers may be as alike as
    they like), Student's t. Coverage as measured at 95 %, 10 to 200 prompts: 93–97 %.
    Calibrate the probabilities first (`platt`), on data that is not in the gap.
    """
    p, y, g = _checked(probabilities, labels, groups)
    keep = np.isfinite(p)
    p, y, g = p[keep], y[keep], np.unique(g[keep], return_inverse=True)[1]
    part = _gap_part(p, y, g, int(g.max()) + 1 if len(g) else 0)
    return Interval() if part is None else _student(part, confidence, -1.0)


def paired_auroc_difference(
    first: Values,
    second: Values,
    labels: Values,
    groups: Sequence[object] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """AUROC of `first` minus AUROC of `second`, two scores of the same examples; those that either
    lacks are left out.

    DeLong's paired interval, summed by group.
    """
    return _paired(_auroc_part, first, second, labels, groups, confidence)


def paired_separation_difference(
    first: Values,
    second: Values,
    labels: Values,
    groups: Sequence[object] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """`separation` of `first` minus that of `second`, two probabilities of the same examples,
    paired by group."""
    return _paired(_gap_part, first, second, labels, groups, confidence, low=-2.0)


def _paired(part, first, second, labels, groups, confidence: float, low: float = -1.0) -> Interval:
    a, y, g = _checked(first, labels, groups)
    b, _, _ = _checked(second, labels, groups)
    keep = np.isfinite(a) & np.isfinite(b)
    a, b, y, g = a[keep], b[keep], y[keep], np.unique(g[keep], return_inverse=True)[1]
    k = int(g.max()) + 1 if len(g) else 0
    one, two = part(a, y, g, k), part(b, y, g, k)
    if one is None or two is None:
        return Interval()
    return _student(_Part(one.estimate - two.estimate, one.pulls - two.pulls), confidence, low)


def _student(part: _Part, confidence: float, low: float) -> Interval:
    reach = _t(len(part.pulls), confidence) * _error(part.pulls)
    return bounded(part.estimate, part.estimate - reach, part.estimate + reach, low, -low)


def _t(n_groups: int, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UsageError(
            f"confidence must lie between 0 and 1; {confidence!r} came. For example: 0.95"
        )
    return float(sps.t.ppf((1 + confidence) / 2, n_groups - 1)) if n_groups > 1 else math.nan


# -------------------------------------------------------------------------------------------------------
# calibration


@dataclass(frozen=True, slots=True)
class Platt:
    """P(unsafe) = σ(slope · logit + offset)."""

    slope: float
    offset: float

    def __call__(self, logits: Values) -> Array:
        """Probabilities of logits [n]; nan stays nan."""
        return special.expit(self.slope * as_floats(logits, "logits") + self.offset)


def platt(logits: Values, labels: Values) -> Platt | None:
    """Platt's scaling (1999), fitted by cross-entropy to his smoothed targets, so that separable
    logits stay finite.

    Targets: (n₁ + 1)/(n₁ + 2) for the 1s and 1/(n₀ + 2) for the 0s. The slope is held at ≥ 0:
    calibration may flatten a probe, never turn it round. None when one class is empty.
    """
    s, y, _ = _checked(logits, labels, None)
    s, y = s[np.isfinite(s)], y[np.isfinite(s)]
    ones, zeros = int((y == 1).sum()), int((y == 0).sum())
    if not ones or not zeros:
        return None
    target = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    # raw logits can be in the thousands: fit in their own unit
    size = float(np.sqrt(np.mean(s**2))) or 1.0
    z = s / size

    def cost(x: Array) -> tuple[float, Array]:
        t = x[0] * z + x[1]
        error = special.expit(t) - target
        return float(np.mean(np.logaddexp(0, t) - target * t)), np.array(
            [np.mean(error * z), np.mean(error)]
        )

    found = optimize.minimize(
        cost,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None), (None, None)],
        options={"ftol": 1e-14, "gtol": 1e-10, "maxiter": 1000},
    )
    return Platt(float(found.x[0]) / size, float(found.x[1]))


def _bin_of(p: Array, bins: int) -> np.ndarray:
    return np.minimum((p * bins).astype(int), bins - 1)


def _ece_of(p: Array, y: Array, weights: Array, bins: int) -> Array:
    """ECE [R] of weighted samples: weights [R, n]."""
    which = np.eye(bins)[_bin_of(p, bins)]
    return np.abs((weights * (p - y)) @ which).sum(1) / weights.sum(1)


def ece(
    probabilities: Values,
    labels: Values,
    *,
    bins: int = BINS,
    confidence: float = 0.95,
    n_draws: int = 400,
    seed: int = 0,
) -> Interval:
    """Expected calibration error of P(1) over equal-width bins: Σ n_b/n · |mean probability − share
    of 1s| (Guo et al. 2017).

    The estimate is biased upwards in small samples (see `ece_by_chance`), and resampling repeats
    the bias, so the interval inverts a test: shares of 1s that deviate t times as much as those
    seen, t ≥ 0, are simulated, and the t under which an ECE as small or as large as the one seen is
    not rare give the ends, t · estimate. The estimate may lie at the upper end. Examples are drawn
    independently, which is cautious where each prompt has one of either class. Coverage as measured
    at 95 %, 24 to 200 prompts: 97–99 % of a calibrated score, 90–95 % of over- and underconfident
    ones. None when no example is scored; a single class is no obstacle.
    """
    p, y, _ = _checked(probabilities, labels, None)
    keep = np.isfinite(p)
    p, y = p[keep], y[keep]
    if not len(p):
        return Interval()
    which = np.eye(bins)[_bin_of(p, bins)]
    counts = which.sum(0)
    # of each example's bin: share of 1s − mean probability
    deviation = which @ (((y - p) @ which) / np.maximum(counts, 1))
    estimate = float(_ece_of(p, y, np.ones((1, len(p))), bins)[0])
    uniform, tail = np.random.default_rng(seed).random((n_draws, len(p))), (1 - confidence) / 2

    def drawn(t: float) -> tuple[float, Array]:
        """The true ECE at t, and ECEs of samples from it."""
        share = np.clip(p + t * deviation, 0, 1)
        true = float(np.abs((share - p) @ which).sum() / len(p))
        return true, np.abs(((uniform < share) - p) @ which).sum(1) / len(p)

    lo, hi = estimate, estimate
    for t in np.linspace(0, 1, 26):
        true, sample = drawn(float(t))
        if np.mean(sample >= estimate - 1e-12) > tail:
            lo = true
            break
    for t in np.linspace(3, 1, 41):
        true, sample = drawn(float(t))
        if np.mean(sample <= estimate + 1e-12) > tail:
            hi = true
            break
    return bounded(estimate, lo, hi, 0.0, 1.0)


def ece_difference(
    first: Values, second: Values, labels: Values, *, bins: int = BINS, confidence: float = 0.95
) -> Interval:
    """`ece` of `first` minus that of `second` on the examples that both score; each one's interval
    carries its own bias.

    Square-and-add of the two intervals (Zou & Donner 2008), as if they were independent, which is
    cautious for two scores of the same examples. (A paired bootstrap covered 50–90 % where one
    score was calibrated and the other was not.)
    """
    a, y, _ = _checked(first, labels, None)
    b, _, _ = _checked(second, labels, None)
    keep = np.isfinite(a) & np.isfinite(b)
    one, two = (ece(x[keep], y[keep], bins=bins, confidence=confidence).known for x in (a, b))
    if one is None or two is None:
        return Interval()
    (e1, lo1, hi1), (e2, lo2, hi2) = one, two
    difference = e1 - e2
    lo, hi = (
        difference - math.hypot(e1 - lo1, hi2 - e2),
        difference + math.hypot(hi1 - e1, e2 - lo2),
    )
    return bounded(difference, lo, hi, -1.0, 1.0)


def ece_by_chance(
    probabilities: Values, *, bins: int = BINS, n_draws: int = 500, seed: int = 0
) -> float | None:
    """The ECE that a perfectly calibrated probe with these probabilities shows on average, for so
    few examples."""
    p = as_floats(probabilities, "probabilities")
    p = p[np.isfinite(p)]
    if not len(p):
        return None
    drawn = np.random.default_rng(seed).random((n_draws, len(p))) < p
    which = np.eye(bins)[_bin_of(p, bins)]
    return float(np.abs((p - drawn) @ which).sum(1).mean() / len(p))
