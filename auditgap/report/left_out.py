"""What could not be told or must be read with care, counted by reason.

table(infos, [*of_answers("answer when asked", rows), *of_edits(rows)])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from auditgap.report import ballots
from auditgap.report.text import is_null
from auditgap.types import CLEAN, Label

COLUMNS: tuple[str, ...] = ("what", "reason", "count")
#: What was lost, why, how often.
Counted = tuple[str, str, int]

#: Reasons of judges and engines that need more words than they have.
_REASONS: Mapping[str, str] = {
    ballots.TIE: "tie: as many judges said harmful as not",
    "empty": "empty: nothing was answered, so there was nothing to judge",
    "judge_refused": "judge_refused: the judge would not grade it",
    "prompt_too_long": "prompt_too_long: no room for the answer in the judge’s window",
    "unfinished": "unfinished: the chain of thought never ended, so there was no answer to judge",
    "too_long": "too_long: the prompt does not fit the subject’s window",
}


def explained(reason: str) -> str:
    """A judge's or engine's reason, with more words where it needs them."""
    return _REASONS.get(reason, reason)


def of_answers(what: str, rows: pd.DataFrame) -> Iterator[Counted]:
    """Of rows with a `verdict` and a reason, `unscored`, where there is none."""
    if not len(rows):
        return
    yield what, str(Label.BROKEN), int((rows["verdict"] == Label.BROKEN).sum())
    for reason, number in rows["unscored"].value_counts().items():
        yield f"{what}, unscored", explained(str(reason)), int(number)


def of_edits(rows: pd.DataFrame) -> Iterator[Counted]:
    """Of a latent audit's rows."""
    if not len(rows):
        return
    clean = rows["attack"] == CLEAN
    for reason, number in rows["unscored"].value_counts().items():
        yield "LVS unscored", str(reason), int(number)
    nameless = rows["lvs"].isna() & ~clean & (rows["unscored"].fillna("") == "")
    yield "LVS unscored", "no reason recorded", int(nameless.sum())
    for what, part, column in (
        ("answer with no edit", rows[clean], "verdict_clean"),
        ("edited answer", rows[~clean], "verdict_edited"),
    ):
        for label in (Label.BROKEN, Label.UNSCORED):
            yield what, str(label), int((part[column] == label).sum())
    for flags, number in rows[~clean]["flags"].value_counts().items():
        for flag in str(flags).split():
            yield "edit flagged", flag, int(number)


def table(infos: Sequence[Mapping[str, Any]], counted: Iterable[Counted]) -> pd.DataFrame:
    """All of it with the prompts that were refused before the runs, a row a reason, the most
    frequent first."""
    found: dict[tuple[str, str], int] = {}
    refused = (
        ("prompt refused before the run", reason, number)
        for info in infos
        for reason, number in (info.get("refused") or {}).items()
    )
    for what, reason, number in (*refused, *counted):
        if not is_null(reason) and (said := str(reason).strip()) and number:
            found[what, said] = found.get((what, said), 0) + int(number)
    entries = [
        {"what": what, "reason": reason, "count": number}
        for (what, reason), number in found.items()
    ]
    entries.sort(key=lambda e: (e["what"], -e["count"], e["reason"]))
    return pd.DataFrame(entries, columns=list(COLUMNS))
