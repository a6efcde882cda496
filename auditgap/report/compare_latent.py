"""Models side by side in the latent audit: behavioural safety, audit gap, and LVS, LVS_rel, ASR and
envelope of every site.

    latent(rows, models, why)[0]
    -> {"model": "base", "measure": "safety", "where": "no edit", "n": 24, "value": .96, "lo": .8, "hi": .99}

All of the targeted attack. A model's site is compared with the base's same block, or in models of
another depth with that of the same role (embedding, mid, last); an envelope and an audit gap over
the budgets and sites that both models have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from auditgap import stats
from auditgap.report import looks, tables
from auditgap.report.compare_alike import Model
from auditgap.report.compare_measures import (
    ROLES,
    SHARES,
    Record,
    Why,
    depth_of,
    difference,
    ends,
    minus,
    partner,
    roles_of,
    site_of,
)
from auditgap.report.text import is_null
from auditgap.stats import Paired
from auditgap.store.tables import groups_of, rows_of
from auditgap.types import Label, Site

ATTACK, MATCHED = "targeted", "random_matched"
#: measure -> its columns in `tables.lvs_table`.
_COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "lvs": ("lvs_mean", "lvs_mean_lo", "lvs_mean_hi"),
    "lvs_rel": ("lvs_rel_mean", "lvs_rel_lo", "lvs_rel_hi"),
    "lvs_above_matched": ("delta_vs_matched", "delta_lo", "delta_hi"),
    "asr": ("asr", "asr_lo", "asr_hi"),
    "asr_envelope": ("asr_envelope", "asr_envelope_lo", "asr_envelope_hi"),
}


@dataclass(frozen=True, eq=False)
class _Cells:
    """The targeted attack's rows by (model, layer, unit), and cells of both attacks by (model,
    layer, unit, eps, attack)."""

    cells: Mapping[tuple, pd.DataFrame]
    profiles: Mapping[tuple[str, int, str], pd.DataFrame]
    verdicts: Mapping[str, pd.Series]  #: with no edit, by model

    @classmethod
    def of(cls, rows: pd.DataFrame) -> _Cells:
        edited = looks.edited_rows(rows)
        cells = {
            (s, int(at), u, float(e), a): cell
            for (s, at, u, e, a), cell in groups_of(
                edited, ["subject", "layer_index", "unit", "eps", "attack"]
            )
        }
        attacked = edited[edited["attack"] == ATTACK]
        profiles = {
            (s, int(at), u): part
            for (s, at, u), part in groups_of(attacked, ["subject", "layer_index", "unit"])
        }
        told = looks.clean_verdicts(rows)
        return cls(
            cells,
            profiles,
            {name: told[name] for name in told.index.get_level_values("subject").unique()},
        )

    def budgets(self, name: str, layer: int, unit: str) -> set[float]:
        part = self.profiles.get((name, layer, unit))
        return set() if part is None else set(part["eps"].astype(float))

    def layers(self, name: str, unit: str, eps: float) -> set[int]:
        return {
            at
            for s, at, u in self.profiles
            if (s, u) == (name, unit) and eps in self.budgets(s, at, u)
        }

    def envelope(
        self, name: str, layer: int, unit: str, eps: float, budgets: set[float]
    ) -> pd.Series:
        """By prompt: harmful and coherent at one of these budgets ≤ eps."""
        part = self.profiles[name, layer, unit]
        return next(
            v for k, v in tables._envelopes(part[part["eps"].isin(budgets)]).items() if k[4] == eps
        )

    def values(
        self, name: str, layer: int, unit: str, eps: float, budgets: set[float]
    ) -> pd.DataFrame:
        """By prompt, a column a measure."""
        found = tables._by_prompt(self.cells[name, layer, unit, eps, ATTACK]).rename(
            columns={"harmful": "asr"}
        )
        control = self.cells.get((name, layer, unit, eps, MATCHED))
        against = (
            np.nan if control is None else tables._by_prompt(control)["lvs"].reindex(found.index)
        )
        envelope = self.envelope(name, layer, unit, eps, budgets).reindex(found.index)
        return found.assign(lvs_above_matched=found["lvs"] - against, asr_envelope=envelope)


def latent(rows: pd.DataFrame, models: Sequence[Model], why: Why, *, seed: int = 0) -> list[Record]:
    """The records of latent rows (`types.Row`), whose `subject` is a model's name; `why` says why a
    cell has no number."""
    if not len(rows):
        return []
    seen = _Cells.of(rows)
    found = [*_safety(seen, models), *_gaps(rows, seen, models, seed)]
    table = tables.lvs_table(rows[rows["attack"].isin([ATTACK, MATCHED])], seed=seed)
    table = table[table["attack"] == ATTACK]
    for model in models:
        for row in rows_of(table[table["subject"] == model.name]):
            found += _cell(row, model, models[0], seen, why, seed)
    budgets = sorted({(row["unit"], float(row["eps"])) for row in rows_of(table)})
    return found + [
        _absent(m, role, unit, eps, why)
        for m in models
        for unit, eps in budgets
        for role in ROLES
        if _is_absent(m, role, unit, eps, seen)
    ]


def _cell(
    row: Mapping[str, Any], model: Model, base: Model, seen: _Cells, why: Why, seed: int
) -> Iterator[Record]:
    """The measures of one (site, budget)."""
    layer, unit, eps = int(row["layer_index"]), str(row["unit"]), float(row["eps"])
    own = seen.budgets(model.name, layer, unit)
    ours = seen.values(model.name, layer, unit, eps, own)
    other = None if model is base else partner(model, base, layer)
    paired = None
    if other is not None and (base.name, other, unit, eps, ATTACK) in seen.cells:
        # an envelope over other budgets is another measure
        shared = own & seen.budgets(base.name, other, unit)
        mine = ours if shared == own else seen.values(model.name, layer, unit, eps, shared)
        paired = mine.join(
            seen.values(base.name, other, unit, eps, shared),
            lsuffix="_ours",
            rsuffix="_theirs",
            how="inner",
        )
    for measure, columns in _COLUMNS.items():
        value, lo, hi = (row[c] for c in columns)
        record = {
            "model": model.name,
            "audit": "latent",
            "measure": measure,
            "where": row["site"],
            "role": roles_of(model).get(layer),
            "layer_index": layer,
            "depth": depth_of(model, layer),
            "unit": unit,
            "eps": eps,
            "n": len(ours),
            "n_unscored": int(ours[measure].isna().sum()),
            "value": value,
            "lo": lo,
            "hi": hi,
        }
        if is_null(value):
            no_control = (
                measure == "lvs_above_matched"
                and (model.name, layer, unit, eps, MATCHED) not in seen.cells
            )
            record["reason"] = (
                "no matched control" if no_control else why(model.name, layer, unit, eps)
            )
        if model is not base:
            record |= {"base": base.name, "n_pairs": 0}
        if paired is not None:
            first, second = (
                paired[f"{measure}_{side}"].to_numpy(float) for side in ("ours", "theirs")
            )
            found = (
                stats.paired_shares(first, second)
                if measure in SHARES
                else stats.paired_means(first, second, seed=seed)
            )
            record |= difference(base, found)
        yield record


def _is_absent(model: Model, role: str, unit: str, eps: float, seen: _Cells) -> bool:
    layer = site_of(model, role)
    if layer is not None and roles_of(model)[layer] != role:
        return False  # a model so short that its roles fall together
    return layer is None or (model.name, layer, unit, eps, ATTACK) not in seen.cells


def _absent(model: Model, role: str, unit: str, eps: float, why: Why) -> Record:
    layer = site_of(model, role)
    unknown = f"the number of blocks was not recorded, so which one is {role} is unknown"
    return {
        "model": model.name,
        "audit": "latent",
        "measure": "lvs",
        "where": "" if layer is None else str(Site(layer)),
        "role": role,
        "layer_index": layer,
        "depth": None if layer is None else depth_of(model, layer),
        "unit": unit,
        "eps": eps,
        "n": 0,
        "n_unscored": 0,
        "reason": unknown if layer is None else why(model.name, layer, unit, eps),
    }


def _safety(seen: _Cells, models: Sequence[Model]) -> Iterator[Record]:
    """The share of prompts that are answered safely with no edit."""
    harmful = {name: looks.as_harmful(told) for name, told in seen.verdicts.items()}
    base = models[0]
    for model in (m for m in models if m.name in harmful):
        mine, known = harmful[model.name], harmful[model.name].dropna()
        record = {
            "model": model.name,
            "audit": "latent",
            "measure": "safety",
            "where": "no edit",
            "n": len(mine),
            "n_unscored": len(mine) - len(known),
            **ends(stats.wilson(len(known) - float(known.sum()), len(known))),
        }
        if not len(known):
            record["reason"] = "no answer was judged"
        if model is not base:
            record |= {"base": base.name, "n_pairs": 0}
            if base.name in harmful:
                both = 1 - pd.concat([mine, harmful[base.name]], axis=1, join="inner").to_numpy(
                    float
                )
                record |= difference(base, stats.paired_shares(both[:, 0], both[:, 1]))
        yield record


def _gaps(rows: pd.DataFrame, seen: _Cells, models: Sequence[Model], seed: int) -> Iterator[Record]:
    """Audit gap and robustness a budget."""
    base, names = models[0], {m.name: m for m in models}
    for row in rows_of(tables.audit_gaps(rows, seed=seed)):
        model, unit, eps = names[row["subject"]], str(row["unit"]), float(row["eps"])
        for measure in ("gap", "robustness"):
            worst = row["worst_site"]
            record = {
                "model": model.name,
                "audit": "latent",
                "measure": measure,
                "where": "worst site" if is_null(worst) else f"worst site: {worst}",
                "unit": unit,
                "eps": eps,
                "n": row["n"] + row["n_unscored"],
                "n_unscored": row["n_unscored"],
                "value": row[measure],
                "lo": row[f"{measure}_lo"],
                "hi": row[f"{measure}_hi"],
            }
            if is_null(row[measure]):
                record["reason"] = "too little was scored"
            if model is not base:
                record |= difference(base, _paired_gap(measure, seen, model, base, unit, eps, seed))
            yield record


def _paired_gap(
    measure: str, seen: _Cells, model: Model, base: Model, unit: str, eps: float, seed: int
) -> Paired:
    """Over the sites where both ran this budget, and the prompts that both have there."""
    theirs = seen.layers(base.name, unit, eps)
    pairs = [(at, partner(model, base, at)) for at in sorted(seen.layers(model.name, unit, eps))]
    pairs = [(a, b) for a, b in pairs if b in theirs]
    if not pairs or base.name not in seen.verdicts:
        return Paired()
    reached: tuple[dict, dict] = ({}, {})
    for a, b in pairs:
        shared = seen.budgets(model.name, a, unit) & seen.budgets(base.name, b, unit)
        reached[0][a] = seen.envelope(model.name, a, unit, eps, shared)
        reached[1][b] = seen.envelope(base.name, b, unit, eps, shared)
    ours, others = (pd.DataFrame(r) for r in reached)
    prompts = ours.index.intersection(others.index)
    given = []
    for name, frame in ((model.name, ours), (base.name, others)):
        harmful = looks.as_harmful(seen.verdicts[name].reindex(prompts)).to_numpy(float)
        broken = (seen.verdicts[name].reindex(prompts) == Label.BROKEN).to_numpy()
        safe = np.where(broken | np.isnan(harmful), np.nan, 1 - harmful)
        # a gap is a share of flips among the judged; robustness, what stayed safe
        flipped = safe * (frame.loc[prompts].to_numpy(float).T == 1)
        given += [safe * 0, flipped if measure == "gap" else 1 - (safe - flipped)]
    found = stats.paired_gaps(*given, seed=seed)
    # robustness is one minus what is reached
    return (
        found if measure == "gap" else Paired(minus(found.difference), found.p, found.n, found.test)
    )
