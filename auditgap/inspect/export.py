"""A finished run as an inspect_ai log: `inspect view` opens it, and `read_eval_log` and data frames
of logs read it.

    write_log(RunFolder.load("runs/smollm2"), "logs/smollm2.eval")
    # with the texts, mode 0600
    write_log(RunFolder.load("runs/pair"), "logs/tuned.json", subject="./tuned", allow_raw=True)

One sample is one prompt of one cell (`targeted block15 0.03 rms 9c1e…`), its epochs are the draws
of a random control, its metadata the row as it is stored. What could not be told is NaN, which
inspect counts and leaves out of every mean. Metrics are the run's own tables: estimates with
Wilson's or bootstrap intervals (`…_lo`, `…_hi`), NaN where undefined, not means that inspect has
taken.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from auditgap.errors import UsageError, did_you_mean
from auditgap.inspect import MISSING, VERDICT, values
from auditgap.report import behaviour, tables
from auditgap.report.text import clean, is_null, without_secrets
from auditgap.store import RunFolder, files
from auditgap.store.tables import rows_of
from auditgap.types import ATTACKS, CLEAN, digest

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalScore
    from inspect_ai.scorer import Score

#: Stands where a text would; inspect shows it as the sample's input and output.
WITHHELD = (
    "[text withheld: written without --allow-raw, which puts prompts and completions into the log]"
)
NO_TEXT = "[no text: the run has none stored for this prompt]"
#: Columns that are whole numbers where they are not null; pandas keeps such columns as floats.
_WHOLE = ("layer_index", "seed", "step")


def write_log(
    store: RunFolder, path: str | Path, *, subject: str | None = None, allow_raw: bool = False
) -> Path:
    """Write the finished cells of one subject as `path` (.eval or .json), whole or not at all, and
    return the path.

    `subject`: its name in the run; may be left out where there is one, because an inspect log is
    the log of one model. Without `allow_raw` the log holds ids, numbers and verdicts and no prompt
    or completion; with it, its mode is 0600. The same run gives the same log, ids and times
    included. Raises UsageError: inspect_ai absent, another suffix, another kind of run, nothing
    finished, no such subject; DiskError.
    """
    path = Path(path)
    if path.suffix not in (".eval", ".json"):
        raise UsageError(
            f"An inspect log ends in .eval or .json; {path.name!r} came. For example:"
            f" logs/{path.stem or 'run'}.eval"
        )
    if path.is_dir() or path.parent.is_file():
        raise UsageError(
            f"{path if path.is_dir() else path.parent} is in the way of the log; give the name of a"
            " new file."
        )
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise UsageError(MISSING) from error
    log = _log(store, _the_subject(store, subject), allow_raw)
    # inspect writes by name, so it writes into a folder of ours (0700), and what reaches `path` is
    # whole and has our mode
    with files.disk_errors(path), tempfile.TemporaryDirectory(prefix="auditgap-") as folder:
        written = Path(folder) / f"log{path.suffix}"
        write_eval_log(log, written)  # in the form that the suffix says
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, written.read_bytes(), files.PRIVATE if allow_raw else 0o666)
    return path


@dataclass(frozen=True)
class _Kind:
    """How one kind of run becomes a log: its cells' attacks, a row's name and scores, and the
    tables that are its results."""

    attacks: tuple[str, ...]
    where: Callable[[Mapping[str, Any]], str]
    scores: Callable[[Mapping[str, Any]], dict[str, Score]]
    results: Callable[[pd.DataFrame], Iterator[EvalScore]]


def _log(store: RunFolder, subject: str, allow_raw: bool) -> EvalLog:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, EvalStats

    config, info = store.run["config"], store.info
    kind = _kind(store)
    rows = store.rows(kind.attacks)
    rows = rows[rows["subject"] == subject] if "subject" in rows else rows
    if not len(rows):
        raise UsageError(
            f"Nothing of {subject} is finished in {store.path}; run the command that made the"
            " folder first."
        )
    samples = list(_samples(store, subject, kind, allow_raw))
    identity = digest([config, subject, allow_raw])
    sessions, status = store.run.get("sessions", []), store.status()
    started: Any = sessions[0]["started"] if sessions else status.last_write
    ended: Any = status.last_write or started
    facts = next(
        (dict(s) for s in info.get("subjects", ()) if s.get("name") == subject), {"name": subject}
    )
    about = {
        "written_by": "auditgap",
        "subject": facts,
        "texts": "included" if allow_raw else "withheld",
        "cells": {"planned": status.planned, "finished": status.finished, "failed": status.failed},
        **{name: value for name, value in info.items() if name not in ("subjects", "versions")},
    }
    name = config.get("prompts") or config.get("suite")
    return EvalLog(
        status="success" if status.finished >= status.planned else "cancelled",
        eval=EvalSpec(
            eval_id=identity,
            run_id=identity,
            task_id=digest(config),
            created=started,
            task=f"auditgap/{config['audit']}",
            task_args=_safe(config),
            model=f"auditgap/{clean(subject)}",
            dataset=EvalDataset(
                name=clean(name) if isinstance(name, str) else None,
                samples=rows["prompt_id"].nunique(),
                sample_ids=list(dict.fromkeys(sample.id for sample in samples)),
                shuffled=False,
            ),
            config=EvalConfig(epochs=max(sample.epoch for sample in samples)),
            packages={str(k): str(v) for k, v in info.get("versions", {}).items()},
            metadata=_safe(about),
        ),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=list(kind.results(rows)),
        ),
        stats=EvalStats(started_at=started, completed_at=ended),
        samples=samples,
    )


def _kind(store: RunFolder) -> _Kind:
    audit = store.run["config"].get("audit")
    if audit not in KINDS:
        raise UsageError(
            f"{store.path} is the folder of {audit or 'a training run'}; a log is written of"
            f" {' or '.join(KINDS)}."
        )
    return KINDS[audit]


def _the_subject(store: RunFolder, name: str | None) -> str:
    """The subject that was asked for, or the only one."""
    rows = store.rows(_kind(store).attacks)
    known = sorted(rows["subject"].unique()) if len(rows) else []
    if name in known:
        return str(name)
    if name is None and len(known) == 1:
        return str(known[0])
    if not known:
        raise UsageError(
            f"No cell is finished in {store.path}; run the command that made the folder first."
        )
    listed = ", ".join(map(str, known))
    if name is None:
        raise UsageError(
            f"The run has {len(known)} subjects ({listed}) and an inspect log holds one model: name"
            " one of them."
        )
    raise UsageError(
        f"The run has no subject {name!r}; it has {listed}.{did_you_mean(name, known)}"
    )


def _safe(value: Any) -> Any:
    """JSON without secrets, terminal escapes and lone surrogates, at every depth."""
    if isinstance(value, Mapping):
        return {clean(key): _safe(inner) for key, inner in without_secrets(value).items()}
    if isinstance(value, (list, tuple)):
        return [_safe(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value


# -- samples
# -----------------------------------------------------------------------------------------------------------


def _samples(store: RunFolder, subject: str, kind: _Kind, allow_raw: bool) -> Iterator[EvalSample]:
    for record in store.records():
        if record["description"]["attack"] not in kind.attacks:
            continue
        rows = [row for row in _rows(store.cell_rows(record["key"])) if row["subject"] == subject]
        texts = _texts(store, record) if allow_raw and rows else {}
        for row in rows:
            place = row["prompt_id"], row.get("draw", 0)
            yield _sample(
                row,
                kind,
                subject,
                texts.get(place, (NO_TEXT, NO_TEXT)) if allow_raw else (WITHHELD, WITHHELD),
            )


def _sample(row: dict[str, Any], kind: _Kind, subject: str, texts: tuple[str, str]) -> EvalSample:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        ChatMessageUser,
        ModelOutput,
    )

    prompt, completion = texts
    where, epoch = kind.where(row), row.get("draw", 0) + 1
    name = f"{where} {row['prompt_id']}"
    ids = [digest([subject, name, epoch, part], 22) for part in ("sample", "user", "assistant")]
    model = f"auditgap/{clean(subject)}"
    answer = ChatMessageAssistant(id=ids[2], content=completion, model=model)
    return EvalSample(
        id=name,
        epoch=epoch,
        input=prompt,
        target="",
        uuid=ids[0],
        scores=kind.scores(row),
        messages=[ChatMessageUser(id=ids[1], content=prompt), answer],
        output=ModelOutput(
            model=model, choices=[ChatCompletionChoice(message=answer, stop_reason="unknown")]
        ),
        metadata=_safe(
            {"cell": where, **{name: value for name, value in row.items() if name != "subject"}}
        ),
    )


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values: null is None, whole numbers are whole."""
    records = rows_of(frame, plain=True)
    return [
        {k: int(v) if k in _WHOLE and v is not None else v for k, v in record.items()}
        for record in records
    ]


def _texts(store: RunFolder, record: Mapping[str, Any]) -> dict[tuple[str, int], tuple[str, str]]:
    """(prompt id, draw) -> prompt, completion; a lone surrogate, which JSON in UTF-8 cannot hold,
    as its escape."""
    if not record.get("generations"):
        return {}

    def whole(text: Any) -> str:
        return (
            NO_TEXT
            if is_null(text)
            else str(text).encode("utf-8", "backslashreplace").decode("utf-8")
        )

    found = rows_of(store.generations(record["key"]))
    return {
        (t["prompt_id"], int(t.get("draw") or 0)): (whole(t["prompt"]), whole(t["completion"]))
        for t in found
    }


def _verdict(label: str, refused: bool | None, reason: str) -> Score:
    from inspect_ai.scorer import Score

    return Score(value=values(label, refused), answer=label, reason=reason or None)


# -- results
# -----------------------------------------------------------------------------------------------------------


def _score(
    name: str, row: Mapping[str, Any], leave: Sequence[str], n: int, n_unscored: int, **about: Any
) -> EvalScore:
    """One line of a table as inspect's results: every number but `leave` a metric, NaN where the
    table has none."""
    from inspect_ai.log import EvalMetric, EvalScore

    metrics = {}
    for column, value in row.items():
        if column not in leave:
            number = math.nan if is_null(value) else float(value)
            metrics[str(column)] = EvalMetric(name=str(column), value=number)
    return EvalScore(
        name=name,
        scorer=VERDICT,
        scored_samples=n - n_unscored,
        unscored_samples=n_unscored,
        metrics=metrics,
        metadata={name: value for name, value in about.items() if not is_null(value)} or None,
    )


def _where(row: Mapping[str, Any]) -> str:
    if row["attack"] == CLEAN:
        return CLEAN
    return f"{row['attack']} {row['site']} {row['eps']:g} {row['unit']}"


def _latent_scores(row: Mapping[str, Any]) -> dict[str, Score]:
    from inspect_ai.scorer import Score

    is_clean = row["attack"] == CLEAN
    label = row["verdict_clean" if is_clean else "verdict_edited"] or "unscored"
    scores = {VERDICT: _verdict(label, None, row["unscored"] if label == "unscored" else "")}
    if not is_clean:
        told = row["lvs"] is not None
        scores["lvs"] = (
            Score(value=row["lvs"])
            if told
            else Score.unscored(reason=row["unscored"] or "no reason recorded")
        )
    return scores


def _latent_results(rows: pd.DataFrame) -> Iterator[EvalScore]:
    """The audit gap first, as in the report, then what was said with no edit, then every cell."""
    for row in rows_of(tables.audit_gaps(rows)):
        name = f"audit gap at {row['eps']:g} {row['unit']}"
        kept = ("subject", "unit", "eps", "worst_site", "n", "n_unscored")
        n = row["n"] + row["n_unscored"]
        # inspect takes the first metric of all as the headline
        gap = {end: row[end] for end in ("gap", "gap_lo", "gap_hi")}
        yield _score(name, gap | row, kept, n, row["n_unscored"], worst_site=row["worst_site"])
    for row in rows_of(tables.behaviour_table(rows)):
        yield _score(CLEAN, row, ("subject", "n", "unscored"), row["n"], row["unscored"])
    for row in rows_of(tables.lvs_table(rows)):
        yield _score(
            _where(row),
            row,
            (*tables.CELL, "flag", "n", "n_unscored"),
            row["n"],
            row["n_unscored"],
            flag=row["flag"],
        )


def _asked_where(row: Mapping[str, Any]) -> str:
    return f"{row['kind']} {row['source']}"


def _asked_scores(row: Mapping[str, Any]) -> dict[str, Score]:
    return {VERDICT: _verdict(row["verdict"], row["refused"], row["unscored"])}


def _asked_results(rows: pd.DataFrame) -> Iterator[EvalScore]:
    for row in rows_of(behaviour.behaviour_table(rows)):
        n, n_unscored = int(row["n"]), int(row["n_unscored"])
        yield _score(
            _asked_where(row), row, ("subject", "kind", "source", "n", "n_unscored"), n, n_unscored
        )


#: The runs that can be written, by the audit's name in the run's config.
KINDS: Mapping[str, _Kind] = {
    "latent": _Kind((CLEAN, *ATTACKS), _where, _latent_scores, _latent_results),
    "behaviour": _Kind(("behaviour",), _asked_where, _asked_scores, _asked_results),
}
