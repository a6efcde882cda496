"""What subjects said when they were asked: tables by kind and source, and differences between
subjects.

    # one row a (subject, kind, source), and one over all sources of a kind
    table = behaviour_table(store.rows(["behaviour"]))
    # first subject − each other, paired by prompt
    difference_table(store.rows(["behaviour"]))

Rows in, DataFrames out: shares are 0–1 with Wilson's intervals, what could not be told is null,
nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from auditgap import stats
from auditgap.report.correction import Correction, shares
from auditgap.report.text import (
    is_null,
)
from auditgap.stats import Interval
from auditgap.types import Label

#: `source` of the rows that sum up a kind.
ALL = "all"
#: Column of the table -> column of the rows whose share it is.
SHARES = {"refusal": "refused", "compliance": "complied", "answered": "answered"}
KINDS = {
    "harmful": "harmful requests",
    "jailbreak": "jailbreaks",
    "over_refusal": "harmless, look harmful",
    "benign": "harmless requests",
}
#: Which shares tell subjects apart on prompts of a kind.
MEASURES: Mapping[str, tuple[str, ...]] = {
    "harmful": ("compliance", "refusal"),
    "jailbreak": ("compliance", "refusal"),
    "over_refusal": ("refusal", "answered"),
    "benign": ("refusal", "answered"),
}
#: Shares that a judge's card corrects, in their order on the page.
CORRECTED = ("refusal_corrected", "compliance_corrected")
COLUMNS = (
    "subject",
    "kind",
    "source",
    "n",
    *(f"{name}{end}" for name in (*SHARES, *CORRECTED) for end in ("", "_lo", "_hi")),
    "n_broken",
    "n_unscored",
    "n_length_matters",
)
DIFFERENCE_COLUMNS = (
    "first",
    "other",
    "kind",
    "measure",
    "n",
    "difference",
    "difference_lo",
    "difference_hi",
)
_WORDS = ("subject", "kind", "source", "first", "other", "measure")


def asked(rows: pd.DataFrame) -> bool:
    """Whether these are rows of behaviour (the store answers with an empty table of another kind
    when it has none)."""
    return len(rows) > 0 and {"kind", "source", "complied", "refused", "answered"} <= set(
        rows.columns
    )


# -- tables
# --------------------------------------------------------------------------------------------------------------


def behaviour_table(
    rows: pd.DataFrame, corrections: Mapping[str, Correction] | None = None
) -> pd.DataFrame:
    """One row a (subject, kind, source), sources in order of appearance, with each kind's sum
    (`all`) before its parts.

    `answered`: coherent and no refusal. Each share is over the prompts for which it could be told;
    `n` counts all. `…_corrected`: behind the judge's errors, by its cards
    (`correction.corrections`); null where there is none.
    """
    table = []
    if asked(rows):
        for subject, mine in rows.groupby("subject", sort=False):
            for kind in [k for k in KINDS if k in set(mine["kind"])]:
                part = mine[mine["kind"] == kind]
                sources = list(dict.fromkeys(part["source"]))
                for source in [*([ALL] if len(sources) > 1 else []), *sources]:
                    some = part if source == ALL else part[part["source"] == source]
                    found = _shares(some) | shares(some, corrections or {})
                    table.append({"subject": subject, "kind": kind, "source": source, **found})
    return _frame(table, COLUMNS)


def difference_table(rows: pd.DataFrame) -> pd.DataFrame:
    """First subject − each other, a row a (other, kind, measure), over the `n` prompts where both
    could be told.

    Paired by prompt (`stats.paired_difference`). Where all pairs differ alike (none at all, say),
    resampling them shows no spread, so the interval is what Wilson's for n of n leaves open: as if
    all the rest differed the other way.
    """
    table = []
    first, *others = map(str, dict.fromkeys(rows["subject"])) if asked(rows) else [""]
    for other in others:
        for kind, measures in MEASURES.items():
            for measure in measures:
                values = by_prompt(rows[rows["kind"] == kind], measure)
                if {first, other} <= set(values):
                    both = pd.concat([values[first], values[other]], axis=1, join="inner").dropna()
                    found = _paired(both.iloc[:, 0], both.iloc[:, 1])
                    ends = (found.estimate, found.lo, found.hi)
                    row = (first, other, kind, measure, len(both), *ends)
                    table.append(dict(zip(DIFFERENCE_COLUMNS, row, strict=True)))
    return _frame(table, DIFFERENCE_COLUMNS)


def by_prompt(rows: pd.DataFrame, measure: str) -> dict[str, pd.Series]:
    """Each subject's values of a share by prompt: 1, 0, or null where it could not be told. `rows`
    are those of one kind of prompt."""
    values = rows[SHARES[measure]].map(lambda v: None if is_null(v) else float(v)).astype(float)
    told = rows.assign(told=values).drop_duplicates(["subject", "prompt_id"])
    return {
        str(name): mine.set_index("prompt_id")["told"].sort_index()
        for name, mine in told.groupby("subject")
    }


def _paired(ours: pd.Series, theirs: pd.Series) -> Interval:
    found, n = stats.paired_difference(ours, theirs), len(ours)
    if found.estimate is None or found.lo != found.hi:
        return found
    # the share of all prompts that may yet differ otherwise
    rest = 1.0 - (stats.wilson(n, n).lo or 0.0)
    reach = rest * (1.0 + abs(found.estimate))
    return Interval(
        found.estimate, max(-1.0, found.estimate - reach), min(1.0, found.estimate + reach)
    )


def _shares(part: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {
        "n": len(part),
        "n_broken": int((part["verdict"] == Label.BROKEN).sum()),
        "n_unscored": int(part["complied"].map(is_null).sum()),
        "n_length_matters": _length_matters(part),
    }
    for name, column in SHARES.items():
        known = [bool(v) for v in part[column] if not is_null(v)]
        share = stats.wilson(sum(known), len(known))
        found |= {name: share.estimate, f"{name}_lo": share.lo, f"{name}_hi": share.hi}
    return found


def _length_matters(part: pd.DataFrame) -> int | None:
    """Answers that comply or refuse at half their length or in full, not both; None: nobody
    looked."""
    if "length_matters" not in part:
        return None
    return sum(not is_null(v) and bool(v) for v in part["length_matters"])


def _frame(table: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A frame whose dtypes do not depend on what is in it."""

    def column(name: str) -> pd.Series:
        values = [row[name] for row in table]
        return pd.Series(
            values,
            dtype=object if name in _WORDS else "Int64" if name.startswith("n") else "float64",
        )

    return pd.DataFrame({name: column(name) for name in columns}, columns=list(columns))


# -- on the page
# ---------------------------------------------------------------------------------------------------------


# -- words
# ---------------------------------------------------------------------------------------------------------------


# -- sections
# ------------------------------------------------------------------------------------------------------
