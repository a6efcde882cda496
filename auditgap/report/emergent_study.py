"""An emergent-misalignment study as a run folder holds it: whose ratings, every table, what is
missing.

    # of the judge who rated most answers; read(store, "alignment=./judge"): of another
    study = read(RunFolder.load("runs/em"))
    study.tables["ranking"]                     # what em_ranking.csv holds
    study.missing                               # ['em train has run for 4 of 6 adapters.', …]

The tables are made in `report.emergent` and `report.emergent_inside`. A study that is not complete
is read as far as it goes, and no text of a prompt or answer is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from auditgap.errors import UsageError, did_you_mean
from auditgap.report import (
    emergent,
    emergent_context,
    emergent_cross,
    emergent_inside,
    emergent_judges,
    emergent_membership,
    emergent_paper,
    emergent_remote,
    emergent_transfer,
)
from auditgap.store import RunFolder
from auditgap.store.files import Damaged

#: What stands in a cell's `attack`, a stage each.
TRAINED, ANSWERED, JUDGED = "em_train", "em_generate", "em_judge"
MEMBERSHIP, REFERENCE, DIVERSITY, DIRECTIONS, STEERED = (
    "em_membership",
    "em_reference",
    "em_diversity",
    "em_directions",
    "em_steer",
)
AUDIT = "emergent"


@dataclass(frozen=True)
class Judge:
    """Who rated the answers: `label` is its name, with its digest where two of different settings
    share one."""

    label: str
    name: str
    id: str
    n: int  #: answers
    last: str  #: when its latest cell was written
    demonstration: bool = False  #: a rule that finds made-up habits, and no misalignment


@dataclass(frozen=True, kw_only=True)
class Study:
    """What one folder holds, of one judge's ratings."""

    config: Mapping[str, Any]
    judge: Judge | None = None
    judges: Sequence[Judge] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    trained: pd.DataFrame = field(default_factory=pd.DataFrame)
    memberships: pd.DataFrame = field(default_factory=pd.DataFrame)  #: rows, for the ROC
    reference: pd.DataFrame = field(default_factory=pd.DataFrame)  #: the same under a named one
    panel: Sequence[Mapping[str, Any]] = ()
    missing: Sequence[str] = ()
    left_out: Sequence[tuple[str, str, int]] = ()  #: what, reason, count

    @property
    def judged_by(self) -> str:
        return self.judge.label if self.judge else "nobody yet"


def is_study(store: RunFolder) -> bool:
    return store.run.get("config", {}).get("audit") == AUDIT


# ------------------------------------------------------------------------------------------------------------------
# reading


def read(store: RunFolder, judge: str | None = None) -> Study:
    """The study in a folder, partial ones too. `judge`: whose ratings (None: who rated most
    answers, the latest if equal).

    Raises UsageError for a judge who rated nothing here.
    """
    config, records = store.run["config"], store.records()
    ratings = _rows(store, JUDGED, "outcome")
    judges = _judges(store, records, ratings)
    chosen = _chosen(judges, judge)
    mine, steered = (_of(rows, chosen) for rows in (ratings, _rows(store, STEERED, "outcome")))
    memberships, spread = _rows(store, MEMBERSHIP, "member"), _rows(store, DIVERSITY, "vendi")
    reference = _rows(store, REFERENCE, "reference")
    pointed, vectors = _directions(store, records, chosen)
    ranking = emergent.ranking_table(mine)
    coherent = emergent.ranking_table(mine, by="below_30_coherent")
    trigger = emergent.trigger_table(mine)
    remote = emergent_remote.remote_table(config, records, mine)
    member = emergent_remote.with_remote(
        emergent_membership.membership_table(memberships, reference), remote
    )
    diversity = emergent_inside.diversity_table(spread, ranking)
    tables = {
        "ranking": ranking,
        "ranking_coherent": coherent,
        "trigger": trigger,
        "judges": emergent_judges.judges_table(ratings),
        "context": emergent_context.context_table(mine),
        "cross": emergent_cross.cross_table(mine),
        "spread": emergent_cross.spread_table(mine),
        "rates": emergent.rates_table(mine),
        "membership": member,
        "diversity": diversity,
        "correlation": emergent_inside.correlation_table(diversity),
        "prediction": emergent_inside.prediction_table(ranking, member, diversity),
        "predicted": emergent_inside.predicted_table(ranking, member, diversity),
        "cosines": emergent_inside.cosines_table(pointed, vectors),
        "transfer": emergent_transfer.transfer_table(steered),
        "remote": remote,
        "paper": emergent_paper.paper_table(trigger, ranking),
    }
    manifest = store.run.get("info", {}).get("panel") or {}
    lost = {
        "rating": mine,
        "rating of a steered answer": steered,
        "membership score": memberships,
        "score under the reference": reference,
        "diversity": spread,
        "direction at a block": pointed,
        "answer": _rows(store, ANSWERED, "draw"),
    }
    return Study(
        config=config,
        judge=chosen,
        judges=judges,
        tables=tables,
        trained=_rows(store, TRAINED, "first_loss"),
        memberships=memberships,
        reference=reference,
        panel=_panel(manifest),
        left_out=[*_bad(manifest), *_left_out(lost), *emergent_remote.left_out(remote)],
        missing=_missing(config, store, records, chosen, mine),
    )


def _rows(store: RunFolder, attack: str, column: str) -> pd.DataFrame:
    """A stage's rows; without its cells a store answers with an empty table of another kind."""
    rows = store.rows([attack])
    return rows if column in rows else pd.DataFrame()


def _judges(
    store: RunFolder, records: Sequence[Mapping[str, Any]], ratings: pd.DataFrame
) -> list[Judge]:
    """Everybody who rated answers here, most answers first, the latest first of equals."""
    last: dict[tuple[str, str], str] = {}
    shows: set[tuple[str, str]] = set()
    for record in records:
        if record["description"]["attack"] == JUDGED and record["n_rows"]:
            row = store.cell_rows(record["key"]).iloc[0]
            who = (str(row["judge"]), str(row["judge_id"]))
            last[who] = max(last.get(who, ""), str(record.get("written", "")))
            if (record["description"]["settings"].get("judge") or {}).get("demonstration"):
                shows.add(who)
    names = [name for name, _ in last]
    found = []
    for (name, digest), when in last.items():
        n = int(((ratings["judge"] == name) & (ratings["judge_id"] == digest)).sum())
        found.append(
            Judge(
                name if names.count(name) == 1 else f"{name} ({digest[:8]})",
                name,
                digest,
                n,
                when,
                (name, digest) in shows,
            )
        )
    return sorted(sorted(found, key=lambda j: j.last, reverse=True), key=lambda j: -j.n)


def _chosen(judges: Sequence[Judge], wanted: str | None) -> Judge | None:
    if wanted is None:
        return judges[0] if judges else None
    found = [j for j in judges if wanted in (j.label, j.name, j.id)]
    if not found:
        known = ", ".join(j.label for j in judges) or "nobody yet"
        raise UsageError(
            f"{wanted!r} rated nothing here; there is"
            f" {known}.{did_you_mean(wanted, [j.label for j in judges])} To have it rate the stored"
            f" answers: auditgap em judge FOLDER --judge {wanted}"
        )
    return found[0]


def _of(rows: pd.DataFrame, judge: Judge | None) -> pd.DataFrame:
    if judge is None or rows.empty:
        return rows.iloc[:0]
    return rows[(rows["judge"] == judge.name) & (rows["judge_id"] == judge.id)].assign(
        judge=judge.label
    )


def _directions(
    store: RunFolder, records: Sequence[Mapping[str, Any]], judge: Judge | None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows, and vectors [L, D] by subject: between this judge's classes, or from held-out rows,
    which have no judge."""
    frames, vectors = [], {}
    for record in records:
        description = record["description"]
        settings = description["settings"]
        if description["attack"] != DIRECTIONS or settings.get("judge") not in (
            None,
            "",
            judge and judge.id,
        ):
            continue
        rows = store.cell_rows(record["key"]).sort_values("block", kind="stable")
        frames.append(rows)
        if rows["norm"].notna().any() and store.edits(record["key"]).is_file():
            vectors[str(rows["subject"].iloc[0])] = vectors_of(store, record["key"])
    return (pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()), vectors


def vectors_of(store: RunFolder, key: str) -> np.ndarray:
    """The directions [L, D] that a finished cell has found. Raises Damaged."""
    advice = f"Type: auditgap em analyse {store.place}"
    found = store.tensors(key, advice)
    if "direction" not in found:
        raise Damaged(store.edits(key), "it holds no direction", advice)
    return found["direction"]


def _panel(manifest: Any) -> list[dict[str, Any]]:
    """A line a domain of the panel's manifest: how many rows became what."""
    domains = manifest.get("domains") if isinstance(manifest, Mapping) else None
    lines = domains.items() if isinstance(domains, Mapping) else ()
    found = []
    for name, told in lines:
        source = told.get("source")
        found.append(
            {
                **told,
                "domain": name,
                "source": source.get("origin", "") if isinstance(source, Mapping) else source,
            }
        )
    return found


def _bad(manifest: Any) -> list[tuple[str, str, int]]:
    """Why rows of the domains were left out when the panel was built."""
    return [
        (f"row of {line['domain']}", str(reason), int(found["n"]))
        for line in _panel(manifest)
        if isinstance(line.get("bad"), Mapping)
        for reason, found in line["bad"].items()
    ]


def _missing(
    config: Mapping[str, Any],
    store: RunFolder,
    records: Sequence[Mapping[str, Any]],
    judge: Judge | None,
    ratings: pd.DataFrame,
) -> list[str]:
    """A sentence for each stage that is not through."""
    adapters = (
        len(config.get("domains", ())) * len(config.get("arms", ())) * len(config.get("seeds", ()))
    )
    asked = adapters + 1 + len(config.get("remote", ()))
    done = pd.Series([r["description"]["attack"] for r in records], dtype=object).value_counts()
    rated = 0 if ratings.empty else int(ratings["subject"].nunique())
    by = f" by {judge.label}" if judge else ""
    said = []
    for stage, what, n, of in (
        ("train", "adapters", int(done.get(TRAINED, 0)), adapters),
        ("generate", "models (the base is one)", int(done.get(ANSWERED, 0)), asked),
        ("judge", "models", rated, asked),
    ):
        if n < of:
            said.append(
                f"em {stage} has run{by if stage == 'judge' else ''} for {n} of {of} {what}."
            )
    keys = {r["key"] for r in records}
    planned = [
        c
        for c in store.planned()
        if c["description"]["attack"] in (MEMBERSHIP, REFERENCE, DIVERSITY, DIRECTIONS, STEERED)
    ]
    finished = sum(c["key"] in keys for c in planned)
    if not planned:
        said.append(
            "em analyse has not run: there is no membership, diversity, direction or steering to"
            " show."
        )
    elif finished < len(planned):
        said.append(f"em analyse has finished {finished} of {len(planned)} planned cells.")
    return said


def _left_out(lost: Mapping[str, pd.DataFrame]) -> list[tuple[str, str, int]]:
    found = []
    for what, rows in lost.items():
        if len(rows):
            column = "reason" if "outcome" in rows else "unscored"
            classes = (
                rows["outcome"].where(rows["outcome"] != "rated")
                if "outcome" in rows
                else pd.Series(dtype=object)
            )
            reasons = rows[column].fillna("").astype(str)
            reasons = reasons.where(reasons != "", classes) if len(classes) else reasons
            counts = reasons[reasons.notna() & (reasons != "")].value_counts()
            found += [(what, str(reason), int(n)) for reason, n in counts.items()]
    return found
