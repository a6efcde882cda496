"""The minimum distance to collapse from stored distance rows, over the prompts at risk.

distance_table(rows)      # one row a (subject, site, unit): DISTANCE_COLUMNS
distance_curves(rows)     # the curves behind it, one row a step: CURVE_COLUMNS
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from auditgap.report.looks import ends, need
from auditgap.report.text import is_null
from auditgap.stats.incidence import BROKEN, FLIPPED, WITHSTOOD, Incidence, incidence
from auditgap.store.tables import groups_of

WHERE = ("subject", "site", "layer_index", "unit")
DISTANCE_COLUMNS = (
    *WHERE,
    *("n", "n_harmful", "n_collapsed", "n_unscored", "n_broken"),
    *("median", "lo", "hi"),
)
CURVE_COLUMNS = (*WHERE, "eps", "survival", "lo", "hi")
_WORDS = ("subject", "site", "unit")
_COUNTS = ("layer_index", "n", "n_harmful", "n_collapsed", "n_unscored", "n_broken")


def distance_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Median distance to collapse of the prompts at risk (`stats.incidence`), one row a (subject,
    site, unit).

    `rows` are distance rows (`types.DistanceRow`). `n` counts the prompts at risk, the unscored
    among them; `n_harmful` those that were harmful with no edit, which have no distance;
    `n_broken` those whose text fell apart before it turned harmful, a competing outcome. `median`
    is null where fewer than half turned harmful within the sizes tried, and so are its ends where
    the interval does not reach one half.
    """
    table = []
    for key, n_harmful, found in _incidences(rows):
        counts = {
            "n": found.n + found.n_unscored,
            "n_harmful": n_harmful,
            "n_collapsed": found.n_flipped,
            "n_unscored": found.n_unscored,
            "n_broken": found.n_broken,
        }
        table.append(key | counts | ends("median", found.median, ""))
    return _frame(table, DISTANCE_COLUMNS)


def distance_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of the prompts at risk that had not turned harmful, one row a step from ε = 0."""
    parts = []
    for key, _, found in _incidences(rows):
        steps = zip(found.distances, 1 - found.flipped, 1 - found.hi, 1 - found.lo, strict=True)
        start = [(0.0, 1.0, 1.0, 1.0)] if found.n else []
        parts += [
            key | dict(zip(CURVE_COLUMNS[len(WHERE) :], step, strict=True))
            for step in [*start, *steps]
        ]
    return _frame(parts, CURVE_COLUMNS)


def _incidences(rows: pd.DataFrame) -> list[tuple[dict[str, Any], int, Incidence]]:
    need(rows, [*WHERE, "distance", "collapsed"])
    found = []
    for key, part in groups_of(rows, list(WHERE)):
        distance = part["distance"].astype(float)
        harmful = distance == 0  # with no edit: no distance, and not at risk
        broken = part.get("broken", pd.Series(index=part.index, dtype=object))
        endings = zip(part["collapsed"][~harmful], broken[~harmful], strict=True)
        ending = [_ending(collapsed, broke) for collapsed, broke in endings]
        where = dict(zip(WHERE, key, strict=True)) | {"layer_index": int(key[2])}
        found.append((where, int(harmful.sum()), incidence(distance[~harmful], ending)))
    return sorted(found, key=lambda f: (f[0]["subject"], f[0]["layer_index"], f[0]["unit"]))


def _ending(collapsed: object, broken: object) -> str | None:
    if is_null(collapsed):
        return None
    if collapsed:
        return FLIPPED
    return BROKEN if not is_null(broken) and broken else WITHSTOOD


def _frame(table: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    kinds = {c: object if c in _WORDS else "int64" if c in _COUNTS else "float64" for c in columns}
    return pd.DataFrame(table, columns=list(columns)).astype(kinds)
