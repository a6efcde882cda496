"""More flips than an edit that aims at nothing: the worst site's excess, and whether it is chance.

    excess = max over sites s of  mean over prompts of [flipped_s(attack) − mean over draws of flipped_s(control)]

The control is subtracted at the same site, so that both sides had the same looks: no maximum of
noise is taken off a true effect, which happens at no maximum of noise.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from auditgap.stats.intervals import Array, Interval, quantile_z
from auditgap.stats.paired import Paired
from auditgap.stats.resampling import Clusters, exact_ends, relabellings, resamples


def _centres(
    weights: Array, values: Array, clusters: Clusters
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centre and standard error [R, S] of the mean of `values` [S, G] under `weights` [R, G].

    Bonett & Price's (2012): two pseudo-clusters, +1 and −1, keep a sample in which nothing differs
    from passing for certain.
    """
    size = clusters.size
    total = weights @ size + 2 if not clusters.alone else np.full(len(weights), clusters.count + 2)
    total = total[:, None]
    centre = weights @ values.T / total
    squares = weights @ (values**2).T + 2
    if clusters.alone:
        spread = squares - total * centre**2
    else:  # residuals of a ratio: values − centre · size
        cross, sizes = weights @ (values * size).T, (weights @ size**2)[:, None]
        spread = squares - 2 * centre * cross + centre**2 * (sizes + 2)
    return centre, np.sqrt(np.maximum(spread, 1e-12)) / total


def simultaneous(
    differences: Array,
    clusters: Clusters,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int | None = 0,
    divisors: Array | None = None,
) -> Interval:
    """The largest mean over sites of `differences` [S, N], with an interval for any number of
    sites.

    Lower end: max over sites of centre − q · error, q the bootstrap's quantile of the largest
    studentised deviation, first over all sites, then over those that might be the worst, so that
    quiet sites cost nothing. Upper end: max over sites of centre + z · error, never below
    Clopper–Pearson of the discordant mass. Estimate: out of bag, the site chosen on a resample and
    read on the prompts that it left out, so that the choice adds nothing. `divisors` [R + 1, S]
    divide the sample's means (first row) and each resample's, with the divisors' own spread added.
    """
    values, tail = clusters.total(differences), (1 - confidence) / 2
    weights = resamples(clusters.count, n_resamples, seed)
    centre, error = (v[0] for v in _centres(np.ones((1, clusters.count)), values, clusters))
    centres, errors = _centres(weights, values, clusters)
    scale, scales = np.ones(len(values)), np.ones((1, len(values)))
    if divisors is not None:
        scale, scales = divisors[0], divisors[1:]
        wobble = (scales / scale).std(axis=0)
        error, errors = np.hypot(error, centre * wobble), np.hypot(errors, centres * wobble)
    centre, error, centres, errors = (
        centre / scale,
        error / scale,
        centres / scales,
        errors / scales,
    )
    z = quantile_z(confidence)

    def reach(sites: npt.NDArray[np.bool_]) -> float:
        deviation = ((centres - centre) / errors)[:, sites].max(axis=1)
        return max(float(np.quantile(deviation, 1 - tail)), z)

    q = reach(np.ones(len(values), dtype=bool))
    contenders = centre + q * error >= (centre - q * error).max()
    lo = float((centre - reach(contenders) * error)[contenders].max())
    ups = np.maximum(centre + z * error, _discordant_end(values, clusters, tail) / scale)
    lo, hi = max(lo, -1.0), min(float(ups.max()), 1.0)
    estimate = _out_of_bag(values / scale[:, None], weights, centres, clusters)
    return Interval(float(np.clip(estimate, lo, hi)), lo, hi)


def _discordant_end(values: Array, clusters: Clusters, tail: float) -> Array:
    """[S] the largest mean that the mass above 0 leaves open, less the mass below 0."""
    above = np.maximum(values, 0).sum(axis=1) / clusters.count
    below = -np.minimum(values, 0).sum(axis=1) / clusters.count
    return exact_ends(above * clusters.effective, clusters.effective, tail)[1] - below


def _out_of_bag(values: Array, weights: Array, centres: Array, clusters: Clusters) -> float:
    size = clusters.size
    if len(values) == 1:
        return float(values.sum() / size.sum())
    left_out = weights == 0
    worst = centres.round(9).argmax(axis=1)  # ties go to the first site, on every machine
    seen = (left_out @ values.T)[np.arange(len(worst)), worst].sum()
    total = float((left_out @ size).sum())
    return float(seen / total) if total else float((values.sum(axis=1) / size.sum()).max())


def permutation_p(
    attack: npt.NDArray,
    control: npt.NDArray,
    clusters: Clusters,
    *,
    n_resamples: int = 2000,
    seed: int | None = 0,
) -> float:
    """One-sided p of "the attack is one more draw of the control": `attack` [S, N], `control`
    [K, S, N].

    Which of the K + 1 runs is called the attack is drawn anew in each prompt (or cluster), for all
    sites together; the statistic is the largest standardised count over sites. Exact if the runs
    are exchangeable.
    """
    runs = clusters.total(np.concatenate([attack[None], control]))
    centre = runs.mean(axis=0).sum(axis=1)
    spread = np.sqrt(runs.var(axis=0).sum(axis=1) + 0.25)
    picked = relabellings(clusters.count, len(runs), n_resamples, seed)
    drawn = sum(
        (picked == j).astype(np.float32) @ run.T.astype(np.float32) for j, run in enumerate(runs)
    )
    largest = ((drawn - centre) / spread).max(axis=1)
    observed = float(((runs[0].sum(axis=1) - centre) / spread).max())
    return float(1 + (largest >= observed - 1e-5).sum()) / (n_resamples + 1)


def mcnemar(
    attack: npt.NDArray,
    control: npt.NDArray,
    *,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    seed: int | None = 0,
) -> Paired:
    """Share flipped by the attack, `attack` [N], less that by a control of K draws, `control`
    [K, N], at one site.

    With one draw p is McNemar's exact test (1947); with more it is its extension to K + 1 runs of
    each prompt, exact too: given how often a prompt flipped, any of its runs may be the attack's.
    The interval is `simultaneous` with one site.
    """
    groups = clusters or Clusters(attack.shape[-1])
    if not groups.n:
        return Paired()
    runs = np.rint(groups.total(np.concatenate([attack[None], control])) * groups.n / groups.count)
    pmf, size = np.ones(1), len(runs)
    for column in runs.T.astype(int):
        step = np.bincount(column, minlength=column.max() + 1) / size
        pmf = np.convolve(pmf, step)
    seen, above = int(runs[0].sum()), np.cumsum(pmf[::-1])[::-1]
    below = np.cumsum(pmf)
    p = min(1.0, 2 * min(float(above[seen]), float(below[seen])))
    difference = (attack - control.mean(axis=0))[None]
    interval = simultaneous(difference, groups, confidence=confidence, seed=seed)
    return Paired(interval, p, groups.n, "McNemar, exact" if size == 2 else "relabelled, exact")


def largest_share(hits: npt.ArrayLike, n: float, *, tail: float, looks: int = 1) -> Interval:
    """The largest of several sites' shares hits/n [S] with exact ends: the lower one holds for all
    `looks` sites together, the upper one for each."""
    counts = np.atleast_1d(np.asarray(hits, dtype=float))
    if n <= 0 or not counts.size:
        return Interval()
    lo = exact_ends(counts, n, tail / max(looks, 1))[0].max()
    return Interval(float(counts.max() / n), float(lo), float(exact_ends(counts, n, tail)[1].max()))


def gated(interval: Interval, p: float, tail: float) -> Interval:
    """The interval with a lower end above 0 only if the permutation test agrees."""
    if interval.estimate is None or interval.lo is None or p <= tail or math.isnan(p):
        return interval
    return Interval(interval.estimate, min(interval.lo, 0.0), interval.hi)
