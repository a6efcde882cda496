"""Rates that move with training: steps to a threshold, area under the curve, and intervals over
seeds and prompts.

Outcomes are [S, K, N]: S seeds, K evaluated steps, N prompts; 1 (it happened), 0 (it did not) or
nan (unscored). The same prompts are asked at every step and of every seed, so seeds and prompts are
crossed, and are resampled independently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as sps

from auditgap.errors import UsageError
from auditgap.stats.crossing import (
    Crossing,
    area_under,
    areas_under,
    at_least,
    first_steps,
    or_nan,
    rising,
    steps_to,
)
from auditgap.stats.intervals import (
    N_RESAMPLES,
    Array,
    Interval,
    Values,
    as_floats,
    bounded,
    quantile_z,
    wilson,
)

#: Fewer seeds than this say nothing about seeds: intervals are then over prompts alone, and `over`
#: says so.
FEWEST_SEEDS = 3
THRESHOLDS = (0.5, 0.8)


@dataclass(frozen=True, slots=True)
class CurveEstimate:
    """One subject's curve. `rates`, `rises`: [K] intervals, a step each; `area` in [0, 1]; `over`:
    what was resampled."""

    steps: tuple[float, ...]
    rates: tuple[Interval, ...]
    rises: tuple[Interval, ...]  #: rate − rate at the first step, paired by prompt
    area: Interval
    crossings: Mapping[float, Crossing]
    n_seeds: int
    n_prompts: int
    over: str  #: "seeds and prompts", or "prompts"


@dataclass(frozen=True, slots=True)
class CurveDifference:
    """Base − subject, paired by seed and prompt: positive = the subject reached it earlier (or, of
    `area`, complied less).

    A crossing's difference is an Interval in steps; its estimate is None when one of the two never
    reached the threshold, and an end is None where it is open.
    """

    area: Interval
    crossings: Mapping[float, Interval]
    n_seeds: int
    n_prompts: int
    over: str


def curve(
    steps: Values,
    outcomes: Values,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int | None = 0,
) -> CurveEstimate:
    """The mean curve over seeds of `outcomes` [S, K, N] at `steps` [K], with intervals over seeds
    and prompts.

    Each resample draws prompts with replacement (the same for all seeds and steps, so that all is
    paired) and, with at least three seeds, seeds with replacement. Three seeds resampled vary too
    little: the resampled mean's distance from the mean of all seeds is stretched by √(S/(S−1)) (Rao
    & Wu 1988) and by t over z at S − 1 degrees of freedom, and the percentiles are widened for
    small N (Hesterberg 2015, section 5.3). A rate's interval is never narrower than Wilson's over N
    prompts where all resamples agree or the rate is 0 or 1, and is Wilson's when there is one seed.
    Coverage as measured at 95 %, N = 24 to 48, 3 or 5 seeds, 400 runs each: rates, area and
    crossings 93–98 where seeds differ much, 99–100 where they hardly do (three seeds cannot show
    that they agree). A crossing's ends are where the band's upper and lower ends reach the
    threshold, as in Brookmeyer & Crowley 1982.
    """
    x, array = _outcomes(steps, outcomes)
    draws = _Draws(array.shape[0], array.shape[2], confidence, n_resamples, seed)
    observed, drawn = _mean_curve(array), draws.of(array)
    hits, counts = _wilson_counts(array, observed)
    bands = [draws.interval(observed[k], drawn[:, k], 0.0, 1.0) for k in range(x.size)]
    whole = [wilson(hits[k], counts[k], confidence=confidence) for k in range(x.size)]
    # one seed: a plain rate over prompts, which Wilson's interval covers better than percentiles do
    # (96 against 90 % at 3 of 24)
    rates = tuple(
        w if array.shape[0] == 1 else _hull(b, w) if _certain(b) else b
        for b, w in zip(bands, whole, strict=True)
    )
    rises = tuple(
        (
            _rise(observed[k] - observed[0], draws, drawn[:, k] - drawn[:, 0], whole[0], whole[k])
            if k
            else _no_rise(observed)
        )
        for k in range(x.size)
    )
    lows, highs = (np.array([or_nan(getattr(r, end)) for r in rates]) for end in ("lo", "hi"))
    area = or_nan(area_under(x, observed))
    within = draws.interval(area, areas_under(x, drawn), 0.0, 1.0)
    if within.estimate is not None and within.lo == within.hi:
        within = bounded(area, or_nan(area_under(x, lows)), or_nan(area_under(x, highs)), 0.0, 1.0)
    crossings = {}
    for threshold in thresholds:
        found = steps_to(x, observed, threshold)
        early, late = steps_to(x, highs, threshold), steps_to(x, lows, threshold)
        lo = early.step if early.reached else early.censored_at
        crossings[threshold] = Crossing(found.step, lo, late.step, found.censored_at)
    return CurveEstimate(
        tuple(map(float, x)),
        rates,
        rises,
        within,
        crossings,
        array.shape[0],
        array.shape[2],
        draws.over,
    )


def curve_difference(
    steps: Values,
    base: Values,
    subject: Values,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int | None = 0,
) -> CurveDifference:
    """Base − subject of two outcome arrays [S, K, N] at the same steps, seeds and prompts, in the
    same order.

    A resample draws the same seeds and prompts of both. Where a resampled curve never reaches a
    threshold its crossing lies anywhere beyond the last step, and the difference is a half-line:
    ends are taken over the ends of these lines, so an interval may be open at one side or both, and
    never counts an unreached threshold as reached at the last step.
    """
    x, first = _outcomes(steps, base)
    _, second = _outcomes(steps, subject)
    if first.shape != second.shape:
        raise UsageError(
            f"Two curves are compared over the same seeds, steps and prompts; {first.shape},"
            f" {second.shape} came."
        )
    draws = _Draws(first.shape[0], first.shape[2], confidence, n_resamples, seed)
    curves, drawn = (_mean_curve(first), _mean_curve(second)), (draws.of(first), draws.of(second))
    area = or_nan(area_under(x, curves[0])) - or_nan(area_under(x, curves[1]))
    alone = [
        curve(
            steps,
            o,
            thresholds=thresholds,
            confidence=confidence,
            n_resamples=n_resamples,
            seed=seed,
        )
        for o in (first, second)
    ]
    areas = draws.interval(area, areas_under(x, drawn[0]) - areas_under(x, drawn[1]), -1.0, 1.0)
    if areas.estimate is not None and areas.lo == areas.hi:
        areas = _apart(area, alone[0].area, alone[1].area, -1.0, 1.0)
    crossings = {}
    for threshold in thresholds:
        ours, theirs = (first_steps(x, d, threshold) for d in drawn)
        ends = []
        # smallest, largest difference
        for a, b in ((at_least(ours, x[-1]), theirs), (ours, at_least(theirs, x[-1]))):
            with np.errstate(invalid="ignore"):
                ends.append(np.where(np.isnan(ours) | np.isnan(theirs), np.nan, a - b))
        pair = [steps_to(x, c, threshold).step for c in curves]
        estimate = None if pair[0] is None or pair[1] is None else pair[0] - pair[1]
        lo, hi = draws.quantile(ends[0], 0), draws.quantile(ends[1], 1)
        if estimate is not None and lo == hi:
            one, two = (_as_interval(a.crossings[threshold]) for a in alone)
            crossings[threshold] = _apart(estimate, one, two)
        else:
            low, high = (float(e) if math.isfinite(e) else None for e in (lo, hi))
            if estimate is not None:
                low, high = (
                    (None if low is None else min(low, estimate)),
                    (None if high is None else max(high, estimate)),
                )
            crossings[threshold] = Interval(estimate, low, high)
    return CurveDifference(areas, crossings, first.shape[0], first.shape[2], draws.over)


# ----------------------------------------------------------------------------------------------------------
# resampling


class _Draws:
    """The resamples of seeds and prompts that everything of one comparison shares."""

    def __init__(
        self, n_seeds: int, n_prompts: int, confidence: float, n_resamples: int, seed: int | None
    ) -> None:
        z = quantile_z(confidence)
        rng = np.random.default_rng(seed)
        self.n = n_prompts
        self.prompts = rng.multinomial(
            n_prompts, np.full(n_prompts, 1 / n_prompts), n_resamples
        ).astype(float)
        self.over, self.seeds, self.stretch = "prompts", np.ones((n_resamples, n_seeds)), 1.0
        if n_seeds >= FEWEST_SEEDS:
            self.over = "seeds and prompts"
            self.seeds = rng.multinomial(
                n_seeds, np.full(n_seeds, 1 / n_seeds), n_resamples
            ).astype(float)
            student = float(sps.t.ppf((1 + confidence) / 2, n_seeds - 1))
            self.stretch = math.sqrt(n_seeds / (n_seeds - 1)) * student / z
        if n_prompts > 1:
            t = sps.t.ppf((1 + confidence) / 2, n_prompts - 1)
            self.tail = float(sps.norm.cdf(-t * math.sqrt(n_prompts / (n_prompts - 1))))

    def of(self, outcomes: Array) -> Array:
        """Resampled mean curves [R, K] of `outcomes` [S, K, N]; nan where a resample holds no
        scored prompt."""
        s, k, n = outcomes.shape
        flat = outcomes.transpose(2, 0, 1).reshape(n, s * k)
        with np.errstate(invalid="ignore", divide="ignore"):
            rates = (self.prompts @ np.nan_to_num(flat)) / (
                self.prompts @ (~np.isnan(flat)).astype(float)
            )
            rates = rates.reshape(-1, s, k)
            weights = self.seeds[:, :, None] * ~np.isnan(rates)
            drawn = np.nansum(weights * np.nan_to_num(rates), axis=1) / weights.sum(axis=1)
            known = ~np.isnan(rates)
            centre = np.nansum(np.nan_to_num(rates), axis=1) / known.sum(axis=1)
        return np.clip(centre + self.stretch * (drawn - centre), 0.0, 1.0)

    def quantile(self, draws: Array, end: int) -> float:
        """The lower (0) or upper (1) widened percentile; infinities order as they should, nan draws
        are left out."""
        draws = np.sort(draws[~np.isnan(draws)])
        if self.n < 2 or not draws.size:
            return math.nan
        # not interpolated: half-way to infinity is infinity, half-way between two infinities no
        # number
        at = self.tail * (draws.size - 1)
        return float(draws[math.floor(at)] if end == 0 else draws[draws.size - 1 - math.floor(at)])

    def interval(self, estimate: float, draws: Array, low: float, high: float) -> Interval:
        return bounded(estimate, self.quantile(draws, 0), self.quantile(draws, 1), low, high)


def _mean_curve(outcomes: Array) -> Array:
    """[K]: the mean over seeds of each seed's rate over its scored prompts; nan where no seed has
    one."""
    known = ~np.isnan(outcomes)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = np.nansum(outcomes, axis=2) / known.sum(axis=2)
        return np.nansum(rates, axis=0) / (~np.isnan(rates)).sum(axis=0)


# -------------------------------------------------------------------------------------------------------------
# intervals


def _certain(interval: Interval) -> bool:
    """Whether a bootstrap interval claims to know: no width, or a rate at the edge."""
    return interval.estimate is not None and (
        interval.lo == interval.hi or interval.estimate in (0.0, 1.0)
    )


def _hull(a: Interval, b: Interval) -> Interval:
    if b.lo is None or b.hi is None or a.estimate is None:
        return a
    lo, hi = (
        (b.lo if a.lo is None else min(a.lo, b.lo)),
        (b.hi if a.hi is None else max(a.hi, b.hi)),
    )
    return Interval(a.estimate, lo, hi)


def _rise(rise: float, draws: _Draws, drawn: Array, before: Interval, after: Interval) -> Interval:
    found = draws.interval(rise, drawn, -1.0, 1.0)
    return (
        _apart(rise, after, before, -1.0, 1.0)
        if found.estimate is not None and found.lo == found.hi
        else found
    )


def _no_rise(observed: Array) -> Interval:
    """The first step's rise over itself: 0 by definition, with nothing to estimate."""
    return Interval(0.0) if not np.isnan(observed[0]) else Interval()


def _apart(
    difference: float, a: Interval, b: Interval, low: float = -math.inf, high: float = math.inf
) -> Interval:
    """a − b by squaring and adding the distances to two intervals' ends (Newcombe 1998); open where
    one of them is."""
    if a.estimate is None or b.estimate is None:
        return Interval()
    down = (
        None if a.lo is None or b.hi is None else math.hypot(a.estimate - a.lo, b.hi - b.estimate)
    )
    up = None if a.hi is None or b.lo is None else math.hypot(a.hi - a.estimate, b.estimate - b.lo)
    lo, hi = (
        (math.nan if down is None else difference - down),
        (math.nan if up is None else difference + up),
    )
    return bounded(difference, lo, hi, low, high)


def _as_interval(crossing: Crossing) -> Interval:
    return Interval(crossing.step, crossing.lo, crossing.hi)


def _wilson_counts(outcomes: Array, observed: Array) -> tuple[Array, Array]:
    """Hits and prompts a step for Wilson's interval of the mean curve: seeds of one prompt are
    alike, so N is the prompts."""
    counts = (~np.isnan(outcomes)).any(axis=0).sum(axis=1).astype(float)
    return np.nan_to_num(observed) * counts, counts


# ---------------------------------------------------------------------------------------------------------------
# input


def _outcomes(steps: Values, outcomes: Values) -> tuple[Array, Array]:
    x, array = rising(steps), as_floats(outcomes, "outcomes", ndim=3)
    if not x.size or not array.size or array.shape[1] != x.size:
        raise UsageError(
            f"outcomes must be [seeds, {x.size} steps, prompts], none of them empty; {array.shape}"
            " came."
        )
    if not np.isin(array[~np.isnan(array)], (0.0, 1.0)).all():
        raise UsageError("outcomes must be 1 (it happened), 0 (it did not) or nan (unscored).")
    return x, array
