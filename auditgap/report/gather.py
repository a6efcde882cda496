"""From run folders to what a report needs: `from_store([RunFolder.load("out")])` reads, counts and
joins; no layout here.

What a run folder's `info` may hold, all of it optional: `command`, `versions` {name: version},
`machine`, `warnings`, `subjects` [{name, fingerprint, dtype, n_blocks, …}], `judge_cards` [{name,
label, task, n, kappa, …}], `reward` (its name), `refused` {reason: count}. Whatever else it holds
is shown under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd

from auditgap.errors import AuditgapError
from auditgap.report import (
    ballots,
    correction,
    curve,
    emergent_study,
    intervene,
    strength,
    suite,
    tables,
)
from auditgap.report import behaviour as asking
from auditgap.report.correction import Correction
from auditgap.report.reading import find
from auditgap.report.text import is_null, shorten
from auditgap.stats.gap import GoldCounts
from auditgap.store import RunFolder
from auditgap.store.tables import rows_of
from auditgap.types import ATTACKS, CLEAN, TABLE_COLUMNS, Label

#: The attack name of cells that hold minimum distances.
DISTANCE = "distance"
#: The attack names of cells whose rows say how a subject behaved when it was only asked.
SFT_CURVE, ASKED = "sft_curve", "behaviour"
#: The attack name of cells whose rows are a fixed probe's logits.
PROBE = "probe"
#: A page with more raw exchanges than this is no page; all of them are in the run folder.
MOST_EXCHANGES = 400

#: Reasons of judges and engines that need more words than they have.
_REASONS: Mapping[str, str] = {
    ballots.TIE: "tie: as many judges said harmful as not",
    "empty": "empty: nothing was answered, so there was nothing to judge",
    "judge_refused": "judge_refused: the judge would not grade it",
    "prompt_too_long": "prompt_too_long: no room for the answer in the judge’s window",
    "too_long": "too_long: the prompt does not fit the subject’s window",
}

LEFT_OUT_COLUMNS: tuple[str, ...] = ("what", "reason", "count")


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


def from_store(
    folders: Sequence[RunFolder],
    *,
    allow_raw: bool = False,
    title: str | None = None,
    emergent: Sequence[emergent_study.Study] | None = None,
) -> ReportData:
    """Read one or more run folders. Prompts and completions are read only with `allow_raw`.
    `emergent`: what is read already."""
    rows = _joined([folder.rows([*ATTACKS, CLEAN]) for folder in folders])
    distances = _joined([folder.rows([DISTANCE]) for folder in folders])
    trained = _behaved(folders, SFT_CURVE, curve.has_curve)
    asked = _behaved(folders, ASKED, asking.asked)
    intervened = _joined(
        [
            part
            for part in (folder.rows([intervene.INTERVENE]) for folder in folders)
            if "intervention" in part
        ]
    )
    studies = (
        emergent
        if emergent is not None
        else [emergent_study.read(f) for f in folders if emergent_study.is_study(f)]
    )
    incomparable, engines = _incomparable(folders), suite.engines(folders)
    infos = [folder.run.get("info", {}) for folder in folders]
    subjects = _subjects(
        infos,
        pd.concat(
            [part["subject"] for part in (rows, trained, asked) if "subject" in part]
        ).to_frame(),
    )
    sources = suite.sources(folders)
    asked = _ordered(
        _ordered(asked, "source", [s["source"] for s in sources]),
        "subject",
        [s["name"] for s in subjects],
    )
    summary = curve.curve_summary(trained, base=_base(folders), thresholds=_thresholds(folders))
    corrected = correction.of_runs(folders)
    counts = corrected["harmful"].counts
    gaps = tables.audit_gaps(rows, gold=None if counts is None else GoldCounts(*counts))
    # without distance cells the store answers with an empty table of Rows
    measured = "distance" in distances.columns
    exchanges = (
        [exchange for folder in folders for exchange in _exchanges(folder)] if allow_raw else []
    )
    only = not (len(rows) or len(trained) or len(distances))
    kind = (
        "Behaviour"
        if only and len(asked)
        else "Interventions"
        if only and len(intervened)
        else "Audit gap"
    )
    if only and studies and not (len(asked) or len(intervened)):
        kind = "Emergent misalignment"
    apart: dict[str, Any] = {}
    if measured:
        apart = {
            "distance": tables.distance_table(distances),
            "curves": tables.distance_curves(distances),
        }
    return ReportData(
        title=title or _title([str(s.get("name", "?")) for s in subjects], kind),
        subjects=subjects,
        config=_merged([folder.run.get("config", {}) for folder in folders]),
        info=_merged(infos)
        | {
            "warnings": _warnings(folders) + suite.parity_warnings(engines),
            "command": _commands(folders),
        },
        gaps=gaps,
        lvs=tables.lvs_table(rows, correction=corrected["harmful"]),
        strength=strength.strength_table(folders),
        behaviour=tables.behaviour_table(rows),
        **apart,
        asked=asking.behaviour_table(asked, corrected),
        differences=asking.difference_table(asked.iloc[:0] if incomparable else asked),
        incomparable=incomparable if "subject" in asked and asked["subject"].nunique() > 1 else "",
        judges=ballots.judges_table(asked),
        sources=sources,
        n_asked={str(k): int(n) for k, n in asked.groupby("source")["prompt_id"].nunique().items()}
        if "source" in asked
        else {},
        notes=suite.notes(folders),
        engines=engines,
        sft_curve=curve.curve_table(trained),
        sft_summary=summary,
        probes=[
            part for part in (folder.rows([PROBE]) for folder in folders) if "example_id" in part
        ],
        interventions=intervene.interventions_table(intervened, correction=corrected["harmful"]),
        emergent=studies,
        left_out=left_out(
            rows,
            infos,
            {
                "answer between steps of harmful fine-tuning": trained,
                "answer when asked": asked,
                "answer in the intervention audit": intervened,
            },
            [entry for study in studies for entry in study.left_out],
        ),
        failures={
            str(record.get("cell", key)): str(record.get("cause", "no cause recorded"))
            for folder in folders
            for key, record in folder.failures().items()
        },
        cards=_cards(infos),
        corrections=corrected,
        reward=next(
            (str(r) for info in infos if not is_null(r := _named(info.get("reward")))), None
        )
        or next(
            (
                str(r)
                for folder in folders
                if not is_null(r := _named(find(folder.run.get("config", {}), ("reward",))))
            ),
            None,
        ),
        power=_power(gaps) or _power(summary),
        status=_status(folders),
        exchanges=exchanges[:MOST_EXCHANGES],
        n_exchanges=len(exchanges),
    )


def _behaved(
    folders: Sequence[RunFolder], attack: str, holds: Callable[[pd.DataFrame], bool]
) -> pd.DataFrame:
    """Rows of behaviour of all folders, a subject that several of them measured the same way
    once."""
    rows = _joined([folder.rows([attack]) for folder in folders])
    if not holds(rows):
        return rows.iloc[:0]
    return rows.drop_duplicates(
        ["subject", "seed", "step", "split", "prompt_id"], ignore_index=True
    )


def _ordered(rows: pd.DataFrame, column: str, names: Iterable[str]) -> pd.DataFrame:
    """The rows with the values of `column` in the order in which a run named them, which the store
    does not keep."""
    places: dict[Any, int] = {name: i for i, name in enumerate(names)}
    if column not in rows:
        return rows
    return rows.sort_values(
        column,
        key=lambda c: c.map(lambda v: places.get(v, len(places))),
        kind="stable",
        ignore_index=True,
    )


def _incomparable(folders: Sequence[RunFolder]) -> str:
    """Why subjects of these runs of behaviour cannot be set against each other; "" where they
    can."""
    configs = [folder.run.get("config", {}) for folder in folders]
    configs = [config for config in configs if config.get("audit") == ASKED]
    for key, how in (
        ("scorers", "judged by different judges"),
        ("max_new_tokens", "given different lengths to answer in"),
    ):
        if any(config.get(key) != configs[0].get(key) for config in configs):
            return f"These subjects were {how}, so no difference between them is shown."
    return ""


def _base(folders: Sequence[RunFolder]) -> str | None:
    """The base of the curves; None when there is none, or folders disagree about it."""
    named = {folder.run.get("config", {}).get("base") for folder in folders} - {None}
    return named.pop() if len(named) == 1 else None


def _thresholds(folders: Sequence[RunFolder]) -> tuple[float, ...]:
    found = {
        float(t) for folder in folders for t in folder.run.get("config", {}).get("thresholds") or ()
    }
    return tuple(sorted(found)) or curve.THRESHOLDS


def _title(names: Sequence[str], what: str) -> str:
    if not 0 < len(names) <= 3:
        return f"{what} of {len(names) or 'no'} subject{'s' if names else ''}"
    return f"{what} of " + ", ".join(shorten(name, 60) for name in names)


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    filled = [frame for frame in frames if len(frame)] or list(frames[:1])
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


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


def _subjects(infos: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """What the runs recorded of their subjects; a subject that only the rows know has its name
    alone."""
    found: dict[str, dict[str, Any]] = {}
    for info in infos:
        listed = info.get("subjects") or ()
        listed = (
            [{"name": k, **dict(v)} for k, v in listed.items()]
            if isinstance(listed, Mapping)
            else listed
        )
        for subject in listed:
            entry = dict(subject) if isinstance(subject, Mapping) else {"name": str(subject)}
            found.setdefault(str(entry.get("name", "?")), {}).update(entry)
    for name in rows["subject"].unique() if "subject" in rows else ():
        found.setdefault(str(name), {"name": str(name)})
    return list(found.values())


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


def _power(gaps: pd.DataFrame) -> str:
    """The power sentence for the scored prompts and the clean harmful share of the first subject
    that has both."""
    for row in rows_of(gaps):
        if not is_null(row["safety"]) and row["n"] >= 1:
            return tables.power_line(int(row["n"]), 1.0 - float(row["safety"]))
    return ""


def _status(folders: Sequence[RunFolder]) -> dict[str, Any]:
    every = [folder.status() for folder in folders]
    names = ("planned", "finished", "failed", "missing", "corrupt", "seconds")
    last = [status.last_write for status in every if status.last_write]
    return {name: sum(getattr(s, name) for s in every) for name in names} | {
        "last_write": max(last, default=None)
    }


def left_out(
    rows: pd.DataFrame,
    infos: Sequence[Mapping[str, Any]] = (),
    asked: Mapping[str, pd.DataFrame] | None = None,
    more: Sequence[tuple[str, str, int]] = (),
) -> pd.DataFrame:
    """Counts of what could not be told or must be read with care, by reason: one row each, most
    frequent first."""
    found: dict[tuple[str, str], int] = {}

    def count(what: str, reason: Any, by: int = 1) -> None:
        if not is_null(reason) and str(reason).strip() and by:
            key = (what, str(reason).strip())
            found[key] = found.get(key, 0) + int(by)

    for info in infos:
        for reason, number in (info.get("refused") or {}).items():
            count("prompt refused before the run", reason, number)
    if len(rows):
        for reason, number in rows["unscored"].value_counts().items():
            count("LVS unscored", reason, number)
        nameless = (
            rows["lvs"].isna() & (rows["attack"] != CLEAN) & (rows["unscored"].fillna("") == "")
        )
        count("LVS unscored", "no reason recorded", int(nameless.sum()))
        edited = rows[rows["attack"] != CLEAN]
        for what, part, column in (
            ("answer with no edit", rows[rows["attack"] == CLEAN], "verdict_clean"),
            ("edited answer", edited, "verdict_edited"),
        ):
            for label in (Label.BROKEN, Label.UNSCORED):
                count(what, str(label), int((part[column] == label).sum()))
        for flags, number in edited["flags"].value_counts().items():
            for flag in str(flags).split():
                count("edit flagged", flag, number)
    for what, part in (asked or {}).items():
        if len(part):
            count(what, str(Label.BROKEN), int((part["verdict"] == Label.BROKEN).sum()))
            for reason, number in part["unscored"].value_counts().items():
                count(f"{what}, unscored", _REASONS.get(str(reason), str(reason)), number)
    for what, reason, number in more:
        count(what, _REASONS.get(reason, reason), number)
    entries = [
        {"what": what, "reason": reason, "count": number}
        for (what, reason), number in found.items()
    ]
    entries.sort(key=lambda e: (e["what"], -e["count"], e["reason"]))
    return pd.DataFrame(entries, columns=list(LEFT_OUT_COLUMNS))


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
