"""Models side by side, over every audit that can be compared.

found = compare([RunFolder.load("runs/base"), RunFolder.load("runs/twin")], named={"base": "runs/base"})
found.table[found.table["measure"] == "lvs"]        # value, difference from the base, Holm's p
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from auditgap.audits.audit import Can
from auditgap.audits.table import AUDITS
from auditgap.report import compare as comparing
from auditgap.report.compare import Comparable, Comparison
from auditgap.report.compare_models import parts_of
from auditgap.store import RunFolder

__all__ = ["Comparison", "compare"]


def able() -> dict[str, Comparable]:
    """What is compared of each audit that can be, by its name."""
    return {audit.name: audit.comparable() for audit in AUDITS.values() if Can.COMPARE in audit.can}


def fingerprints(folders: Sequence[RunFolder]) -> dict[str, str]:
    """The models of these runs, by the names that the runs have for them; without the runs of
    audits that cannot be compared."""
    settings = {name: audit.settings for name, audit in able().items()}
    mine = [f for f in folders if f.run["config"].get("audit") in settings]
    parts = parts_of(mine, settings) if mine else []
    return {name: fingerprint for part in parts for name, fingerprint in part.subjects.items()}


def compare(
    folders: Sequence[RunFolder],
    *,
    named: Mapping[str, str] | None = None,
    base: str | None = None,
    only_compatible: bool = False,
    seed: int = 0,
) -> Comparison:
    """Read the folders and compare every model with the base; `base` is its name or its
    fingerprint. Raises UsageError as `report.compare.sides` does."""
    return comparing.compare(
        folders, able(), named=named, base=base, only_compatible=only_compatible, seed=seed
    )
