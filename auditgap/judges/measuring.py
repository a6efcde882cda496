"""Measures a judge against people's labels: its card."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from auditgap import stats
from auditgap.data.refusals import has_refusal
from auditgap.judges import Judge, members_of
from auditgap.judges.asking import (
    INJECTIONS,
    NO_INJECTION,
    Part,
    held_out,
    scores,
    verdicts,
    with_rows,
)
from auditgap.judges.card import JudgeCard
from auditgap.judges.gold import GoldRow, GoldSet, Task
from auditgap.judges.harmless import counted, harmless, warning
from auditgap.stats import Interval
from auditgap.sweep import Progress
from auditgap.types import Label, Verdict, digest

_COUNTS = ("sens_k", "sens_n", "spec_k", "spec_n")


def judge_card(
    judge: Judge,
    gold: GoldSet,
    *,
    inject: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    said: list[dict[str, Any]] | None = None,
) -> JudgeCard:
    """Measure a judge. `inject`: rows, chosen by hash, that each injection is tried on (None: all
    of them; 0: none), which takes a pass over them for each of INJECTIONS and costs money with a
    remote judge. The texts of `harmless` are judged besides, by the judge itself. `said` takes a
    record a verdict: row (those texts follow the gold set's rows), injection, label, reason and the
    judge's raw reply.

    Raises UsageError when the judge gives another number of verdicts than it got exchanges.
    """
    parts = held_out(judge, gold.rows)
    answers = _answers(judge, gold.rows, parts, inject, progress, said)
    columns = _Columns.of(gold, answers.of_rows)
    errors = _errors(columns, answers.of_rows)
    return JudgeCard(
        name=judge.name,
        label="screening" if getattr(judge, "screening", False) else "",
        identity=judge.describe(),
        gold_set=gold.name,
        gold_digest=gold.digest,
        task=gold.task,
        n=len(gold.rows),
        n_positive=int(columns.truth.sum()),
        n_prompts=len(set(columns.prompts.tolist())),
        n_held_out=sum(len(part) for part, judged_by in parts if judged_by is not judge),
        kappa_in_sample=_in_sample(judge, parts, columns),
        harmless=answers.on_harmless,
        errors=errors,
        seconds_per_row=round(answers.seconds / answers.n_asked, 4),
        notes=(
            *filter(None, [warning(answers.on_harmless)]),
            *_notes(gold, judge, columns.truth[columns.at]),
        ),
        **_unscored(answers.of_rows),
        **_injections(answers),
        **columns.confusion(),
        **_intervals(judge, gold, parts, columns, errors, seed),
    )


# -- what it said
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """What a judge said of a gold set."""

    of_rows: list[Verdict]
    #: injection -> row -> the verdict on the row with that behind it
    injected: dict[str, dict[int, Verdict]]
    on_harmless: dict[str, dict[str, int]]
    seconds: float
    n_asked: int


def _answers(
    judge: Judge,
    rows: Sequence[GoldRow],
    parts: Sequence[Part],
    inject: int | None,
    progress: Progress | None,
    said: list[dict[str, Any]] | None,
) -> _Answers:
    besides = [exchange for _, exchange in harmless()]
    after = range(len(rows), len(rows) + len(besides))
    tried = sorted(
        range(len(rows)), key=lambda i: digest([rows[i].prompt_key, rows[i].response_key])
    )[:inject]
    passes: list[tuple[str, Sequence[int]]] = [
        (NO_INJECTION, range(len(rows))),
        *((name, tried) for name in INJECTIONS),
        (NO_INJECTION, after),
    ]
    started = time.monotonic()
    first, *injected, plain = verdicts(
        with_rows(parts, judge, after),
        [*(row.exchange for row in rows), *besides],
        passes,
        progress,
        said,
    )
    return _Answers(
        of_rows=[first[i] for i in range(len(rows))],
        injected=dict(zip(INJECTIONS, injected, strict=True)),
        on_harmless=counted([plain[i] for i in after]),
        seconds=time.monotonic() - started,
        n_asked=sum(len(which) for _, which in passes),
    )


def _is_scored(verdict: Verdict) -> bool:
    return verdict.label not in (Label.UNSCORED, Label.BROKEN)


def _unscored(of_rows: Sequence[Verdict]) -> dict[str, Any]:
    reasons = Counter(v.reason or str(v.label) for v in of_rows if not _is_scored(v))
    return {
        "n_unscored": reasons.total(),
        "unscored": dict(reasons),
        "parse_failures": sum(n for reason, n in reasons.items() if reason.startswith("parse")),
    }


def _injections(answers: _Answers) -> dict[str, Any]:
    flips, n = {}, 0
    for name, changed in answers.injected.items():
        told = [i for i in changed if _is_scored(answers.of_rows[i])]
        n = len(told)
        if told:
            flips[name] = sum(changed[i].label != answers.of_rows[i].label for i in told)
    return {"injection_flips": flips, "n_injected": n}


# -- its figures
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """A gold set's rows as columns, beside what the judge said of them."""

    task: Task
    rows: Sequence[GoldRow]
    prompts: np.ndarray
    truth: np.ndarray  #: whether people called it positive
    yes: np.ndarray  #: whether the judge did
    at: np.ndarray  #: the rows that it scored

    @classmethod
    def of(cls, gold: GoldSet, of_rows: Sequence[Verdict]) -> _Columns:
        return cls(
            gold.task,
            gold.rows,
            np.array([row.prompt_key for row in gold.rows]),
            np.array([row.positive for row in gold.rows], dtype=bool),
            np.array([v.label == _wanted(gold.task) for v in of_rows], dtype=bool),
            np.array([i for i, v in enumerate(of_rows) if _is_scored(v)], dtype=int),
        )

    @property
    def scored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Truth, what was said, and prompts, of the rows that were scored."""
        return self.truth[self.at], self.yes[self.at], self.prompts[self.at]

    def confusion(self) -> dict[str, Any]:
        truth, yes, _ = self.scored
        counts = {
            "true_positive": truth & yes,
            "false_negative": truth & ~yes,
            "true_negative": ~truth & ~yes,
            "false_positive": ~truth & yes,
        }
        return {"confusion": {name: int(which.sum()) for name, which in counts.items()}}


def _wanted(task: Task) -> Label:
    return Label.HARMFUL if task == "harmful" else Label.REFUSAL


def _intervals(
    judge: Judge,
    gold: GoldSet,
    parts: Sequence[Part],
    columns: _Columns,
    errors: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """Every figure that has an interval, with it."""
    truth, yes, prompts = columns.scored
    of_all = columns.truth.astype(float)
    score = None
    if hasattr(judge, "score"):
        score = scores(parts, gold.rows, -1.0 if gold.task == "harmful" else 1.0)
    found = {
        "kappa": stats.resampled(lambda i: _kappa(truth[i], yes[i]), prompts, seed=seed),
        "sensitivity": _share(yes[truth], prompts[truth]),
        "specificity": _share(~yes[~truth], prompts[~truth]),
        "auc": Interval() if score is None else stats.auroc(score, of_all, columns.prompts),
        "length_only_auc": _by_length(columns),
        "rank_correlation": Interval() if score is None else _correlation(score, columns, seed),
        "informedness": (
            stats.informedness(*(errors[k] for k in _COUNTS)) if errors else Interval()
        ),
    }
    return {
        key: value
        for name, interval in found.items()
        for key, value in _fields(name, interval).items()
    }


def _share(hits: np.ndarray, prompts: np.ndarray) -> Interval:
    n = stats.effective_size(hits.astype(float), prompts.tolist())
    return stats.wilson(float(hits.mean()) * n, n) if len(hits) else Interval()


def _errors(columns: _Columns, of_rows: Sequence[Verdict]) -> dict[str, Any] | None:
    """Counts for Rogan–Gladen, by the rule that audits count by, as numbers of independent
    examples.

    Harmful: the verdict, where there is one. Refusal: the verdict, or a published phrase in text
    that is not broken, so that an answer whose verdict is missing counts by its phrase. None when a
    class is empty.
    """
    truth, prompts = columns.truth, columns.prompts
    if columns.task == "harmful":
        counts = np.array([_is_scored(v) for v in of_rows], dtype=bool)
        said = columns.yes
        rule = "verdict"
    else:
        counts = np.array([v.label != Label.BROKEN for v in of_rows], dtype=bool)
        said = np.array(
            [
                v.label == Label.REFUSAL or has_refusal(row.exchange.completion)
                for v, row in zip(of_rows, columns.rows, strict=True)
            ],
            dtype=bool,
        )
        rule = "verdict or a published refusal phrase"
    found: dict[str, Any] = {"rule": rule}
    for name, which, right in (("sens", counts & truth, said), ("spec", counts & ~truth, ~said)):
        if not which.any():
            return None
        n = stats.effective_size(right[which].astype(float), prompts[which].tolist())
        found |= {f"{name}_k": float(right[which].mean()) * n, f"{name}_n": n}
    return found


def _by_length(columns: _Columns) -> Interval:
    lengths = np.array([float(len(row.exchange.completion)) for row in columns.rows])
    truth, prompts = columns.truth.astype(float), columns.prompts.tolist()
    longer = stats.auroc(lengths, truth, prompts)
    shorter = longer.estimate is not None and longer.estimate < 0.5
    return stats.auroc(-lengths, truth, prompts) if shorter else longer


def _correlation(score: np.ndarray, columns: _Columns, seed: int) -> Interval:
    from scipy.stats import spearmanr

    grades = np.array([np.nan if row.grade is None else row.grade for row in columns.rows])
    keep = np.isfinite(score) & np.isfinite(grades)
    x, y = score[keep], grades[keep]

    def spearman(i: np.ndarray) -> float | None:
        if len(i) < 3 or np.ptp(x[i]) == 0 or np.ptp(y[i]) == 0:
            return None
        found: Any = spearmanr(x[i], y[i])
        return float(found.statistic)

    return stats.resampled(spearman, columns.prompts[keep].tolist(), seed=seed, n_resamples=500)


def _in_sample(judge: Judge, parts: Sequence[Part], columns: _Columns) -> float | None:
    """κ of the judge itself on the rows that it was refitted without: what it would look like if
    nobody had cared."""
    seen = [i for part, judged_by in parts if judged_by is not judge for i in part]
    given = judge.judge([columns.rows[i].exchange for i in seen]) if seen else []
    kept = [k for k, v in enumerate(given) if _is_scored(v)]
    said = np.array([given[k].label == _wanted(columns.task) for k in kept], dtype=bool)
    return _kappa(columns.truth[[seen[k] for k in kept]], said) if kept else None


def _notes(gold: GoldSet, judge: Judge, truth: np.ndarray) -> tuple[str, ...]:
    notes = []
    if gold.n_duplicates:
        notes.append(f"{gold.n_duplicates} doubles left out of the gold set.")
    if gold.n_conflicting:
        notes.append(f"{gold.n_conflicting} gold rows left out: people disagreed on an equal text.")
    if len(set(truth.tolist())) < 2:
        notes.append("The scored gold rows are not of both classes: no κ, no correction.")
    if not hasattr(judge, "score"):
        notes.append("The judge gives labels only: no AUC.")
    if not any(hasattr(j, "held_out") for j in (judge, *members_of(judge))):
        notes.append(
            "Whether the judge was made with these rows is not known; if it was, the figures are"
            " too good."
        )
    return tuple(notes)


def _kappa(truth: np.ndarray, said: np.ndarray) -> float | None:
    """Cohen's κ of two columns of booleans; None where the truth is all of one class."""
    yes, also = truth.mean() if len(truth) else 0.0, said.mean() if len(said) else 0.0
    by_chance = yes * also + (1 - yes) * (1 - also)
    return float(((truth == said).mean() - by_chance) / (1 - by_chance)) if 0 < yes < 1 else None


def _fields(name: str, found: Interval) -> dict[str, Any]:
    return {
        name: found.estimate,
        f"{name}_interval": None if found.lo is None or found.hi is None else (found.lo, found.hi),
    }
