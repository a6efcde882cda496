"""Quantiles and draws that a table asks for in every row, kept between calls.

    >>> round(t_quantile(0.975, 23), 3)
    2.069
    >>> picks(3, 2, seed=0).shape  # two resamples of three values
    (2, 3)

scipy's quantiles take as long as a small bootstrap.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

_LARGEST = 2**21  #: numbers in draws that are kept


@lru_cache(maxsize=64)
def normal_quantile(p: float) -> float:
    """The standard normal's quantile."""
    return float(sps.norm.ppf(p))


@lru_cache(maxsize=1024)
def t_quantile(p: float, freedom: float) -> float:
    """Student's t's quantile."""
    return float(sps.t.ppf(p, freedom))


def picks(n: int, n_resamples: int, seed: int | None) -> npt.NDArray[np.int64]:
    """[R, N] which of `n` values each resample draws; the same for the same seed."""
    if seed is None or n * n_resamples > _LARGEST:
        return _drawn(n, n_resamples, seed)
    return _kept(n, n_resamples, seed)


def _drawn(n: int, n_resamples: int, seed: int | None) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, n, (n_resamples, n))


@lru_cache(maxsize=4)
def _kept(n: int, n_resamples: int, seed: int) -> npt.NDArray[np.int64]:
    drawn = _drawn(n, n_resamples, seed)
    drawn.setflags(write=False)
    return drawn
