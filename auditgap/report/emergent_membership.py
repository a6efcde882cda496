"""Is a row that an adapter was trained on told from one that it was not? The table of memberships.

    member = membership_table(store.rows(["em_membership"]), store.rows(["em_reference"]))

Pure functions of DataFrames, as in `report.emergent`. No judge is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from auditgap import stats
from auditgap.report.emergent_values import ends, framed, with_ends
from auditgap.store.tables import groups_of

MEASURES = ("nll", "min_k", "min_k_pp", "zlib")
PREMIA = "premia"
#: What the fine-tuned model's own base is called where a score is relative to it.
OWN_BASE = "base"
MEMBERSHIP_COLUMNS: tuple[str, ...] = (
    "domain",
    "arm",
    "measure",
    "adjusted",
    "reference",
    "n_members",
    "n_others",
    "n_seeds",
    "n_unscored",
    *with_ends("auroc"),
    "reason",
)


def membership_table(rows: pd.DataFrame, reference: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a (domain, arm, measure, adjusted, reference), with exactly `MEMBERSHIP_COLUMNS`: is
    a trained row told from a held-out one?

    - `auroc`: P(a trained row's loss is below a held-out one's); .5 tells nothing. DeLong's
    interval, seeds pooled by row.
    - `measure`: mean NLL, Min-K %, Min-K %++, zlib ratio; `adjusted`: the fine-tuned model's minus
    the same under `reference` ("base": the model that was fine-tuned; else the named one, of whose
    rows `reference` is the table), which takes off that some rows are easier for any model.
    `premia` is the log-ratio of whole responses, log π_θ(y|x) − log π_ref(y|x).
    - `n_members`, `n_others`: rows with a score under at least one seed; `n_unscored` of all row ×
    seed have none.
    """
    table: list[dict[str, Any]] = []
    if "member" not in rows.columns:
        return framed(table, MEMBERSHIP_COLUMNS)
    for (domain, arm), part in groups_of(rows, ["domain", "arm"], sort=True):
        for (measure, name), losses in _losses(part, reference):
            member, known = part["member"].astype(bool), losses.notna()
            n_in, n_out = (
                int(part.loc[known & side, "row_id"].nunique()) for side in (member, ~member)
            )
            found = stats.membership_auroc(
                losses.to_numpy(float), member.to_numpy(), part["row_id"].tolist()
            )
            missing = [who for who, n in (("trained", n_in), ("held-out", n_out)) if not n]
            table.append(
                {
                    "domain": domain,
                    "arm": arm,
                    "measure": measure,
                    "adjusted": bool(name),
                    "reference": name,
                    "n_members": n_in,
                    "n_others": n_out,
                    "n_seeds": part["seed"].nunique(),
                    "n_unscored": int((~known).sum()),
                    **ends("auroc", found),
                    "reason": (
                        f"no {' and no '.join(missing)} row has this score" if missing else ""
                    ),
                }
            )
    return framed(table, MEMBERSHIP_COLUMNS)


def referred(
    rows: pd.DataFrame, reference: pd.DataFrame | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    """(a reference's name, its losses row by row of `rows`): the own base, and a named one."""
    yield OWN_BASE, rows[[f"base_{m}" for m in MEASURES]].set_axis(MEASURES, axis=1)
    if reference is not None and len(reference):
        keys = ["domain", "arm", "row_id"]
        for name, own in reference.groupby("reference", sort=True):
            theirs = own.drop_duplicates(keys).set_index(keys)[list(MEASURES)]
            found = theirs.reindex(pd.MultiIndex.from_frame(rows[keys]))
            yield str(name), found.set_axis(rows.index, axis=0)


def _losses(
    part: pd.DataFrame, reference: pd.DataFrame | None
) -> Iterator[tuple[tuple[str, str], pd.Series]]:
    """((measure, reference or ""), loss a row): larger = less likely to have been trained on."""
    against = list(referred(part, reference))
    for measure in MEASURES:
        own = part[measure].astype(float)
        yield (measure, ""), own
        for name, theirs in against:
            yield (measure, name), own - theirs[measure].astype(float)
    for name, theirs in against:
        ratio = stats.premia(
            part["nll"].astype(float), theirs["nll"].astype(float), part["n_tokens"].astype(float)
        )
        yield (PREMIA, name), pd.Series(ratio, index=part.index)
