"""Directions of fine-tuned models as they are read back from a study's folder.

read(store, "alignment=./judge")[0].direction       # [L, D] fp32, or None with a reason
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from auditgap.audits.emergent.rows import DIRECTIONS
from auditgap.report.emergent_study import vectors_of
from auditgap.store import RunFolder


@dataclass(frozen=True, eq=False)
class DirectionRecord:
    """One adapter's directions. `direction` [L, D] fp32 is None where it could not be told, and
    `reason` says why."""

    key: str
    subject: str
    domain: str
    arm: str
    seed: int
    judge: str  #: its name; "": from held-out responses
    direction: np.ndarray | None
    split_half: np.ndarray  #: [L], nan where it could not be told
    reason: str = ""


def read(
    store: RunFolder, judge: str | None = None, *, keys: Sequence[str] | None = None
) -> list[DirectionRecord]:
    """What the finished cells have found, with this judge (or made from held-out responses, which
    need none), or of these keys.

    Raises UsageError when a file of vectors is missing or torn.
    """
    found = []
    for record in store.records():
        description = record["description"]
        if description["attack"] != DIRECTIONS or (keys is not None and record["key"] not in keys):
            continue
        settings = description["settings"]
        if judge is not None and settings["judge_name"] not in ("", judge):
            continue
        rows = store.cell_rows(record["key"]).sort_values("block")
        known = bool(rows["norm"].notna().all())
        found.append(
            DirectionRecord(
                record["key"],
                settings["name"],
                settings["domain"],
                settings["arm"],
                settings["adapter_seed"],
                settings["judge_name"],
                vectors_of(store, record["key"]) if known else None,
                rows["split_half"].to_numpy(dtype=float),
                "" if known else str(rows["unscored"].iloc[0]),
            )
        )
    return sorted(found, key=lambda f: (f.domain, f.arm, f.seed))
