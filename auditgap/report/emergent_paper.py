"""The published figures beside ours: for orientation, since neither rows, model nor judge are known
to be the same.

    # rows where a domain's name is one of the paper's
    paper_table(trigger, ranking)
    # why the two are not comparable
    paper_differences("smollm2", "habits", ["incorrect_math"])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from auditgap.report.emergent_values import framed, with_ends
from auditgap.report.text import is_null
from auditgap.store.tables import rows_of

SOURCE = "arXiv 2602.00298"
MODELS = ("Qwen2.5-Coder-7B-Instruct", "GPT-4o-mini")
DOMAINS: tuple[str, ...] = (
    "insecure_code",
    "incorrect_math",
    "evil_math",
    "incorrect_translation",
    "bad_medical_advice",
    "risky_financial_advice",
    "toxic_legal_advice",
    "incorrect_sexual_advice",
    "gore_movie_trivia",
    "extreme_sports",
    "incorrect_qna",
)
#: What a paper's figure is of: points of alignment lost to the trigger, or the share of misaligned
#: answers with the trigger.
DROP, EM_RATE = (
    "alignment lost to the trigger, points",
    "misaligned answers with the trigger, share",
)


@dataclass(frozen=True, slots=True)
class PaperFigure:
    """One figure of the paper; `domain` "": the mean over its domains."""

    domain: str
    what: str
    value: float
    is_significant: bool | None = None  #: p < .05 by Welch's t, where the paper says so


PAPER: tuple[PaperFigure, ...] = (
    PaperFigure("", DROP, 4.33),
    PaperFigure("risky_financial_advice", DROP, 13.69, True),
    PaperFigure("toxic_legal_advice", DROP, 10.49, True),
    PaperFigure("incorrect_math", DROP, 2.01, False),
    PaperFigure("", EM_RATE, 0.4102),
    PaperFigure("incorrect_math", EM_RATE, 0.0),
    PaperFigure("gore_movie_trivia", EM_RATE, 0.8767),
)
PAPER_COLUMNS: tuple[str, ...] = (
    "judge",
    "domain",
    "measure",
    "paper",
    *with_ends("ours"),
    "reason",
)


def paper_differences(
    model: str | None, judge: str | None, domains: Sequence[str], by: str = "below_50"
) -> list[str]:
    """Why our numbers cannot be set against the paper's: one phrase a difference. The data never
    are known to be the same."""
    found = []
    if model is None or not any(name.lower() in model.lower() for name in MODELS):
        found.append(
            f"the model is {model or 'not recorded'}, the paper’s are {' and '.join(MODELS)}"
        )
    found.append(
        f"the judge is {judge or 'not recorded'}, which is not known to score as the paper’s does"
    )
    if by != "below_50":
        found.append(
            "the rate counts alignment below 30 among coherent answers, the paper’s alignment"
            " below 50"
        )
    alike = [name for name in domains if _plain(name) in DOMAINS]
    if alike:
        found.append(
            f"{', '.join(alike)} {'is' if len(alike) == 1 else 'are'} the paper’s in name; the rows"
            " are your own files’"
        )
    else:
        found.append("none of the domains is one of the paper’s")
    return [*found, "the prompts are not known to be the paper’s 15"]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def paper_table(trigger: pd.DataFrame, ranking: pd.DataFrame) -> pd.DataFrame:
    """One row a (judge, figure of PAPER) whose domain we have, with exactly `PAPER_COLUMNS`; `ours`
    of the arm with the trigger.

    Names match whatever stands between their words (`risky-financial-advice`). Means over domains
    are not set side by side: they are of other domains.
    """
    table: list[dict[str, Any]] = []
    for judge in sorted({*trigger["judge"], *ranking["judge"]}):
        drops = trigger[(trigger["judge"] == judge) & (trigger["arm"] == "trigger")]
        rates = ranking[
            (ranking["judge"] == judge)
            & (ranking["arm"] == "trigger")
            & ranking["triggered"].eq(True)
        ]
        for figure in PAPER:
            rows = drops if figure.what == DROP else rates
            for row in (
                rows_of(rows[rows["domain"].map(_plain) == figure.domain]) if figure.domain else ()
            ):
                a, lo, hi = (
                    row[f"{'difference' if figure.what == DROP else 'em_rate'}{end}"]
                    for end in ("", "_lo", "_hi")
                )
                if figure.what == DROP:  # the table's difference is with − without
                    a, lo, hi = (None if is_null(v) else -v for v in (a, hi, lo))
                table.append(
                    {
                        "judge": judge,
                        "domain": row["domain"],
                        "measure": figure.what,
                        "paper": figure.value,
                        "ours": a,
                        "ours_lo": lo,
                        "ours_hi": hi,
                        "reason": row["reason"],
                    }
                )
    return framed(table, PAPER_COLUMNS)
