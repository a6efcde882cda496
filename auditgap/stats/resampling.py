"""What is resampled: prompts, or clusters of prompts that are alike.

    >>> alike = Clusters(4, ["a", "a", "b", "c"])
    >>> alike.count, round(alike.effective, 2)
    (3, 2.67)

Near-duplicate prompts fall together, so a resample draws whole clusters. Resamples depend on
nothing but their number, the count of clusters and the seed, and are kept between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from auditgap.errors import UsageError
from auditgap.stats.intervals import Array


class Clusters:
    """`n` prompts in clusters: `of_prompt` [N] is each prompt's cluster, `size` [G] the prompts of
    each over their mean (1 where every prompt is its own).

    `effective` is Kish's count: how many clusters of equal size tell as much.
    """

    def __init__(self, n: int, names: Sequence[object] | None = None) -> None:
        if names is not None and len(names) != n:
            raise UsageError(f"clusters must name one cluster a prompt: {n}; {len(names)} came.")
        self.of_prompt = (
            np.arange(n)
            if names is None
            else np.unique(np.array([str(name) for name in names]), return_inverse=True)[1]
        )
        self.n, self.count = n, int(self.of_prompt.max()) + 1 if n else 0
        counts = np.bincount(self.of_prompt, minlength=self.count).astype(float)
        self.size = counts * self.count / n if n else counts
        self.effective = float(counts.sum() ** 2 / (counts**2).sum()) if n else 0.0
        self.alone = self.count == n

    def total(self, values: npt.NDArray) -> Array:
        """Values [..., N] to each cluster's sum [..., G], in units of the mean cluster's size: for
        single prompts, the values."""
        if self.alone:
            return values.astype(float)
        member = np.zeros((self.n, self.count))
        member[np.arange(self.n), self.of_prompt] = self.count / self.n
        return values @ member

    def within(self, keep: npt.NDArray[np.bool_]) -> Clusters:
        """The clusters of the prompts to `keep` [N]."""
        return Clusters(int(keep.sum()), None if self.alone else self.of_prompt[keep].tolist())


@lru_cache(maxsize=4)
def resamples(count: int, n_resamples: int, seed: int | None) -> Array:
    """[R, G] how often each of `count` clusters is drawn in each resample; read-only."""
    even = np.full(count, 1 / count)
    drawn = np.random.default_rng(seed).multinomial(count, even, n_resamples).astype(float)
    drawn.setflags(write=False)
    return drawn


@lru_cache(maxsize=4)
def relabellings(
    count: int, runs: int, n_resamples: int, seed: int | None
) -> npt.NDArray[np.int16]:
    """[R, G] which of `runs` is taken for the attack, cluster by cluster; read-only."""
    rng = np.random.default_rng(None if seed is None else [seed, runs])
    picked = rng.integers(0, runs, (n_resamples, count), dtype=np.int16)
    picked.setflags(write=False)
    return picked


def exact_ends(hits: npt.ArrayLike, n: float, tail: float) -> tuple[Array, Array]:
    """Clopper–Pearson ends of rates hits/n, `tail` beyond each; hits may be fractions, as means
    over draws are. With n = 0 nothing is known: 0 and 1."""
    k = np.asarray(hits, dtype=float)
    if n <= 0:
        return np.zeros_like(k), np.ones_like(k)
    few, rest = np.maximum(k, 1e-12), np.maximum(n - k, 1e-12)
    lo = np.where(k <= 0, 0.0, sps.beta.ppf(tail, few, rest + 1))
    return lo, np.where(k >= n, 1.0, sps.beta.ppf(1 - tail, k + 1, rest))


def highest_median(values: Sequence[float], confidence: float = 0.95) -> float:
    """One-sided upper end of the median of `values`: the first order statistic that is above it
    with that confidence, whatever the distribution; the largest value where n < 5."""
    n = len(values)
    above = sps.binom.cdf(np.arange(n), n, 0.5) >= confidence
    return float(sorted(values)[int(above.argmax()) if above.any() else n - 1])
