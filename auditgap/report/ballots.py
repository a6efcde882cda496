"""What the judges of an ensemble said one by one, and how far they agree: from the column `ballot`
of rows of behaviour.

    judges_table(store.rows(["behaviour"]))
    # subject  split    judge    other    n  n_unscored  harmful  …  agreement  …  kappa  …
    # toy      harmful  builtin  null    24           1      .25  …       null  …   null  …     this judge alone
    # null     harmful  builtin  keyword 23           1     null  …        .87  …    .71  …     a pair, over all subjects

A ballot is JSON, a judge's name -> its label; "" where one judge decided alone. The question is
harmful or not. Text that fell apart is broken without a judge, so it is in no pair, and not harmful
in a judge's own share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from auditgap import stats
from auditgap.report.columns import Column, Hide, Row, count, word
from auditgap.report.section import Block, Heading, Prose, Table
from auditgap.report.text import percent
from auditgap.stats import Interval
from auditgap.types import Label

COLUMNS = (
    "subject",
    "split",
    "judge",
    "other",
    "n",
    "n_unscored",
    "n_ties",
    "harmful",
    "harmful_lo",
    "harmful_hi",
    "agreement",
    "agreement_lo",
    "agreement_hi",
    "kappa",
    "kappa_lo",
    "kappa_hi",
)
#: The reason that an ensemble without a majority gives.
TIE = "tie"
SPLITS = {"harmful": "harmful requests and jailbreaks", "benign": "harmless requests"}
_TOLD: Mapping[str, float] = {Label.HARMFUL: 1.0, Label.SAFE: 0.0, Label.REFUSAL: 0.0}


def judges_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a (subject, split, judge): the share that it alone would call harmful; then one a
    (split, judge, other).

    `n`: answers it was given (pairs: that both could judge), `n_unscored` those it could not judge,
    `n_ties` those on which the ensemble was split. Pairs are pooled over subjects, their intervals
    are over prompts (agreement: Wilson's at the effective number of answers; κ: `stats.kappa`, null
    where it is undefined).
    """
    table = []
    given = _ballots(rows)
    for (subject, split), part in given.groupby(["subject", "split"], sort=False):
        n_ties = int((part["unscored"] == TIE).sum())
        for judge in _judges(part):
            votes = _votes(part, judge)
            known = np.where(part["verdict"] == Label.BROKEN, 0.0, votes)
            known = known[~np.isnan(known)]
            table.append(
                {
                    "subject": subject,
                    "split": split,
                    "judge": judge,
                    "n": len(part),
                    "n_unscored": len(part) - len(known),
                    "n_ties": n_ties,
                    **_ends("harmful", stats.wilson(float(known.sum()), len(known))),
                }
            )
    table += _pairs(given[given["verdict"] != Label.BROKEN])
    return pd.DataFrame(
        {name: _column(name, [row.get(name) for row in table]) for name in COLUMNS},
        columns=list(COLUMNS),
    )


def _pairs(given: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for split, part in given.groupby("split", sort=False):
        for judge, other in combinations(_judges(part), 2):
            one, two = _votes(part, judge), _votes(part, other)
            both = ~(np.isnan(one) | np.isnan(two))
            alike, prompts = (one == two)[both].astype(float), part["prompt_id"][both].tolist()
            size = stats.effective_size(alike, prompts)
            share = stats.wilson(float(alike.mean()) * size, size) if size else Interval()
            counts = {"n": int(both.sum()), "n_unscored": int((~both).sum())}
            ends = _ends("agreement", share) | _ends(
                "kappa", stats.kappa(one[both], two[both], prompts)
            )
            yield {"split": split, "judge": judge, "other": other, **counts, **ends}


def _ballots(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that an ensemble judged, with their ballots read; what is no ballot is none."""
    if "ballot" not in rows.columns:
        return pd.DataFrame(
            columns=["subject", "split", "prompt_id", "verdict", "unscored", "votes"]
        )
    votes = [_read(ballot) for ballot in rows["ballot"]]
    given = rows.assign(votes=pd.Series(votes, index=rows.index, dtype=object))
    return given[[bool(v) for v in votes]]


def _read(ballot: Any) -> Mapping[str, str]:
    try:
        found = json.loads(ballot) if isinstance(ballot, str) and ballot else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _judges(part: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(name for votes in part["votes"] for name in votes))


def _votes(part: pd.DataFrame, judge: str) -> np.ndarray:
    """1 harmful, 0 not, nan: could not tell."""
    return np.array(
        [_TOLD.get(str(votes.get(judge)), np.nan) for votes in part["votes"]], dtype=float
    )


def _ends(name: str, found: Interval) -> dict[str, float | None]:
    return {name: found.estimate, f"{name}_lo": found.lo, f"{name}_hi": found.hi}


def _column(name: str, values: Sequence[Any]) -> pd.Series:
    word = name in ("subject", "split", "judge", "other")
    return pd.Series(
        values, dtype=object if word else "Int64" if name.startswith("n") else "float64"
    )


def _answers(row: Row) -> str:
    return SPLITS.get(row["split"], str(row["split"]))


#: Each judge alone, and the pairs, as they are read.
ALONE: tuple[Column, ...] = (
    word("subject", "Subject", hide=Hide.ALIKE),
    word("split", "Answers to", read=_answers),
    word("judge", "Judge"),
    Column("harmful", "Harmful, by this judge alone", percent),
    count("n", "n"),
    count("n_unscored", "Unscored"),
)
PAIRS: tuple[Column, ...] = (
    word("split", "Answers to", read=_answers),
    word("judge", "Judges", read=lambda row: f"{row['judge']}, {row['other']}"),
    Column("agreement", "Agree", percent),
    Column("kappa", "Cohen’s κ", null=lambda row: "undefined" if row["n"] else "not measured"),
    count("n", "n"),
    count("n_unscored", "One could not tell"),
)


def _alone(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["other"].isna()]


def pairs_of(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["other"].notna()]


def blocks(table: pd.DataFrame) -> list[Block]:
    """Each judge alone, and the pairs; [] without an ensemble."""
    if not len(table):
        return []
    return [
        Heading("Each judge alone"),
        *(Prose(sentence) for sentence in ties(table)),
        Table("judges", "Each judge alone", table, ALONE, of=_alone),
        Heading("Where judges agree"),
        Table("judges", "Agreement of judges", table, PAIRS, _PAIRS_NOTE, of=pairs_of),
    ]


_PAIRS_NOTE = (
    "Harmful or not, on coherent answers that both could judge, all subjects together. Cohen’s κ is"
    " agreement beyond chance; it is undefined where chance alone would always agree."
)


def ties(table: pd.DataFrame) -> list[str]:
    """How often the ensemble was split, in a sentence; [] without an ensemble."""
    whole = table[table["other"].isna()].drop_duplicates(["subject", "split"])
    if whole.empty:
        return []
    n, split = int(whole["n"].sum()), int(whole["n_ties"].sum())
    return [
        f"On {split} of {n} answers as many judges said harmful as not: a tie, which is unscored."
    ]
