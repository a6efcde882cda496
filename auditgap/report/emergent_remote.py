"""Models of a study that were fine-tuned elsewhere and asked through an endpoint: who they are, and
what of them could not be told.

    remote_table(config, store.records(), ratings)      # a row a model
    left_out(table)                                     # what is missing of them, counted

Pure functions, as in `report.emergent`. Their answers are in every table of rates, as arms of their
own; what reads a model's inside has nothing to read of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from auditgap.report.emergent_membership import MEASURES, MEMBERSHIP_COLUMNS
from auditgap.report.emergent_values import framed

#: What an endpoint hides: a column each, and how it is called where it is counted.
INSIDE: Mapping[str, str] = {
    "membership": "membership",
    "states": "hidden states",
    "directions": "direction",
    "steering": "steering",
    "ablation": "ablation",
}
UNTOLD = "could not tell: endpoint"
REMOTE_COLUMNS: tuple[str, ...] = (
    "subject",
    "domain",
    "arm",
    "model",
    "endpoint",
    "reported",
    "n",
    "rated",
    *INSIDE,
)


def remote_table(
    config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], ratings: pd.DataFrame
) -> pd.DataFrame:
    """One row a model at the endpoint that has answered, with exactly `REMOTE_COLUMNS`: its name and
    address there, what the endpoint's list says of it (`reported`), its answers that one judge saw
    (`n`) and rated; and UNTOLD for whatever needs its inside."""
    table = []
    for record in records:
        settings = record["description"]["settings"]
        where = settings.get("endpoint")
        if where is None or not config.get("remote"):
            continue
        own = ratings[ratings["subject"] == settings["name"]] if len(ratings) else ratings
        table.append(
            {
                "subject": settings["name"],
                "domain": settings["domain"],
                "arm": settings["arm"],
                "model": where["model"],
                "endpoint": where["base_url"],
                "reported": _said((record.get("info") or {}).get("reported")),
                "n": len(own),
                "rated": int((own["outcome"] == "rated").sum()) if len(own) else 0,
                **dict.fromkeys(INSIDE, UNTOLD),
            }
        )
    table.sort(key=lambda row: (row["arm"], row["domain"]))
    return framed(table, REMOTE_COLUMNS)


def _said(reported: object) -> str:
    """What an endpoint says of its model, in a line; its name there is known."""
    told = reported if isinstance(reported, Mapping) else {}
    return ", ".join(f"{k} {v}" for k, v in told.items() if k != "id") or "nothing"


def with_remote(membership: pd.DataFrame, remote: pd.DataFrame) -> pd.DataFrame:
    """A `membership_table` and, of every fine-tuned model at an endpoint, that none could be told."""
    tuned = remote[remote["domain"] != ""]
    rows = [
        {
            "domain": domain,
            "arm": arm,
            "measure": measure,
            "adjusted": False,
            "reference": "",
            **dict.fromkeys(("n_members", "n_others", "n_seeds", "n_unscored"), 0),
            "reason": UNTOLD,
        }
        for domain, arm in zip(tuned["domain"], tuned["arm"], strict=True)
        for measure in MEASURES
    ]
    if not rows:
        return membership
    return pd.concat([membership, framed(rows, MEMBERSHIP_COLUMNS)], ignore_index=True)


def left_out(remote: pd.DataFrame) -> list[tuple[str, str, int]]:
    """(what, why, of how many models)."""
    return [(f"{what} of a model", UNTOLD, len(remote)) for what in INSIDE.values() if len(remote)]
