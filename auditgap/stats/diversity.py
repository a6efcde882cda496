"""How different the rows of a data set are from each other, from one vector a row.

    >>> vendi([[1, 0], [0, 1], [1, 0], [0, 1]])     # two different rows, each twice
    2.0

Only the vectors' directions count (cosine similarity). None: could not be told, and `why_not` says
why.
"""

from __future__ import annotations

import numpy as np

from auditgap.stats.intervals import Array, Values, as_floats


def why_not(x: Values) -> str:
    """Why the diversity of vectors [n, D] cannot be told, "" when it can."""
    rows = as_floats(x, "x", ndim=2)
    if len(rows) < 2:
        return f"{len(rows)} row{'' if len(rows) == 1 else 's'}; diversity needs 2"
    if not np.isfinite(rows).all():
        return (
            f"{int((~np.isfinite(rows).all(axis=1)).sum())} rows have a vector that is not finite"
        )
    zeros = int((~rows.any(axis=1)).sum())
    return f"{zeros} rows have a vector of zeros, which has no direction" if zeros else ""


def vendi(x: Values, order: float = 1.0) -> float | None:
    """Vendi score of vectors [n, D]: exp of the entropy of K/n's eigenvalues, K the cosines; 1 (all
    alike) … n (all apart).

    Friedman & Dieng 2023 (arXiv 2210.02410, definition 3.1); of another `order` q with Rényi's
    entropy (Pasarkar & Dieng 2024, arXiv 2310.12952): below 1 rare directions count more, above 1
    common ones do, so that scores fall with q. K/n = UUᵀ/n and UᵀU/n have the same
    eigenvalues other than 0, so the smaller of n×n and D×D is taken. No more than min(n, D), so
    scores compare only at like n, width and block.
    """
    if why_not(x):
        return None
    u = _unit(x)
    n, width = u.shape
    eigenvalues = np.linalg.eigvalsh((u @ u.T if n <= width else u.T @ u) / n)
    kept = eigenvalues[eigenvalues > 1e-12]
    if order == 1.0:
        return float(np.exp(-(kept * np.log(kept)).sum()))
    return float((kept**order).sum() ** (1 / (1 - order)))


def one_minus_cosine(x: Values) -> float | None:
    """1 − mean cosine of all pairs of different rows, vectors [n, D]: 0 all alike, 1 unrelated, at
    most n / (n − 1)."""
    if why_not(x):
        return None
    u = _unit(x)
    n = len(u)
    total = float((u.sum(axis=0) ** 2).sum())  # Σᵢⱼ cos, of which n are of a row with itself
    return 1 - (total - n) / (n * (n - 1))


def _unit(x: Values) -> Array:
    rows = as_floats(x, "x", ndim=2)
    # so that squares neither vanish nor overflow
    rows = rows / np.abs(rows).max(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
