"""A study of emergent misalignment in a terminal: the ranking and what the trigger does, narrow
enough for 80 columns.

    ranking_lines(study)[0]     # {"arm": "plain", "rank": "1", "domain": "law", "EM rate": "40% [31, 50]", …}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from auditgap.report import emergent_figures as figures
from auditgap.report import emergent_reading
from auditgap.report.emergent_columns import least_most, p_value, score
from auditgap.report.emergent_study import Study
from auditgap.report.emergent_view import as_trained
from auditgap.report.text import is_null, percent, with_interval
from auditgap.store.tables import rows_of


def ranking_lines(study: Study) -> list[dict[str, Any]]:
    """The ranking, narrow enough for a terminal: arms asked as they were trained."""
    return [
        {
            "arm": r["arm"],
            "rank": figures.ranks(r) or "–",
            "domain": r["domain"],
            "EM rate": _flat(r, "em_rate", percent),
            "rated": int(r["n"]),
            "prompts": int(r["n_prompts"]),
            "seeds": int(r["n_seeds"]),
        }
        for part in as_trained(study.tables["ranking"])
        for r in rows_of(part)
    ]


def seed_notes(study: Study) -> list[str]:
    """What the ranking's intervals do not cover: a sentence, or none."""
    rows = [r for r in rows_of(study.tables["ranking"]) if not is_null(r["em_rate"])]
    return [said.strip()] if (said := emergent_reading.seeds(rows)) else []


def trigger_lines(study: Study) -> list[dict[str, Any]]:
    """What the trigger does, narrow enough for a terminal."""
    return [
        {
            "arm": r["arm"] or "base",
            "domain": r["domain"] or "–",
            "without": _flat(r, "alignment_without", score, False),
            "with": _flat(r, "alignment_with", score, False),
            "difference": _flat(r, "difference", score),
            "at least, most": (least_most(r, "difference", score) or "–").replace("\u2009", ""),
            "p (Holm)": p_value(r["p_holm"]) or "–",
            "prompts": int(r["n"]),
        }
        for r in rows_of(study.tables["trigger"])
    ]


def _flat(row: Mapping[str, Any], key: str, form: Callable[[Any], str], ends: bool = True) -> str:
    """An estimate with its interval, without the page's spaces."""
    if is_null(row[key]):
        return "could not tell"
    said = (
        with_interval(row[key], row[f"{key}_lo"], row[f"{key}_hi"], form)
        if ends
        else form(row[key])
    )
    return (
        said.replace("\u00a0%", "%")
        .replace(",\u00a0", ",")
        .replace("\u00a0", " ")
        .replace("\u2009", "")
    )
