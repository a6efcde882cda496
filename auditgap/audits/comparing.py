"""Models side by side, over every audit that can be compared.

found = compare([RunFolder.load("runs/base"), RunFolder.load("runs/twin")], named={"base": "runs/base"})
found.table[found.table["measure"] == "lvs"]        # value, difference from the base, Holm's p
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from auditgap.audits.audit import Can
from auditgap.audits.table import AUDITS
from auditgap.report import compare as comparing
from auditgap.report.compare import Comparison
from auditgap.store import RunFolder

__all__ = ["Comparison", "compare"]


def compare(
    folders: Sequence[RunFolder],
    *,
    named: Mapping[str, str] | None = None,
    base: str | None = None,
    only_compatible: bool = False,
    seed: int = 0,
) -> Comparison:
    """Read the folders and compare every model with the base. Raises UsageError as
    `report.compare.sides` does."""
    able = {audit.name: audit.comparable() for audit in AUDITS.values() if Can.COMPARE in audit.can}
    return comparing.compare(
        folders, able, named=named, base=base, only_compatible=only_compatible, seed=seed
    )
