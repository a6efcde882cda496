"""What so many prompts could have shown.

detectable_excess(100, chance=0.02)     # 0.11: a smaller excess gap would often be missed
prompts_for_excess(0.1, chance=0.02)    # 101
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from scipy import optimize
from scipy import stats as sps

from auditgap.errors import UsageError
from auditgap.stats.intervals import wilson

#: More prompts than any audit has.
MOST = 1_000_000


def detectable_excess(
    n: int, chance: float = 0.0, *, draws: int = 1, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """The smallest excess gap whose lower end comes out above 0 with `power` among `n` prompts.

    `chance` is the share of prompts that one draw of the control flips, `draws` the number of
    draws. The lower end is that of `excess.simultaneous` at one site (Bonett–Price centre and
    error; sites at which nothing happens cost nothing), with attack and control flipping
    independently, which asks for more prompts than if both flip the same ones. So few flips that
    `excess.permutation_p` could not reach `alpha` / 2 show nothing. Rounded up to whole prompts.
    None when even an excess of 1 − `chance` would be missed. Raises UsageError for numbers that
    cannot be.
    """
    if n < 1 or draws < 1 or not 0 <= chance <= 1 or not 0 < power < 1 or not 0 < alpha < 1:
        raise UsageError(
            "Power needs n ≥ 1, draws ≥ 1, a chance rate within 0–1, power and alpha between 0 and"
            f" 1; n = {n!r}, draws = {draws!r}, chance = {chance!r}, power = {power!r}, alpha ="
            f" {alpha!r} came."
        )
    z_alpha, z_power = float(sps.norm.ppf(1 - alpha / 2)), float(sps.norm.ppf(power))

    def margin(excess: float) -> float:
        rate = chance + excess
        spread = rate * (1 - rate) + chance * (1 - chance) / draws
        centre = n * excess / (n + 2)
        squares = n * (spread + excess**2) + 2 - (n + 2) * centre**2
        error = math.sqrt(max(0.0, squares)) / (n + 2)
        return centre - z_alpha * error - z_power * math.sqrt(max(0.0, n * spread)) / (n + 2)

    fewest = math.ceil(math.log(2 / alpha) / math.log(draws + 1))
    return _least(margin, n, chance, fewest)


def prompts_for_excess(
    excess: float, chance: float = 0.0, *, draws: int = 1, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """The fewest prompts among which an excess gap of that size is shown with `power`; None when a
    million would not do, or none can (`chance` + `excess` above 1). Raises UsageError for numbers
    that cannot be."""
    if not 0 < excess <= 1:
        raise UsageError(f"An excess gap to be shown lies within 0–1; {excess!r} came.")
    if chance + excess > 1:
        return None

    def enough(n: int) -> bool:
        found = detectable_excess(n, chance, draws=draws, power=power, alpha=alpha)
        # it is rounded up to whole prompts; so is what is asked for
        return found is not None and found <= math.ceil(n * excess - 1e-9) / n + 1e-12

    return _fewest(enough)


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The fewest prompts that are enough; None when a million are not."""
    most = 1
    while not enough(most):
        most *= 2
        if most > MOST:
            return None
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def prompts_for_margin(
    margin: float, reach: float, n: int, shares: Sequence[float] = ()
) -> int | None:
    """About how many prompts bring the end of an interval within `margin` of its estimate, where
    `n` prompts reach `reach`, if the estimate stays where it is; None when a million would not do.

    The reach shrinks as that of Wilson's interval at `shares` (of a difference of two: both, added
    as squares), which near 0 and 1 is faster than 1/√n, the rule without them. Raises UsageError
    for a margin or reach that is not above 0, or no prompts.
    """
    if margin <= 0 or reach <= 0 or n < 1:
        raise UsageError(
            "A number of prompts needs margin > 0, reach > 0 and n ≥ 1; margin ="
            f" {margin!r}, reach = {reach!r}, n = {n!r} came."
        )

    def spread(size: int) -> float:
        if not shares:
            return 1 / math.sqrt(size)
        ends = [wilson(share * size, size).known for share in shares]
        return math.hypot(*(max(hi - p, p - lo) for p, lo, hi in (e for e in ends if e)))

    factor = reach / spread(n)

    def enough(size: int) -> bool:
        return factor * spread(size) <= margin

    return _fewest(enough)


def detectable_difference(
    n: int, base_rate: float, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """Smallest rise of a rate above `base_rate` that two groups of `n` prompts show with `power`
    (two-sided `alpha`).

    Two-proportion z-test with pooled variance under H0 (Fleiss, Levin & Paik 2003, eq. 4.14, no
    continuity correction), rounded up to whole prompts, as a rate over n prompts moves in steps of
    1/n: n = 24 from 5 % gives 8/24, +33 points. None when even a rise to 100 % would be missed.
    """
    if n < 1 or not 0 <= base_rate <= 1 or not 0 < power < 1 or not 0 < alpha < 1:
        came = f"n = {n!r}, base_rate = {base_rate!r}, power = {power!r}, alpha = {alpha!r}"
        raise UsageError(
            f"Power needs n ≥ 1, a base rate within 0–1, power and alpha between 0 and 1; {came}"
            " came."
        )
    z_alpha, z_power = float(sps.norm.ppf(1 - alpha / 2)), float(sps.norm.ppf(power))

    def excess(rise: float) -> float:
        middle, raised = base_rate + rise / 2, base_rate + rise
        pooled, apart = (
            2 * middle * (1 - middle),
            base_rate * (1 - base_rate) + raised * (1 - raised),
        )
        return rise - (
            z_alpha * math.sqrt(max(0.0, pooled) / n) + z_power * math.sqrt(max(0.0, apart) / n)
        )

    return _least(excess, n, base_rate)


def _least(margin: Callable[[float], float], n: int, base: float, fewest: int = 0) -> float | None:
    """The rise above the rate `base` from which on `margin` is not below 0, in whole prompts of `n`
    and at least `fewest`; None where not even a rise to 1 is enough."""
    room = 1 - base
    if room <= 0 or margin(room) <= 0:
        return None
    # a float, as no more than the root was asked for
    rise: Any = optimize.brentq(margin, 1e-9 * room, room)
    steps = max(math.ceil(n * rise - 1e-9), fewest)
    return steps / n if base + steps / n <= 1 + 1e-12 else None
