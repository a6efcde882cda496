"""Several models side by side: from run folders to one table of values, differences, and reasons
where there is no number.

    found = compare([RunFolder.load("runs/base"), RunFolder.load("runs/twin")], named={"base": "runs/base"})
    # a row a (model, site, budget): value, difference from the base, Holm's p
    found.table[found.table["measure"] == "lvs"]
    found.sides.left_out                             # what was not comparable, a sentence each

Folders of latent, behaviour, probe and harmful-SFT audits in any mix; those of one model (by
fingerprint) are read together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from auditgap.report import curve
from auditgap.report.compare_alike import Sides, sides
from auditgap.report.compare_asked import asked, probed, tuned
from auditgap.report.compare_latent import ATTACK, latent
from auditgap.report.compare_measures import Why, frame
from auditgap.store import RunFolder
from auditgap.store.tables import groups_of
from auditgap.types import ATTACKS, CLEAN

#: audit -> the attacks of its cells, and what makes two rows the same answer to the same question.
_ROWS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "latent": (
        (*ATTACKS, CLEAN),
        ("subject", "layer_index", "unit", "eps", "attack", "draw", "prompt_id"),
    ),
    "behaviour": (("behaviour",), ("subject", "kind", "source", "prompt_id")),
    "probe": (("probe",), ("subject", "example_id")),
    "sft_curve": (("sft_curve",), ("subject", "seed", "step", "split", "prompt_id")),
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Who was compared (`sides`), the numbers (`compare_measures.COLUMNS`), and what a reader must
    know of them."""

    sides: Sides
    table: pd.DataFrame
    notes: tuple[str, ...]


def compare(
    folders: Sequence[RunFolder],
    *,
    named: Mapping[str, str] | None = None,
    base: str | None = None,
    only_compatible: bool = False,
    seed: int = 0,
) -> Comparison:
    """Read the folders and compare every model with the base (see `compare_alike.sides` for names,
    base and refusals)."""
    found = sides(folders, named=named, base=base, only_compatible=only_compatible)
    rows, notes = {}, []
    for audit in _ROWS:
        rows[audit], said = _rows(found, audit)
        notes += said
    thresholds = {
        float(t)
        for p in found.parts
        for t in p.folder.run["config"].get("thresholds") or ()
        if p.audit == "sft_curve"
    }
    table = frame(
        [
            *latent(rows["latent"], found.models, _why(found, rows["latent"]), seed=seed),
            *asked(rows["behaviour"], found.models),
            *probed(rows["probe"], found.models),
            *tuned(rows["sft_curve"], found.models, tuple(sorted(thresholds)) or curve.THRESHOLDS),
        ],
        [model.name for model in found.models],
    )
    if len(found.models) < 2:
        notes.append(
            f"There is one model, {found.base.name}, so there is nothing to compare it with."
        )
    return Comparison(found, table, tuple(notes))


def _rows(found: Sides, audit: str) -> tuple[pd.DataFrame, list[str]]:
    """All rows of an audit under the comparison's names; the same answer from two folders once, and
    a sentence about it."""
    attacks, identity = _ROWS[audit]
    frames, said = [], []
    for part in (p for p in found.parts if p.audit == audit):
        rows = part.folder.rows(attacks)
        if "subject" in rows and set(identity) <= set(rows.columns):
            rows = rows.assign(subject=rows["subject"].map(found.named(part)))
            frames.append(rows[rows["subject"].notna()])
        elif len(rows):
            said.append(
                f"The rows of {part.label} are those of an older version of the {audit} audit, and"
                " are not compared."
            )
        if not len(rows):
            said.append(f"{part.label} holds no finished rows of its {audit} audit.")
    if not frames:
        return pd.DataFrame(), said
    rows = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    again = rows.duplicated(list(identity))
    for name, count in rows.loc[again, "subject"].value_counts().items():
        said.append(
            f"{count} {audit} rows of {name} stand in several of the folders; the first folder's"
            " are used."
        )
    return rows[~again].reset_index(drop=True), said


def _why(found: Sides, rows: pd.DataFrame) -> Why:
    """Why a targeted cell has no LVS: failed, not finished, not asked for, or scored by nobody."""
    failed: dict[tuple, str] = {}
    planned: set[tuple] = set()
    cells: dict[tuple[Any, ...], pd.DataFrame] = {}
    if len(rows):
        attacked = rows[rows["attack"] == ATTACK]
        cells = {
            (s, int(at), u, float(e)): part
            for (s, at, u, e), part in groups_of(
                attacked, ["subject", "layer_index", "unit", "eps"]
            )
        }
    for part in (p for p in found.parts if p.audit == "latent"):
        names = {part.subjects[own]: name for own, name in found.named(part).items()}
        planned |= {
            key for entry in part.folder.planned() if (key := _key(entry["description"], names))
        }
        failed |= {
            key: str(record.get("cause", "no cause recorded"))
            for record in part.folder.failures().values()
            if (key := _key(record["description"], names))
        }

    def why(name: str, layer: int | None, unit: str | None, eps: float | None) -> str:
        key = (name, layer, unit, eps)
        if key in cells:
            return _commonest(cells[key])
        if key in failed:
            return f"failed: {failed[key]}"
        if key in planned:
            return "not finished: the run’s own command goes on with it"
        mine = [k for k in {*planned, *cells} if k[0] == name]
        if not mine:
            return "no targeted latent audit of this model was given"
        return (
            "this budget was not asked for"
            if any(k[1] == layer for k in mine)
            else "this site was not asked for"
        )

    return why


def _key(description: Mapping[str, Any], names: Mapping[str, str]) -> tuple | None:
    """(model, layer, unit, eps) of a targeted cell's description."""
    if (
        description.get("attack") != ATTACK
        or description.get("subject") not in names
        or description.get("eps") is None
    ):
        return None
    return (
        names[description["subject"]],
        int(description["site"]),
        description["unit"],
        float(description["eps"]),
    )


def _commonest(rows: pd.DataFrame) -> str:
    """The commonest reason that these rows' LVS are null, and how often."""
    reasons = rows["unscored"].fillna("").replace("", "no reason recorded").value_counts()
    return f"unscored: {reasons.index[0]} ({int(reasons.iloc[0])} of {len(rows)} rows)"
