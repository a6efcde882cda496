"""Was this row trained on? Scores of one row from its tokens' probabilities, and how well a score
tells members from others.

    # mean NLL of the two least likely of five tokens, nats
    >>> min_k([0.1, 0.2, 4.0, 2.0, 0.1], 0.4)
    3.0
    >>> membership_auroc([0.2, 0.3, 1.5, 1.2], [True, True, False, False]).estimate
    1.0

Every score is a loss: larger = less likely to have been trained on. None: could not be told.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from scipy import special
from scipy import stats as sps

from auditgap.errors import UsageError
from auditgap.stats.classification import _auroc_part, auroc
from auditgap.stats.intervals import Array, Interval, Values, as_floats, bounded, quantile_z


def min_k(token_nlls: Values, share: float = 0.2) -> float | None:
    """Min-K % (Shi et al. 2024, arXiv 2310.16789): mean of the largest `share` of token NLLs [T],
    in nats; at least one token.

    ⌊share · T⌋ tokens as in the authors' code. None without a token, or when an NLL is not finite.
    """
    return _worst(as_floats(token_nlls, "token_nlls"), share)


def min_k_pp(standardised: Values, share: float = 0.2) -> float | None:
    """Min-K %++ (Zhang et al. 2024, arXiv 2404.02936): −mean of the smallest `share` of
    standardised log-probabilities [T].

    A token's is (log p − μ) / σ with μ = E_v[log p(v)] and σ the standard deviation of log p(v),
    both under p over the vocabulary (`standardise`). The sign is turned, so that larger = less
    likely, as for the other losses.
    """
    return _worst(-as_floats(standardised, "standardised"), share)


def standardise(logp: Values, mean: Values, std: Values) -> Array:
    """(logp − mean) / std, each [T]; nan where std is 0: a model that is sure of one token
    standardises none."""
    x, m, s = (as_floats(v, name) for v, name in ((logp, "logp"), (mean, "mean"), (std, "std")))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(s > 0, (x - m) / s, np.nan)


def _worst(losses: Array, share: float) -> float | None:
    if not 0 < share <= 1:
        raise UsageError(f"The share of tokens lies within 0–1; {share!r} came. For example: 0.2")
    if not losses.size or not np.isfinite(losses).all():
        return None
    k = max(1, math.floor(share * losses.size + 1e-9))
    return float(np.sort(losses)[-k:].mean())


def zlib_ratio(total_nll: float | None, text: str) -> float | None:
    """Summed NLL of a text (nats) over its bytes under zlib (Carlini et al. 2021, arXiv
    2012.07805): repetition counts less.

    None for an empty text or an unknown NLL.
    """
    if total_nll is None or not math.isfinite(total_nll) or not text:
        return None
    return float(total_nll) / len(zlib.compress(text.encode("utf-8", "surrogatepass")))


# ------------------------------------------------------------------------------------------------------
# telling apart


def premia(nll: Values, base_nll: Values, n_tokens: Values) -> Array:
    """−(log π_θ(y|x) − log π_ref(y|x)) of whole responses [n]: PREMIA's log-ratio (arXiv
    2407.06443) as a loss.

    From mean NLLs a token and the number of tokens: n_tokens · (nll − base_nll), in nats.
    """
    a, b, n = (
        as_floats(v, name)
        for v, name in ((nll, "nll"), (base_nll, "base_nll"), (n_tokens, "n_tokens"))
    )
    return n * (a - b)


def membership_auroc(
    losses: Values,
    members: Sequence[bool] | Values,
    rows: Sequence[object] | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """AUROC of a loss [n] as a sign of membership: P(a member's loss is below a non-member's), ties
    half; above .5 = it tells.

    DeLong's interval, summed by `rows` (a row that several seeds saw is one row), on the logit
    scale as in `classification.auroc`; but held-out rows are few beside the trained, so each side
    has its own variance, and t its degrees of freedom after Satterthwaite (1946). nan losses are
    left out; None without a member or without a non-member. False alarms as measured, both from one
    distribution, three seeds that share half of their variance, 5,000 runs each: the 95 % interval
    leaves .5 out in 4.0 % of runs with 20 + 20 rows, 5.1 with 200 + 50, 4.8 with 200 + 20 (6.4 if
    both sides share one variance).
    """
    x, y = -as_floats(losses, "losses"), as_floats(members, "members")
    quantile_z(confidence)
    if x.size != y.size or (rows is not None and len(rows) != x.size):
        raise UsageError(f"Losses, members and rows must be one each; {x.size} and {y.size} came.")
    keep = np.isfinite(x)
    x, y, names = (
        x[keep],
        y[keep],
        np.array([str(r) for r in (range(x.size) if rows is None else rows)])[keep],
    )
    group = np.unique(names, return_inverse=True)[1] if x.size else np.empty(0, dtype=int)
    k = int(group.max()) + 1 if x.size else 0
    inside, seen = np.bincount(group, weights=y, minlength=k), np.bincount(group, minlength=k)
    sides = [inside == seen, inside == 0]
    n = [int(side.sum()) for side in sides]
    part = _auroc_part(x, y, group, k)
    if part is None or min(n) < 2 or sum(n) < k or not 0 < part.estimate < 1:
        return auroc(x, y, names.tolist(), confidence=confidence)
    parts = [
        m / (m - 1) * float((part.pulls[side] ** 2).sum()) for side, m in zip(sides, n, strict=True)
    ]
    variance = sum(parts)
    if variance == 0:
        return auroc(x, y, names.tolist(), confidence=confidence)
    freedom = variance**2 / sum(v**2 / (m - 1) for v, m in zip(parts, n, strict=True))
    reach = (
        float(sps.t.ppf((1 + confidence) / 2, freedom))
        * math.sqrt(variance)
        / (part.estimate * (1 - part.estimate))
    )
    middle = special.logit(part.estimate)
    return bounded(
        part.estimate,
        float(special.expit(middle - reach)),
        float(special.expit(middle + reach)),
        0.0,
        1.0,
    )


def roc(losses: Values, members: Sequence[bool] | Values) -> tuple[Array, Array]:
    """(false positives, true positives) as shares, from (0, 0) to (1, 1), one point a different
    loss: at most n + 1 each.

    Empty arrays without a member or without a non-member.
    """
    x, y = as_floats(losses, "losses"), np.asarray(members, dtype=float)
    keep = np.isfinite(x)
    x, y = x[keep], y[keep]
    if not 0 < y.sum() < y.size:
        return np.empty(0), np.empty(0)
    order = np.argsort(x, kind="stable")
    last = np.append(np.flatnonzero(np.diff(x[order])), x.size - 1)  # equal losses step together
    hits, misses = np.cumsum(y[order])[last], np.cumsum(1 - y[order])[last]
    return np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1])
