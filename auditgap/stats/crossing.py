"""One curve over steps of training: when it reaches a threshold, and the area under it.

>>> steps_to([0, 10, 20], [0.1, 0.3, 0.7], 0.5)
Crossing(step=15.0, lo=None, hi=None, censored_at=None)
# never: a lower bound, not a number
>>> steps_to([0, 10, 20], [0.1, 0.1, 0.2], 0.5)
Crossing(step=None, lo=None, hi=None, censored_at=20.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from auditgap.errors import UsageError
from auditgap.stats.intervals import Array, Values, as_floats


@dataclass(frozen=True, slots=True)
class Crossing:
    """The first step at which a rate reached a threshold, or that it never did.

    Reached: `step`, and `censored_at` None. Never reached: `step` None and `censored_at` the last
    measured step; the true value is larger than that (right-censored). Nothing measured: both None.
    `hi` None beside a `lo`: the interval is open towards later steps, which were not measured; both
    None: no interval.
    """

    step: float | None = None
    lo: float | None = None
    hi: float | None = None
    censored_at: float | None = None

    @property
    def reached(self) -> bool:
        return self.step is not None


def steps_to(steps: Values, rates: Values, threshold: float) -> Crossing:
    """First step at which `rates` [K] is at least `threshold`, interpolated linearly from the
    measured step before.

    `steps` [K] rise; nan rates were not measured and are passed over. Reached at the first measured
    step: that step. Raises UsageError for steps that do not rise, or a threshold outside (0, 1].
    """
    x, y = _curve(steps, rates)
    if not 0 < threshold <= 1:
        raise UsageError(
            f"A threshold is a share above 0, at most 1; {threshold!r} came. For example: 0.5"
        )
    if not x.size:
        return Crossing()
    step = float(first_steps(x, y[None], threshold)[0])
    return Crossing(step) if math.isfinite(step) else Crossing(censored_at=float(x[-1]))


def area_under(steps: Values, rates: Values) -> float | None:
    """Area under `rates` [K] over `steps` [K] by the trapezoidal rule, divided by the steps' span:
    a mean rate, in [0, 1].

    nan inside is bridged by a straight line. None when the first or the last step, or all but one,
    was not measured: an area over a shorter span would pass for one over the whole.
    """
    asked, given = as_floats(steps, "steps"), as_floats(rates, "rates")
    x, y = _curve(asked, given)
    if x.size < 2 or np.isnan(given[0]) or np.isnan(given[-1]):
        return None
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def first_steps(x: Array, curves: Array, threshold: float) -> Array:
    """[R]: the interpolated first step at which each of `curves` [R, K] reaches the threshold; inf:
    never; nan: no data."""
    found = np.full(len(curves), np.inf)
    found[np.isnan(curves).all(axis=1)] = np.nan
    for r in np.flatnonzero((curves >= threshold).any(axis=1)):
        known = ~np.isnan(curves[r])
        at, y = x[known], curves[r][known]
        k = int(np.argmax(y >= threshold))
        found[r] = (
            at[k]
            if k == 0
            else at[k - 1] + (at[k] - at[k - 1]) * (threshold - y[k - 1]) / (y[k] - y[k - 1])
        )
    return found


def areas_under(x: Array, curves: Array) -> Array:
    """[R]: the normalised area under each of `curves` [R, K]."""
    if len(x) < 2:
        return np.full(len(curves), np.nan)
    if not np.isnan(curves).any():
        return np.trapezoid(curves, x, axis=1) / (x[-1] - x[0])
    return np.array([or_nan(area_under(x, c)) for c in curves])


def at_least(found: Array, last: float) -> Array:
    """A crossing that was never reached, as the least it can be."""
    return np.where(np.isinf(found), last, found)


def or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def rising(steps: Values) -> Array:
    x = as_floats(steps, "steps")
    if not np.isfinite(x).all() or (np.diff(x) <= 0).any():
        raise UsageError(
            f"steps must be finite and rise from one to the next; {np.array2string(x, threshold=8)}"
            " came."
        )
    return x


def _curve(steps: Values, rates: Values) -> tuple[Array, Array]:
    """The measured points of a curve."""
    x, y = rising(steps), as_floats(rates, "rates")
    if x.shape != y.shape:
        raise UsageError(f"A curve has one rate a step; {y.size} rates and {x.size} steps came.")
    return x[~np.isnan(y)], y[~np.isnan(y)]
