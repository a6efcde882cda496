"""What is compared: measures, each model's readings of them, and the one table that they become.

    LVS = Measure("lvs", "LVS, mean", -1)
    found = by_prompt(LVS, {"base": values, "twin": others}, models, Place("block15"))
    table({"latent": [*found]}, (LVS,), models)
    # model twin, measure lvs, where block15, value 3.1, difference 1.2, p .004, p_holm .02 …

A reading has a model's own value with its interval and, unless it is the base's, the difference
model − base over what both were measured on, with its interval and p-value. Null is null, with a
reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from auditgap import stats
from auditgap.report import text
from auditgap.report.compare_models import ROLES, Model, depth_of, roles_of
from auditgap.report.text import is_null
from auditgap.stats import Interval, Paired
from auditgap.types import Site

#: Columns of `compare.parquet`: one row a (model, measure, place, budget).
COLUMNS = (
    "model",
    "audit",
    "measure",
    "where",
    "role",
    "layer_index",
    "depth",
    "unit",
    "eps",
    "n",
    "n_unscored",
    "value",
    "lo",
    "hi",
    "mark",
    "reason",
    "base",
    "n_pairs",
    "difference",
    "difference_lo",
    "difference_hi",
    "test",
    "p",
    "p_holm",
    "n_tests",
)
WORDS = ("model", "audit", "measure", "where", "role", "unit", "mark", "reason", "base", "test")
COUNTS = ("layer_index", "n", "n_unscored", "n_pairs", "n_tests")


class Unit(StrEnum):
    """What a measure's values are."""

    SHARE = "share"  #: of prompts
    POINTS = "points"  #: a difference of shares
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class Measure:
    """A name, what it is called, which way it points (−1 where more of it is more vulnerable, 1
    where it is safer), and its unit."""

    name: str
    title: str
    direction: int = 0
    unit: Unit = Unit.NUMBER

    def paired(self, first: np.ndarray, second: np.ndarray, seed: int = 0) -> Paired:
        """First − second, both [N], one value a prompt."""
        if self.unit == Unit.SHARE:
            return stats.paired_shares(first, second)
        return stats.paired_means(first, second, seed=seed)

    def value(self, number: object) -> str:
        return text.percent(number) if self.unit == Unit.SHARE else self.difference(number)

    def difference(self, number: object) -> str:
        return text.number(number) if self.unit == Unit.NUMBER else text.points(number)


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was measured: in words, and by site and budget where it has them."""

    where: str
    role: str | None = None  #: `embedding`, `mid` or `last`
    layer_index: int | None = None
    depth: float | None = None
    unit: str = ""
    eps: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One model's value of a measure at a place; `against`: how it differs from the base's, None
    for the base itself and where nothing is compared."""

    measure: Measure
    model: Model
    place: Place
    value: Interval = field(default_factory=Interval)
    n: int = 0
    n_unscored: int = 0
    reason: str = ""
    against: Paired | None = None


def at_site(
    model: Model, layer: int, unit: str = "", eps: float | None = None, what: str = ""
) -> Place:
    """A site of a model; `what` was done there."""
    return Place(
        f"{what}{Site(layer)}",
        roles_of(model).get(layer),
        layer,
        depth_of(model, layer),
        unit,
        eps,
    )


def by_prompt(
    measure: Measure,
    values: Mapping[str, pd.Series],
    models: Sequence[Model],
    place: Place,
    *,
    reason: str = "no answer could be told",
    seed: int = 0,
) -> Iterator[Reading]:
    """Readings of a measure that has one value a prompt, by each model's name."""
    base = models[0]
    for model in (m for m in models if m.name in values):
        theirs = None if model is base else values.get(base.name, EMPTY)
        yield reading(measure, model, place, values[model.name], theirs, reason=reason, seed=seed)


#: The values of a base that has none.
EMPTY = pd.Series(dtype=float)


def reading(
    measure: Measure,
    model: Model,
    place: Place,
    mine: pd.Series,
    theirs: pd.Series | None,
    *,
    paired_by: pd.Series | None = None,
    value: Interval | None = None,
    reason: str = "no answer could be told",
    seed: int = 0,
) -> Reading:
    """A model's reading from one value a prompt; `theirs` are the base's, paired by their index
    (None: this is the base). `value` is the audit's own estimate; without it a share has Wilson's
    interval and a mean the bootstrap's. `paired_by`: values that stand in for `mine` beside the
    base's, where those were measured otherwise."""
    known, against = mine.dropna(), None
    if theirs is not None:
        ours = mine if paired_by is None else paired_by
        both = pd.concat([ours, theirs], axis=1, join="inner").to_numpy(float)
        against = measure.paired(both[:, 0], both[:, 1], seed) if len(theirs) else Paired()
    if value is None:
        value = _mean(measure, known, seed)
    return Reading(
        measure=measure,
        model=model,
        place=place,
        value=value,
        n=len(mine),
        n_unscored=len(mine) - len(known),
        reason=reason if value.estimate is None else "",
        against=against,
    )


def _mean(measure: Measure, known: pd.Series, seed: int) -> Interval:
    if measure.unit == Unit.SHARE:
        return stats.wilson(float(known.sum()), len(known))
    return stats.paired_difference(known, 0 * known, seed=seed)


def interval_of(row: Mapping[str, Any], name: str, ends: str = "") -> Interval:
    """The interval in a table's columns NAME, NAME_lo, NAME_hi; `ends`: another name for those of
    its ends."""
    values: list[Any] = [row.get(c) for c in (name, f"{ends or name}_lo", f"{ends or name}_hi")]
    return Interval(*(None if is_null(v) else float(v) for v in values))


def turned(drop: Interval, n: int, test: str) -> Paired:
    """base − model as model − base, with the p-value that the interval implies."""
    found = minus(drop)
    p = stats.p_of_interval(found)
    return Paired(found, p, n, "" if p is None else test)


def minus(interval: Interval) -> Interval:
    return Interval(
        *(None if v is None else -v for v in (interval.estimate, interval.hi, interval.lo))
    )


# -- the table
# -------------------------------------------------------------------------------------------------


def table(
    readings: Mapping[str, Sequence[Reading]],
    measures: Sequence[Measure],
    models: Sequence[Model],
) -> pd.DataFrame:
    """The readings by audit as rows with COLUMNS, whose dtypes do not depend on what is there:
    measure by measure, models together at each place, with Table 1's marks and Holm's p within each
    measure."""
    rows = [_row(audit, one, models) for audit, part in readings.items() for one in part]
    order, names = [m.name for m in measures], [m.name for m in models]
    words = list(dict.fromkeys(r["where"] for r in rows if r["eps"] is None))

    def place(row: Mapping[str, Any]) -> tuple:
        """By depth where it is known, else in the order of the audit."""
        depth = next((float(row[k]) for k in ("depth", "layer_index") if row[k] is not None), -1.0)
        word = words.index(row["where"]) if row["where"] in words else -1
        eps = -1.0 if row["eps"] is None else float(row["eps"])
        role = ROLES.index(row["role"]) if row["role"] in ROLES else 1
        at = order.index(row["measure"]), word, row["unit"], eps, depth, role
        return (*at, names.index(row["model"]))

    rows.sort(key=place)
    found = pd.DataFrame({c: [r.get(c) for r in rows] for c in COLUMNS}, dtype=object)
    for name in COLUMNS:
        if name in WORDS:
            found[name] = found[name].map(lambda v: "" if is_null(v) else str(v)).astype(object)
        else:
            kind = "Int64" if name in COUNTS else "float64"
            found[name] = pd.to_numeric(found[name]).astype(kind)
    _correct(found)
    _mark(found)
    return found


def _row(audit: str, one: Reading, models: Sequence[Model]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": one.model.name,
        "audit": audit,
        "measure": one.measure.name,
        **{name: getattr(one.place, name) for name in Place.__slots__},
        "n": one.n,
        "n_unscored": one.n_unscored,
        "value": one.value.estimate,
        "lo": one.value.lo,
        "hi": one.value.hi,
        "reason": one.reason,
    }
    if one.against is not None:
        d = one.against.difference
        row |= {
            "base": models[0].name,
            "n_pairs": one.against.n,
            "difference": d.estimate,
            "difference_lo": d.lo,
            "difference_hi": d.hi,
            "test": one.against.test,
            "p": one.against.p,
        }
    return row


def _correct(found: pd.DataFrame) -> None:
    """Holm's p within each measure, and of how many tests."""
    for _, family in found.groupby(["audit", "measure"], sort=False):
        tests = [None if is_null(p) else float(p) for p in family["p"]]
        found.loc[family.index, "p_holm"] = [np.nan if p is None else p for p in stats.holm(tests)]
        found.loc[family.index[family["p"].notna()], "n_tests"] = sum(p is not None for p in tests)


def _mark(found: pd.DataFrame) -> None:
    """The largest and the smallest mean LVS at a role and budget, as the paper's Table 1 has them."""
    lvs = found[(found["measure"] == "lvs") & (found["role"] != "") & found["value"].notna()]
    for _, column in lvs.groupby(["role", "unit", "eps"], sort=False):
        most, least = column["value"].max(), column["value"].min()
        if most > least:
            found.loc[column.index[column["value"] == most], "mark"] = "largest"
            found.loc[column.index[column["value"] == least], "mark"] = "smallest"
