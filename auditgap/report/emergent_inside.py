"""The tables of an emergent-misalignment study that look inside: membership, prediction, diversity,
directions.

    ranking = ranking_table(store.rows(["em_judge"]))
    member = membership_table(store.rows(["em_membership"]))
    spread = diversity_table(store.rows(["em_diversity"]), ranking)
    # does what training left behind foretell the EM rate?
    prediction_table(ranking, member, spread)

Pure functions of DataFrames, as in `report.emergent`; a `ranking` is its `ranking_table`.
Membership, diversity and cosines know no judge; what sets them beside an EM rate names the judge of
that rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from auditgap import stats
from auditgap.report.emergent_values import AS_TRAINED, ends, framed, with_ends
from auditgap.store.tables import groups_of, rows_of

DIVERSITIES = ("vendi", "one_minus_cosine")
#: Vendi scores of other orders than 1, which older studies have not; shown, and no predictors.
ORDERS = ("vendi_half", "vendi_2")

_RATE = ("judge", "judge_id", "arm", "triggered", "by")
DIVERSITY_COLUMNS: tuple[str, ...] = (
    *_RATE,
    "domain",
    "encoder",
    "block",
    "n",
    *DIVERSITIES,
    *ORDERS,
    *with_ends("em_rate"),
    "reason",
)
CORRELATION_COLUMNS: tuple[str, ...] = (
    *_RATE,
    "encoder",
    "block",
    "measure",
    "n",
    *with_ends("rho"),
    "p",
    "p_holm",
    "reason",
)
_PREDICTOR = (*_RATE, "predictor", "measure", "adjusted", "reference", "block")
PREDICTION_COLUMNS: tuple[str, ...] = (
    *_PREDICTOR,
    "n",
    "rho",
    "p",
    "p_holm",
    "error",
    "error_of_mean",
    "n_above",
    *with_ends("auroc"),
    "reason",
)
PREDICTED_COLUMNS: tuple[str, ...] = (
    *_PREDICTOR,
    "domain",
    "value",
    *with_ends("em_rate"),
    "predicted",
)
COSINES_COLUMNS: tuple[str, ...] = (
    "arm",
    "block",
    "domain",
    "other",
    "n_pairs",
    "cosine",
    "lowest",
    "highest",
    "ceiling",
    "corrected",
    "chance",
    "width",
    "reason",
)


# --------------------------------------------------------------------------------------------------------
# diversity


def diversity_table(rows: pd.DataFrame, ranking: pd.DataFrame) -> pd.DataFrame:
    """One row a (judge, arm as it was trained, domain, block or encoder), with exactly
    `DIVERSITY_COLUMNS`: diversity beside the EM rate.

    `encoder`: the sentence encoder whose vectors were compared; "": the base, after `block`.

    `vendi`: effective number of different rows of `n`, which bounds it, so that scores compare at
    like n; `one_minus_cosine`: 1 − mean cosine of pairs. Without judged answers a row a (domain,
    block), its judge "".
    """
    table: list[dict[str, Any]] = []
    if "vendi" not in rows.columns:
        return framed(table, DIVERSITY_COLUMNS, nullable=["block"])
    rates = list(_as_trained(ranking)) or [(dict.fromkeys(_RATE, ""), ranking.iloc[:0])]
    for who, rated in rates:
        who = {**who, "triggered": who["triggered"] if who["judge"] else None}
        em = rated.set_index("domain")
        for row in rows_of(rows.sort_values(["block", "domain"], kind="stable")):
            own = em.loc[row["domain"]] if row["domain"] in em.index else {}
            rate = {name: own.get(name) for name in with_ends("em_rate")}
            table.append(
                {
                    **who,
                    **{k: row[k] for k in ("domain", "block", "n", *DIVERSITIES)},
                    "encoder": row.get("encoder") or "",
                    **{k: row.get(k) for k in ORDERS},
                    **rate,
                    "reason": row["unscored"] or "",
                }
            )
    return framed(table, DIVERSITY_COLUMNS, nullable=["block"])


def _as_trained(ranking: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The ranking's parts in which an arm is asked as it was trained."""
    if ranking.empty:
        return
    for key, part in groups_of(ranking, _RATE, sort=True):
        who: dict[str, Any] = dict(zip(_RATE, key, strict=True))
        if (who["arm"], bool(who["triggered"])) in AS_TRAINED:
            yield who, part


def correlation_table(diversity: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Spearman's ρ of each diversity measure with the EM rate over domains, from a
    `diversity_table`; `CORRELATION_COLUMNS`.

    `p` by permutation (`stats.rank_correlation`), `p_holm` over the measures and blocks of one
    judge and arm.
    """
    table: list[dict[str, Any]] = []
    judged = diversity[diversity["judge"] != ""]
    for key, family in judged.groupby(list(_RATE), sort=True) if len(judged) else ():
        who, some = dict(zip(_RATE, key, strict=True)), []
        for encoder, block, part in _spaces(family):
            for measure in (*DIVERSITIES, *(m for m in ORDERS if part[m].notna().any())):
                found = stats.rank_correlation(
                    part[measure].to_numpy(float), part["em_rate"].to_numpy(float), seed=seed
                )
                some.append(
                    {
                        **who,
                        "encoder": encoder,
                        "block": block,
                        "measure": measure,
                        "n": found.n,
                        **ends("rho", found.rho),
                        "p": found.p,
                        "reason": found.reason,
                    }
                )
        table += _adjusted(some)
    return framed(table, CORRELATION_COLUMNS, nullable=["block"])


def _spaces(diversity: pd.DataFrame) -> Iterator[tuple[str, float | None, pd.DataFrame]]:
    """(encoder, block of the base, its rows): what rows were vectors of, the base first."""
    for key, part in groups_of(diversity, ["encoder", "block"], sort=True):
        yield str(key[0]), None if key[0] else key[1], part


def _adjusted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    adjusted = stats.holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


# -------------------------------------------------------------------------------------------------------
# prediction


def prediction_table(
    ranking: pd.DataFrame, membership: pd.DataFrame, diversity: pd.DataFrame, *, seed: int = 0
) -> pd.DataFrame:
    """Leave-one-domain-out: how well each measure of a domain foretells its EM rate, with exactly
    `PREDICTION_COLUMNS`.

    A straight line through the other domains foretells each; `rho` is Spearman's of foretold and
    seen, `p` one-sided by permuting the rates and predicting again (`stats.predict_left_out`),
    `p_holm` over all measures of one judge and arm. `error`: mean absolute error as a share, beside
    that of foretelling the others' mean. Fewer than 4 domains: none, and `reason`.

    `auroc`: does the measure tell the `n_above` domains whose EM rate is above the domains' median
    from the others, P(a domain above has the larger value)? `stats.auroc`, a domain an example.
    False alarms as measured at 5 %, a measure that knows nothing, 4,000 panels each: the interval
    leaves .5 out in 0.0 % of 5 and 7 domains, 2.0 of 9 and 1.1 of 11.
    """
    table: list[dict[str, Any]] = []
    for who, rated in _as_trained(ranking):
        some = []
        for what, values in _predictors(who, membership, diversity):
            both, found = _foretold(rated, values, seed)
            some.append(
                {
                    **who,
                    **what,
                    "n": found.n,
                    "rho": found.rho,
                    "p": found.p,
                    "error": found.error,
                    "error_of_mean": found.error_of_mean,
                    **_above_median(both),
                    "reason": found.reason,
                }
            )
        table += _adjusted(some)
    return framed(table, PREDICTION_COLUMNS, nullable=["block"])


def predicted_table(
    ranking: pd.DataFrame, membership: pd.DataFrame, diversity: pd.DataFrame
) -> pd.DataFrame:
    """What `prediction_table` rests on, a row a domain and measure: `value`, seen, foretold.
    Exactly `PREDICTED_COLUMNS`."""
    table: list[dict[str, Any]] = []
    for who, rated in _as_trained(ranking):
        for what, values in _predictors(who, membership, diversity):
            both, found = _foretold(rated, values, 0)
            foretold = found.predicted or (None,) * len(both)
            for row, predicted in zip(rows_of(both), foretold, strict=True):
                rate = {name: row[name] for name in with_ends("em_rate")}
                table.append(
                    {
                        **who,
                        **what,
                        "domain": row["domain"],
                        "value": row["value"],
                        **rate,
                        "predicted": predicted,
                    }
                )
    return framed(table, PREDICTED_COLUMNS, nullable=["block"])


def _predictors(
    who: Mapping[str, Any], membership: pd.DataFrame, diversity: pd.DataFrame
) -> Iterator[tuple[dict[str, Any], pd.Series]]:
    """What foretells: (its names, its value by domain) of the same arm."""
    same = membership[membership["arm"] == who["arm"]]
    key = ["measure", "adjusted", "reference"]
    for told, part in groups_of(same, key, sort=False) if len(same) else ():
        names = {"predictor": "membership", **dict(zip(key, told, strict=True)), "block": None}
        yield names, part.set_index("domain")["auroc"]
    if len(diversity):
        mine = diversity[(diversity[list(_RATE)] == pd.Series(dict(who))[list(_RATE)]).all(axis=1)]
        for encoder, block, part in _spaces(mine):
            for measure in DIVERSITIES:
                names = {
                    "predictor": "diversity",
                    "measure": measure,
                    "adjusted": None,
                    "reference": encoder,
                    "block": block,
                }
                yield names, part.set_index("domain")[measure]


def _above_median(both: pd.DataFrame) -> dict[str, Any]:
    known = both[both["value"].notna() & both["em_rate"].notna()]
    rate = known["em_rate"].to_numpy(float)
    above = rate > np.median(rate) if len(rate) else np.zeros(0, dtype=bool)
    found = stats.auroc(known["value"].to_numpy(float), above.astype(float))
    return {"n_above": int(above.sum()), **ends("auroc", found)}


def _foretold(
    rated: pd.DataFrame, values: pd.Series, seed: int
) -> tuple[pd.DataFrame, stats.Prediction]:
    both = rated.sort_values("domain", kind="stable").assign(
        value=lambda f: f["domain"].map(values).astype(float)
    )
    return both, stats.predict_left_out(
        both["value"].to_numpy(float), both["em_rate"].to_numpy(float), seed=seed
    )


# -------------------------------------------------------------------------------------------------------
# directions


def cosines_table(rows: pd.DataFrame, vectors: Mapping[str, npt.ArrayLike]) -> pd.DataFrame:
    """One row a (arm, block, pair of domains), with exactly `COSINES_COLUMNS`: do two domains share
    a direction?

    `rows` as the audit wrote them, `vectors` a direction [L, D] by subject, its first axis in the
    order of the subject's blocks.

    - `cosine`: mean over the `n_pairs` pairs of seeds, `lowest`–`highest` of them (no confidence
    interval). Where `domain` is
      `other`: between its different seeds; null with one seed.
    - `ceiling`: what two estimates of one direction would show, √(r_a · r_b) with r the split-half
    reliability after
      Spearman–Brown; of a domain with itself its reliability. `corrected` = cosine / ceiling.
    - `chance`: what |cosine| of random directions of this `width` stays below 95 times in 100.
    """
    table: list[dict[str, Any]] = []
    if "split_half" not in rows.columns or rows.empty:
        return framed(table, COSINES_COLUMNS)
    for arm, family in rows.groupby("arm", sort=True):
        blocks = sorted({int(b) for b in family["block"]})
        directions: dict[tuple[str, Any], np.ndarray | None] = {}
        halves: dict[tuple[str, Any], np.ndarray | None] = {}
        for (domain, seed, subject), part in groups_of(
            family, ["domain", "seed", "subject"], sort=True
        ):
            own = part.set_index("block").reindex(blocks)
            told = own["norm"].notna().to_numpy()[:, None]
            vector = vectors.get(subject)
            directions[domain, seed] = (
                None if vector is None else np.where(told, np.asarray(vector, dtype=float), np.nan)
            )
            halves[domain, seed] = own["split_half"].to_numpy(float)
        width = next((v.shape[1] for v in directions.values() if v is not None), None)
        chance = None if width is None else stats.chance_cosine(width)
        for found in sorted(stats.compare(directions, halves), key=lambda a: a.block):
            table.append(
                {
                    "arm": arm,
                    "block": blocks[found.block],
                    "domain": found.first,
                    "other": found.second,
                    "n_pairs": found.n_pairs,
                    "cosine": found.cosine,
                    "lowest": found.lowest,
                    "highest": found.highest,
                    "ceiling": found.ceiling,
                    "corrected": found.corrected,
                    "chance": chance,
                    "width": width,
                    "reason": found.reason,
                }
            )
    return framed(table, COSINES_COLUMNS)
