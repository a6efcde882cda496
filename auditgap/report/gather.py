"""From run folders to what a report needs: `from_store([RunFolder.load("out")], parts)` reads,
counts and joins; no layout here. Which audits there are does not matter: each brings what reads
its part.

What a run folder's `info` may hold, all of it optional: `command`, `versions` {name: version},
`machine`, `warnings`, `subjects` [{name, fingerprint, dtype, n_blocks, …}], `judge_cards` [{name,
label, task, n, kappa, …}], `reward` (its name), `refused` {reason: count}. Whatever else it holds
is shown under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pandas as pd

from auditgap.errors import AuditgapError
from auditgap.report import (
    ballots,
    correction,
    curve,
    emergent_study,
    intervene,
    strength,
    tables,
)
from auditgap.report import behaviour as asking
from auditgap.report.correction import Correction
from auditgap.report.left_out import COLUMNS as LEFT_OUT_COLUMNS
from auditgap.report.left_out import Counted
from auditgap.report.left_out import table as left_out_table
from auditgap.report.setup import find
from auditgap.report.text import is_null, short_names, shorten
from auditgap.rows import TABLE_COLUMNS, Row
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of, schema_of, to_frame

#: A page with more raw exchanges than this is no page; all of them are in the run folder.
MOST_EXCHANGES = 400

Make = Callable[[pd.DataFrame], pd.DataFrame]  #: from rows to one table
_T = TypeVar("_T")


def _empty(columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(columns=list(columns))


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report shows: values and tables, nothing to be computed. Shares are 0–1; nulls
    were not measured."""

    title: str
    subjects: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    #: `tables.audit_gaps`
    gaps: pd.DataFrame = field(default_factory=partial(_empty, tables.GAP_COLUMNS))
    lvs: pd.DataFrame = field(default_factory=partial(_empty, TABLE_COLUMNS))  #: `tables.lvs_table`
    #: `strength.strength_table`
    strength: pd.DataFrame = field(default_factory=partial(_empty, strength.COLUMNS))
    behaviour: pd.DataFrame = field(default_factory=pd.DataFrame)  #: `tables.behaviour_table`
    #: `tables.distance_table`
    distance: pd.DataFrame = field(default_factory=partial(_empty, tables.DISTANCE_COLUMNS))
    #: `tables.distance_curves`
    curves: pd.DataFrame = field(default_factory=partial(_empty, tables.CURVE_COLUMNS))
    #: `behaviour.behaviour_table`
    asked: pd.DataFrame = field(default_factory=partial(_empty, asking.COLUMNS))
    #: `behaviour.difference_table`
    differences: pd.DataFrame = field(default_factory=partial(_empty, asking.DIFFERENCE_COLUMNS))
    incomparable: str = ""  #: why there are no differences, where there might have been
    #: `ballots.judges_table`
    judges: pd.DataFrame = field(default_factory=partial(_empty, ballots.COLUMNS))
    sources: Sequence[Mapping[str, Any]] = ()  #: `suite.sources`
    n_asked: Mapping[str, int] = field(default_factory=dict)  #: prompts put to a subject, by source
    notes: Sequence[str] = ()  #: `suite.notes`
    engines: Sequence[Mapping[str, Any]] = ()  #: `suite.engines`
    sft_curve: pd.DataFrame = field(default_factory=curve.curve_empty)  #: `curve.curve_table`
    #: `curve.curve_summary`
    sft_summary: pd.DataFrame = field(default_factory=partial(_empty, curve.summary_columns()))
    probes: Sequence[pd.DataFrame] = ()  #: rows of each probe audit: one folder, one probe
    #: `intervene.interventions_table`
    interventions: pd.DataFrame = field(
        default_factory=partial(_empty, intervene.INTERVENTION_COLUMNS)
    )
    emergent: Sequence[emergent_study.Study] = ()  #: of each study of emergent misalignment
    #: by audit, of those that have no field here: their tables by name
    tables: Mapping[str, Mapping[str, pd.DataFrame]] = field(default_factory=dict)
    #: what, reason, count
    left_out: pd.DataFrame = field(default_factory=partial(_empty, LEFT_OUT_COLUMNS))
    failures: Mapping[str, str] = field(default_factory=dict)  #: cell → cause
    cards: Sequence[Mapping[str, Any]] = ()
    #: of what is judged, by task
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    reward: str | None = None
    power: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)
    exchanges: Sequence[Mapping[str, Any]] = ()  #: raw text: only with `allow_raw`
    n_exchanges: int = 0
    verdicts: Sequence[Any] = ()  #: `verdicts.verdicts`, where criteria were drawn
    limits: Sequence[tuple[str, str]] = ()  #: `verdicts.limits`
    criteria: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """What the page calls each subject."""
        return short_names(str(subject.get("name", "?")) for subject in self.subjects)


@dataclass(frozen=True, kw_only=True)
class PartData:
    """What one audit gives to a report: the data of its own sections, and what others count."""

    title: str  #: what the page is called where this audit is its first: "Behaviour of ./twin"
    is_there: bool  #: whether the folders hold anything of this audit
    values: Mapping[str, Any] = field(default_factory=dict)  #: fields of `ReportData`
    subjects: Sequence[str] = ()  #: those whom its rows name
    warnings: Sequence[str] = ()
    left_out: Sequence[Counted] = ()
    power: str = ""  #: what it could have found with so many prompts, in one sentence


#: What an audit makes of the folders, told how shares are corrected for the judge's errors, by
#: task.
Gather = Callable[[Sequence[RunFolder], Mapping[str, Correction]], PartData]


def from_store(
    folders: Sequence[RunFolder],
    parts: Sequence[Gather],
    *,
    allow_raw: bool = False,
    title: str | None = None,
) -> ReportData:
    """Read one or more run folders: `parts` is what reads them, an audit each, in the order of the
    page. Prompts and completions are read only with `allow_raw`."""
    infos = [folder.info for folder in folders]
    corrected = correction.of_runs(folders)
    found = [gather(folders, corrected) for gather in parts]
    subjects = subjects_of(folders, [name for part in found for name in part.subjects])
    kind = next((part.title for part in found if part.is_there), "Audit gap")
    warnings = _warnings(folders) + [line for part in found for line in part.warnings]
    exchanges = (
        [exchange for folder in folders for exchange in _exchanges(folder)] if allow_raw else []
    )
    return ReportData(
        title=title or _title([str(s.get("name", "?")) for s in subjects], kind),
        subjects=subjects,
        config=_merged([folder.run.get("config", {}) for folder in folders]),
        info=_merged(infos) | {"warnings": warnings, "command": _commands(folders)},
        left_out=left_out_table(infos, [one for part in found for one in part.left_out]),
        failures={
            str(record.get("cell", key)): str(record.get("cause", "no cause recorded"))
            for folder in folders
            for key, record in folder.failures().items()
        },
        cards=_cards(infos),
        corrections=corrected,
        reward=_reward(infos, folders),
        power=next((part.power for part in found if part.power), ""),
        status=_status(folders),
        exchanges=exchanges[:MOST_EXCHANGES],
        n_exchanges=len(exchanges),
        **_merged_parts(found),
    )


def _merged_parts(found: Sequence[PartData]) -> dict[str, Any]:
    """The parts' values; `tables`, which several may have, is one mapping."""
    values: dict[str, Any] = {}
    for part in found:
        tables = {**values.get("tables", {}), **part.values.get("tables", {})}
        values |= {**part.values, "tables": tables}
    return values


def _reward(infos: Sequence[Mapping[str, Any]], folders: Sequence[RunFolder]) -> str | None:
    told = [info.get("reward") for info in infos]
    told += [find(folder.run.get("config", {}), ("reward",)) for folder in folders]
    return next((str(r) for one in told if not is_null(r := _named(one))), None)


def _title(names: Sequence[str], what: str) -> str:
    if not 0 < len(names) <= 3:
        return f"{what} of {len(names) or 'no'} subject{'s' if names else ''}"
    return f"{what} of " + ", ".join(shorten(name, 60) for name in short_names(names).values())


def answers_in(
    folders: Sequence[RunFolder], attack: str, holds: Callable[[pd.DataFrame], bool]
) -> pd.DataFrame:
    """Rows of answers of all folders, a subject that several of them measured the same way once.
    `holds`: whether rows are of this kind."""
    rows = joined([folder.rows([attack]) for folder in folders])
    if not holds(rows):
        return rows.iloc[:0]
    return rows.drop_duplicates(
        ["subject", "seed", "step", "split", "prompt_id"], ignore_index=True
    )


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows below each other; empty frames have no say in the columns where others have rows."""
    filled = [frame for frame in frames if len(frame)] or list(frames[:1])
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def of_each_subject(
    folders: Sequence[RunFolder], attacks: Sequence[str], work: Callable[[pd.DataFrame], _T]
) -> dict[str, _T]:
    """`work` of each subject's rows of these attacks, those of all folders below each other, by
    name in the order of first appearance. One subject's rows are in memory at a time, so `work`
    keeps none of them: a run's tables take as much memory as its largest subject, whatever the
    number of its cells."""
    there = [(folder, folder.subjects(attacks)) for folder in folders]

    def rows(name: str) -> pd.DataFrame:
        return joined([f.rows(attacks, keys=keys[name]) for f, keys in there if name in keys])

    return {name: work(rows(name)) for name in dict.fromkeys(n for _, keys in there for n in keys)}


def tables_of(
    folders: Sequence[RunFolder], attacks: Sequence[str], make: Mapping[str, Make]
) -> dict[str, pd.DataFrame]:
    """What `make` makes of the rows of these attacks, one subject after another."""
    return stacked(of_each_subject(folders, attacks, all_of(make)), make)


def all_of(make: Mapping[str, Make]) -> Callable[[pd.DataFrame], dict[str, pd.DataFrame]]:
    """What makes every one of these tables of the same rows."""
    return lambda rows: {name: one(rows) for name, one in make.items()}


def stacked(
    found: Mapping[str, Mapping[str, pd.DataFrame]], make: Mapping[str, Make]
) -> dict[str, pd.DataFrame]:
    """The subjects' tables, which `make` made, below each other in the order of the subjects'
    names; empty ones where there is no subject."""
    if not found:
        return all_of(make)(to_frame(schema_of(Row).empty_table()))
    ordered = [made for _, made in sorted(found.items())]
    return {name: joined([made[name] for made in ordered]) for name in make}


def _merged(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of several: equal values once, values that differ side by side."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for mapping in mappings for key in mapping):
        values = [mapping[key] for mapping in mappings if key in mapping]
        different = [value for i, value in enumerate(values) if value not in values[:i]]
        merged[key] = different[0] if len(different) == 1 else different
    return merged


def _named(value: Any) -> Any:
    """A name given as text, or as a mapping with a `name`."""
    return value.get("name") if isinstance(value, Mapping) else value or None


def subjects_of(folders: Sequence[RunFolder], named: Iterable[str]) -> list[dict[str, Any]]:
    """What the runs recorded of their subjects; a subject that only the rows know has its name
    alone."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        listed = folder.info.get("subjects") or ()
        listed = (
            [{"name": k, **dict(v)} for k, v in listed.items()]
            if isinstance(listed, Mapping)
            else listed
        )
        for subject in listed:
            entry = dict(subject) if isinstance(subject, Mapping) else {"name": str(subject)}
            found.setdefault(str(entry.get("name", "?")), {}).update(entry)
    for name in named:
        found.setdefault(str(name), {"name": str(name)})
    return list(found.values())


def names_in(rows: pd.DataFrame) -> list[str]:
    """The subjects of rows, in their order."""
    return [str(name) for name in rows["subject"].unique()] if "subject" in rows else []


def _cards(infos: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every card once: a judge has one for each gold set."""
    cards = {}
    for card in (card for info in infos for card in correction.cards_in(info)):
        cards.setdefault(
            (
                str(card.get("name", "judge")),
                str(card.get("gold_set")),
                str(card.get("gold_digest")),
            ),
            dict(card),
        )
    return list(cards.values())


def _warnings(folders: Sequence[RunFolder]) -> list[str]:
    said = []
    for folder in folders:
        said += [folder.unchecked] if folder.unchecked else []
        said += list(folder.run.get("info", {}).get("warnings") or ())
        said += [
            line for session in folder.run.get("sessions", ()) for line in session.get("drift", ())
        ]
    return list(dict.fromkeys(str(line) for line in said))


def _commands(folders: Sequence[RunFolder]) -> list[str]:
    commands = [folder.run.get("info", {}).get("command") for folder in folders]
    return list(
        dict.fromkeys(" ".join(c) if isinstance(c, list) else str(c) for c in commands if c)
    )


def _status(folders: Sequence[RunFolder]) -> dict[str, Any]:
    every = [folder.status() for folder in folders]
    names = ("planned", "finished", "failed", "missing", "corrupt", "seconds")
    last = [status.last_write for status in every if status.last_write]
    return {name: sum(getattr(s, name) for s in every) for name in names} | {
        "last_write": max(last, default=None)
    }


def _exchanges(folder: RunFolder) -> list[dict[str, Any]]:
    """Raw prompts and completions of every finished cell that stored them, with where they come
    from."""
    found = []
    for record in folder.records():
        if not record.get("generations"):
            continue
        try:
            texts = rows_of(folder.generations(record["key"]))
        except AuditgapError as error:
            texts = [{"not readable": str(error)}]
        found += [{"cell": record["cell"], **text} for text in texts]
    return found
