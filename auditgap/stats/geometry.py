"""Directions inside a model: where two sets of answers differ, how surely that is known, and how
far two directions agree.

    d = direction(misaligned, aligned)                          # [L, D], one vector a block
    # [L], cosine of the directions of two halves
    halves = split_half(misaligned, aligned, seed=0)
    compare({("maths", 0): d, ("code", 0): other}, {("maths", 0): halves, ("code", 0): theirs})

A direction that is estimated from few answers is part noise, and noise lowers every cosine. So each
cosine stands beside the largest one that two such estimates of the *same* direction would show
(`ceiling`), and beside what directions that have nothing to do with each other show by chance
(`chance_cosine`). nan: could not be told.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from scipy import stats as sps

from auditgap.errors import UsageError
from auditgap.stats.intervals import Array, Values

#: Random halvings that a split-half cosine is averaged over.
SPLITS = 20
#: A direction shorter than this share of the larger mean is rounding error: no direction.
_NOTHING = 1e-6


def direction(misaligned: Values, aligned: Values) -> Array:
    """Mean of `misaligned` [n, L, D] − mean of `aligned` [m, L, D], per block: [L, D] in fp64, in
    the unit of the activations.

    nan where a set is empty. Raises UsageError when the shapes do not fit.
    """
    first, second = _answers(misaligned, aligned)
    if not len(first) or not len(second):
        return np.full(first.shape[1:], np.nan)
    return first.mean(axis=0, dtype=float) - second.mean(axis=0, dtype=float)


def split_half(
    misaligned: Values, aligned: Values, *, seed: int = 0, splits: int = SPLITS
) -> Array:
    """Cosine of the directions of two random halves of each set, a block each [L], averaged over
    `splits` seeded halvings.

    Both sets, [n, L, D] and [m, L, D], are halved by answer. With independent errors e around a
    direction s the expected value is ‖s‖² / (‖s‖² + 2‖e‖²), so `reliability` of it is ‖s‖² / (‖s‖²
    + ‖e‖²). nan at blocks where a half has no direction, and everywhere when a set has fewer than 2
    answers. Measured with no direction at all (D = 256, 40 answers a set): mean 0.00.
    """
    first, second = _answers(misaligned, aligned)
    n, m = len(first), len(second)
    if n < 2 or m < 2 or splits < 1:
        return np.full(first.shape[1], np.nan)
    rng = np.random.default_rng(seed)
    one, other = _halves(n, splits, rng), _halves(m, splits, rng)
    found = np.empty(first.shape[1])
    # a block at a time: all blocks in fp64 would be many times the sets themselves
    for block in range(len(found)):
        high, low = first[:, block].astype(float), second[:, block].astype(float)
        scale = max(float(np.abs(high).max()), float(np.abs(low).max()))
        with np.errstate(invalid="ignore", divide="ignore"):
            halves = [one[side] @ high - other[side] @ low for side in (0, 1)]
            lengths = [np.linalg.norm(half, axis=1) for half in halves]
            cosines = (halves[0] * halves[1]).sum(axis=1) / (lengths[0] * lengths[1])
        short = np.minimum(*lengths) <= _NOTHING * scale
        found[block] = np.nan if short.any() else cosines.mean()
    return found


def _answers(misaligned: Values, aligned: Values) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(misaligned), np.asarray(aligned)
    if first.ndim != 3 or second.ndim != 3 or first.shape[1:] != second.shape[1:]:
        raise UsageError(
            f"Two sets of answers are [n, L, D] and [m, L, D]; {first.shape} and {second.shape}"
            " came."
        )
    return first, second


def _halves(n: int, splits: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Weights [splits, n] that average each half; with odd n one half has an answer more."""
    place = rng.permuted(np.tile(np.arange(n), (splits, 1)), axis=1)
    half = n // 2
    return (place < half) / half, (place >= half) / (n - half)


# -----------------------------------------------------------------------------------------------------------
# cosines


def cosine(first: Values, second: Values) -> Array:
    """Cosine of the last axis' vectors, [..., D] and [..., D] → [...]; nan where either has no
    length or is not known."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return np.where(lengths > 0, np.clip((a * b).sum(axis=-1) / lengths, -1, 1), np.nan)


def reliability(halves: Values) -> Array:
    """Spearman–Brown (1910): the reliability 2r / (1 + r) of a whole whose halves agree with cosine
    r; nan for r ≤ 0."""
    r = np.asarray(halves, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(r > 0, 2 * r / (1 + r), np.nan)


def ceiling(first_halves: Values, second_halves: Values) -> Array:
    """The cosine that two estimates of one direction would show: √(r_a · r_b), r their
    reliabilities (Spearman 1904).

    A cosine divided by it is corrected for attenuation. nan where a split-half cosine is 0 or less:
    such an estimate is noise.
    """
    return np.sqrt(reliability(first_halves) * reliability(second_halves))


def chance_cosine(width: int, confidence: float = 0.95) -> float:
    """The |cosine| that two random directions in `width` dimensions stay below with this
    probability; 1.96 / √D for large D.

    Exact: cos² of two uniformly random directions is Beta(1/2, (D − 1)/2). Activations of a model
    fill far fewer dimensions than D, so real unrelated directions can lie above it: it is the least
    that must be exceeded, not a test.
    """
    if width < 2 or not 0 < confidence < 1:
        raise UsageError(
            f"Random directions need a width of 2 or more and a confidence within 0–1; {width},"
            f" {confidence} came."
        )
    return math.sqrt(float(sps.beta.ppf(confidence, 0.5, (width - 1) / 2)))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the directions of two domains agree at one block; of one domain with itself: between
    different seeds."""

    first: str
    second: str
    block: int
    n_pairs: int  #: pairs of seeds that could be told
    cosine: float | None = None  #: mean over those pairs
    lowest: float | None = None  #: of those pairs; no confidence interval
    highest: float | None = None
    ceiling: float | None = None  #: mean √(r_a · r_b) of those pairs
    corrected: float | None = None  #: cosine / ceiling; may exceed 1 by chance
    reason: str = ""  #: why something of it could not be told


def compare(
    vectors: Mapping[tuple[str, Hashable], Values | None],
    halves: Mapping[tuple[str, Hashable], Values | None],
) -> list[Agreement]:
    """Every pair of domains at every block, from directions [L, D] by (domain, seed) and their
    split-half cosines [L].

    Each seed of one domain is set against each seed of the other, and a domain against itself by
    its different seeds: a second ceiling, how far the same training agrees with itself. With one
    seed there is no such cosine, and a reason; its `ceiling` is then the direction's reliability.
    Domains in order of first use; [] where nobody has a direction. Raises UsageError when the
    shapes differ.
    """
    seeds: dict[str, list[Hashable]] = {}
    for domain, seed in vectors:
        seeds.setdefault(domain, []).append(seed)
    known = {key: np.asarray(v, dtype=float) for key, v in vectors.items() if v is not None}
    shapes = {v.shape for v in known.values()}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise UsageError(
            f"Directions must all be [L, D] of one model; {', '.join(map(str, sorted(shapes)))}"
            " came."
        )
    if not shapes:
        return []
    n_blocks = next(iter(shapes))[0]
    agree = {
        key: (
            np.full(n_blocks, np.nan) if halves.get(key) is None else np.asarray(halves[key], float)
        )
        for key in known
    }
    found = []
    for a, b in [(a, b) for i, a in enumerate(seeds) for b in list(seeds)[i:]]:
        keys = combinations(seeds[a], 2) if a == b else product(seeds[a], seeds[b])
        pairs = [((a, s), (b, t)) for s, t in keys if (a, s) in known and (b, t) in known]
        cosines = np.array([cosine(known[p], known[q]) for p, q in pairs]).reshape(-1, n_blocks)
        ceilings = np.array([ceiling(agree[p], agree[q]) for p, q in pairs]).reshape(-1, n_blocks)
        if a == b and not pairs:
            own = np.array([reliability(agree[a, s]) for s in seeds[a] if (a, s) in known]).reshape(
                -1, n_blocks
            )
            reason = "no two seeds of the domain have a direction"
            tops = [
                float(own[:, k].mean()) if len(own) and np.isfinite(own[:, k]).all() else None
                for k in range(n_blocks)
            ]
            found += [
                Agreement(a, b, k, 0, ceiling=tops[k], reason=reason) for k in range(n_blocks)
            ]
        else:
            found += [_agreement(a, b, k, cosines[:, k], ceilings[:, k]) for k in range(n_blocks)]
    return found


def _agreement(first: str, second: str, block: int, cosines: Array, ceilings: Array) -> Agreement:
    told = np.isfinite(cosines)
    values, tops = cosines[told], ceilings[told]
    if not len(values):
        reason = (
            "a direction has no length or holds a value that is not a number"
            if len(cosines)
            else "a domain has no direction"
        )
        return Agreement(first, second, block, 0, reason=reason)
    mean = float(values.mean())
    range_ = (float(values.min()), float(values.max()))
    if not np.isfinite(tops).all():
        reason = "no ceiling: the halves of a direction do not agree, or it has none"
        return Agreement(first, second, block, len(values), mean, *range_, reason=reason)
    top = float(tops.mean())
    return Agreement(
        first, second, block, len(values), mean, *range_, ceiling=top, corrected=mean / top
    )
