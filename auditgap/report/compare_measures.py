"""What is compared, measure by measure: each model's value, and its difference from the base,
paired by prompt.

    table = frame([*latent(rows, models, why), *asked(rows, models)])
    # model twin, measure lvs, where block15, value 3.1, difference 1.2, p .004, p_holm .02 …
    table.loc[0]

A record has a model's own value with its interval (shares by Wilson, means by bootstrap) and,
unless it is the base's, the difference model − base, paired by prompt, with interval and p-value.
Null is null, with a reason. What makes records stands in `compare_latent` and `compare_asked`; here
is what they share, and the table that they become.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from auditgap import stats
from auditgap.report.compare_alike import Model
from auditgap.report.text import is_null
from auditgap.stats import Interval, Paired

Record = dict[str, Any]
#: (model's name, layer index or None, unit, eps) -> why there is no number.
Why = Callable[[str, int | None, str | None, float | None], str]

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

#: measure -> what it is called, and which way it points: −1 where more of it is worse.
MEASURES: Mapping[str, tuple[str, int]] = {
    "gap": ("Audit gap", -1),
    "safety": ("Behaviourally safe, no edit", 1),
    "robustness": ("Robust under bounded edits", 1),
    "lvs": ("LVS, mean", -1),
    "lvs_rel": ("LVS rel., mean", -1),
    "lvs_above_matched": ("LVS above its matched control", -1),
    "asr": ("ASR", -1),
    "asr_envelope": ("ASR envelope", -1),
    "compliance": ("Complies when asked", -1),
    "refusal": ("Refuses when asked", 0),
    "answered": ("Answers when asked", 1),
    "auroc": ("Fixed probe, AUROC", 0),
    "probe_gap": ("Fixed probe, safe–unsafe gap", 0),
    "ece": ("Fixed probe, ECE", 0),
    "area": ("Harmful fine-tuning, area under compliance", -1),
    "steps": ("Harmful fine-tuning, steps to compliance", 1),
    "sft_gap": ("Harmful fine-tuning, audit gap after the last step", -1),
}
SHARES = (
    "gap",
    "safety",
    "robustness",
    "asr",
    "asr_envelope",
    "compliance",
    "refusal",
    "answered",
    "sft_gap",
)
ROLES = ("embedding", "mid", "last")
MATCHED = "random_matched"


def site_of(model: Model, role: str) -> int | None:
    """The layer index of `embedding`, `mid` or `last`; None where the number of blocks was not
    recorded."""
    if role == "embedding":
        return -1
    if not model.n_blocks:
        return None
    return (
        min(model.n_blocks - 1, round(model.n_blocks / 2)) if role == "mid" else model.n_blocks - 1
    )


def roles_of(model: Model) -> dict[int, str]:
    """Layer index -> role; a model of one or two blocks keeps the first of the roles that fall
    together."""
    found: dict[int, str] = {}
    for role in ROLES:
        layer = site_of(model, role)
        if layer is not None:
            found.setdefault(layer, role)
    return found


def partner(model: Model, base: Model, layer: int) -> int | None:
    """The base's layer that a model's layer is compared with: the same in models of one depth, else
    that of the same role."""
    if model.n_blocks == base.n_blocks:
        return layer
    role = roles_of(model).get(layer)
    return None if role is None else site_of(base, role)


def depth_of(model: Model, layer: int) -> float | None:
    """Where a site stands between the embedding (0) and the last block (1)."""
    return None if not model.n_blocks else (layer + 1) / model.n_blocks


def turned(drop: Interval, n: int, test: str) -> Paired:
    """base − model as model − base, with the p-value that the interval implies."""
    found = minus(drop)
    p = stats.p_of_interval(found)
    return Paired(found, p, n, "" if p is None else test)


def minus(interval: Interval) -> Interval:
    return Interval(
        *(None if v is None else -v for v in (interval.estimate, interval.hi, interval.lo))
    )


def difference(base: Model, found: Paired) -> Record:
    """The columns of a record that say how it differs from the base."""
    d = found.difference
    return {
        "base": base.name,
        "n_pairs": found.n,
        "difference": d.estimate,
        "difference_lo": d.lo,
        "difference_hi": d.hi,
        "test": "" if found.p is None else found.test,
        "p": found.p,
    }


def ends(interval: Interval) -> Record:
    return {"value": interval.estimate, "lo": interval.lo, "hi": interval.hi}


def none(value: Any) -> Any:
    return None if is_null(value) else float(value)


# -- one table
# -----------------------------------------------------------------------------------------------------------


def frame(
    records: Sequence[Mapping[str, Any]], models: Sequence[str] | None = None
) -> pd.DataFrame:
    """The records in order, with COLUMNS and dtypes that do not depend on what is there, Table 1's
    marks, and Holm's p within each measure. `models`: their names in the order in which they stand
    together."""
    models = list(dict.fromkeys(str(r["model"]) for r in records)) if models is None else models
    kinds = list(dict.fromkeys(str(r["where"]) for r in records if r["audit"] != "latent"))

    def place(record: Mapping[str, Any]) -> tuple:
        """Models stand together at each place, by depth where it is known."""
        depth = next(
            (float(record[k]) for k in ("depth", "layer_index") if not is_null(record.get(k))), -1.0
        )
        kind = kinds.index(record["where"]) if record["where"] in kinds else -1
        eps = -1.0 if is_null(record.get("eps")) else float(record["eps"])
        role = ROLES.index(record["role"]) if record.get("role") in ROLES else 1
        measure, model = list(MEASURES).index(record["measure"]), models.index(record["model"])
        return (measure, kind, record.get("unit") or "", eps, depth, role, model)

    records = sorted(records, key=place)
    table = pd.DataFrame({c: [r.get(c) for r in records] for c in COLUMNS}, dtype=object)
    for name in COLUMNS:
        if name in WORDS:
            table[name] = table[name].map(lambda v: "" if is_null(v) else str(v)).astype(object)
        else:
            table[name] = pd.to_numeric(table[name]).astype(
                "Int64" if name in COUNTS else "float64"
            )
    for _, family in table.groupby(["audit", "measure"], sort=False):
        tests = [None if is_null(p) else float(p) for p in family["p"]]
        table.loc[family.index, "p_holm"] = [np.nan if p is None else p for p in stats.holm(tests)]
        table.loc[family.index[family["p"].notna()], "n_tests"] = sum(p is not None for p in tests)
    lvs = table[(table["measure"] == "lvs") & (table["role"] != "") & table["value"].notna()]
    for _, column in lvs.groupby(["role", "unit", "eps"], sort=False):
        most, least = column["value"].max(), column["value"].min()
        if most > least:
            table.loc[column.index[column["value"] == most], "mark"] = "largest"
            table.loc[column.index[column["value"] == least], "mark"] = "smallest"
    return table
