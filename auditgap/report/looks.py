"""Stored rows as arrays of looks: what a judge said of each prompt, at each site and budget, by each
draw.

    looks = Looks(rows)
    looks.clean("toy")                                     # codes [N], a prompt each
    looks.of("toy", "rms", "targeted", sites, (0.01, 0.03), prompts)   # codes [K, S, E, N]

The rows' readers that tables share are here too. A prompt's rows in a cell are its draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from auditgap.errors import UsageError
from auditgap.stats import Interval, risk
from auditgap.store.tables import groups_of
from auditgap.types import ATTACKS, CLEAN, LONGER, Label

CELL = ["subject", "site", "layer_index", "unit", "eps", "attack"]


def need(rows: pd.DataFrame, columns: Iterable[str]) -> None:
    missing = ", ".join(column for column in columns if column not in rows.columns)
    if missing:
        raise UsageError(
            f"These rows lack the column(s) {missing}; read them with RunFolder.load(path).rows()."
        )


def edited_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of edited cells but longer searches', numbers as floats (null -> nan); a prompt's rows in a cell are its
    draws 0, 1, 2 …"""
    numbers = ["eps", "layer_index", "lvs", "lvs_rel", "l2", "relative_norm"]
    numbers += ["clean_reward", "edited_reward", "nll_clean", "nll_edited"]
    need(rows, [*CELL, *numbers, "prompt_id", "draw", "verdict_edited", "coherent", "flags"])
    edited = rows[~rows["attack"].isin((CLEAN, LONGER))].sort_values("draw", kind="stable")
    nameless = [column for column in CELL if edited[column].isna().any()]
    if nameless:
        raise UsageError(
            f"Edited rows must name their {', '.join(CELL)}; null in some: {', '.join(nameless)}."
        )
    floats = {name: edited[name].astype(float) for name in numbers}
    harmful = as_harmful(edited["verdict_edited"])
    broken = (edited["verdict_edited"] == Label.BROKEN).astype(float).where(harmful.notna())
    drop = floats["clean_reward"] - floats["edited_reward"]
    edited = edited.assign(**floats, harmful=harmful, broken=broken, drop=drop)
    return edited.assign(draw=edited.groupby([*CELL, "prompt_id"]).cumcount())


def as_harmful(verdicts: pd.Series) -> pd.Series:
    """1 harmful, 0 safe, refusal or broken, nan unscored."""
    known = {
        str(label): float(label is Label.HARMFUL) for label in Label if label is not Label.UNSCORED
    }
    return verdicts.map(known).astype(float)


def clean_verdicts(rows: pd.DataFrame) -> pd.Series:
    """(subject, prompt_id) -> verdict with no edit, null where there is none; the clean cell comes
    first."""
    need(rows, ["subject", "attack", "prompt_id", "verdict_clean"])
    ordered = rows.assign(edited=rows["attack"] != CLEAN).sort_values("edited", kind="stable")
    return ordered.groupby(["subject", "prompt_id"], sort=True)["verdict_clean"].first()


def order(key: Sequence[Any]) -> tuple:
    subject, site, layer_index, unit, eps, attack = key
    attacks = list(ATTACKS)
    return (
        subject,
        layer_index,
        unit,
        eps,
        attacks.index(attack) if attack in attacks else len(attacks),
        attack,
        site,
    )


def ends(name: str, interval: Interval, stem: str | None = None) -> dict[str, float | None]:
    prefix = name if stem is None else stem
    lo, hi = (f"{prefix}_{end}" if prefix else end for end in ("lo", "hi"))
    return {name: interval.estimate, lo: interval.lo, hi: interval.hi}


class Looks:
    """The looks of stored rows, by subject, unit and attack."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._verdicts = clean_verdicts(rows)
        self._clean = rows[rows["attack"] == CLEAN]
        # incoherent text is broken whatever its verdict
        broken = self._clean[self._clean["coherent"].isin([False])]
        self._broken = set(zip(broken["subject"], broken["prompt_id"], strict=True))
        edited = edited_rows(rows)
        label = edited["verdict_edited"].where(
            ~edited["coherent"].isin([False]) | (edited["verdict_edited"] == Label.UNSCORED),
            str(Label.BROKEN),
        )
        none = pd.Series(index=edited.index, dtype=object)
        second, half = (edited.get(name, none) for name in ("verdict_second", "verdict_half"))
        self.edited = edited.assign(
            code=risk.codes(label),
            second=risk.codes(second),
            looked=second.notna().astype(float),
            half=risk.codes(half),
        )
        searched = rows[rows["attack"] == LONGER]
        #: looks of the longer search, at prompts that the targeted attack did not flip
        self.longer = searched.assign(
            code=risk.codes(searched["verdict_edited"]), draw=0, eps=searched["eps"].astype(float)
        )
        self._parts = dict(groups_of(self.edited, ["subject", "unit", "attack"]))

    def clean(self, subject: str, prompts: Sequence[str]) -> risk.Codes:
        """Codes of the clean answers to `prompts` [N]."""
        known = self._verdicts.get(subject, pd.Series(dtype=object))
        return np.array(
            [
                risk.BROKEN if (subject, prompt) in self._broken else code
                for prompt, code in zip(
                    prompts, risk.codes(known.reindex(prompts).to_numpy(object)), strict=True
                )
            ],
            dtype=np.int8,
        ).reshape(len(prompts))

    def clean_half(self, subject: str, prompts: Sequence[str]) -> risk.Codes | None:
        """The same at half the length; None: nobody looked."""
        mine = self._clean[self._clean["subject"] == subject].drop_duplicates("prompt_id")
        if "verdict_half" not in mine or mine["verdict_half"].isna().all():
            return None
        known = mine.set_index("prompt_id")["verdict_half"]
        return risk.codes(known.reindex(list(prompts)).to_numpy(object))

    def clusters(self, subject: str, prompts: Sequence[str]) -> list[str] | None:
        """What each prompt nearly repeats, or its own name; None where nobody looked."""
        mine = self._clean[self._clean["subject"] == subject].drop_duplicates("prompt_id")
        if "cluster" not in mine or mine["cluster"].isna().all():
            return None
        known = mine.set_index("prompt_id")["cluster"].dropna().to_dict()
        return [str(known.get(prompt, prompt)) for prompt in prompts]

    def clean_texts(self, subject: str) -> pd.DataFrame:
        """`n_new_tokens`, `n_chain_tokens` (of those, the chain's; 0 where it does not think) and
        `completion_nll` of the clean answers, by prompt."""
        mine = self._clean[self._clean["subject"] == subject]
        mine = mine.drop_duplicates("prompt_id").set_index("prompt_id")
        chains = mine["n_chain_tokens"].fillna(0) if "n_chain_tokens" in mine else 0
        return mine[["n_new_tokens", "completion_nll"]].assign(n_chain_tokens=chains)

    def part(self, subject: str, unit: str, attack: str) -> pd.DataFrame:
        """The edited rows of one subject, unit and attack, with their `code`."""
        return self._parts.get((subject, unit, attack), self.edited.iloc[:0])


def grid(
    part: pd.DataFrame,
    sites: Sequence[str],
    budgets: Sequence[float],
    prompts: Sequence[str],
    column: str = "code",
    empty: float = risk.UNSCORED,
) -> np.ndarray:
    """`column` of rows of one subject, unit and attack, [K draws, S, E, N]; `empty` where there is
    no row."""
    at = [
        pd.Index(axis).get_indexer(pd.Index(part[name]))
        for name, axis in (("site", sites), ("eps", budgets), ("prompt_id", prompts))
    ]
    here = np.logical_and.reduce([index >= 0 for index in at])
    draw = part["draw"].to_numpy(int)[here]
    shape = (int(draw.max()) + 1 if here.any() else 0, len(sites), len(budgets), len(prompts))
    values = part[column].to_numpy(float)[here]
    found = np.full(shape, empty, dtype=np.float64)
    found[draw, at[0][here], at[1][here], at[2][here]] = values
    return found
