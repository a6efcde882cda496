"""Models side by side, over every audit that can be compared.

found = compare([RunFolder.load("runs/base"), RunFolder.load("runs/twin")], named={"base": "runs/base"})
found.table[found.table["measure"] == "lvs"]        # value, difference from the base, Holm's p
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from auditgap.audits.audit import Can
from auditgap.audits.findings import stores_in
from auditgap.audits.settings import CompareSettings
from auditgap.audits.table import AUDITS
from auditgap.errors import UsageError
from auditgap.report import compare as comparing
from auditgap.report import compare_page
from auditgap.report.compare import Comparable, Comparison
from auditgap.report.compare_models import parts_of
from auditgap.store import RunFolder

__all__ = ["Compared", "Comparison", "compare", "run"]


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


@dataclass(frozen=True, eq=False)
class Compared:
    """A comparison that is written: what was found, of which runs, and its page."""

    found: Comparison
    stores: Sequence[RunFolder]
    page: Path


def run(asked: CompareSettings) -> Compared:
    """Compare the runs and write compare.html and its tables. Raises UsageError as `compare` does,
    and where there is only one model."""
    given = [store for folder in asked.folders for store in stores_in(folder)]
    there = {store.path.resolve() for store in given}
    also = [s for target in asked.named.values() if _holds_runs(target) for s in stores_in(target)]
    stores = [*given, *(store for store in also if store.path.resolve() not in there)]
    found = compare(
        stores, named=asked.named, base=asked.base, only_compatible=asked.only_compatible
    )
    if len(found.sides.models) < 2:
        raise UsageError(
            " ".join(
                (
                    f"There is only one model, {found.sides.base.name}, so there is nothing to compare"
                    " it with. Add the run of another, for example: auditgap compare runs/base"
                    " runs/twin.",
                    *found.sides.left_out,
                )
            )
        )
    return Compared(found, stores, compare_page.write(found, Path(asked.out)))


def _holds_runs(folder: str) -> bool:
    return (
        "://" in folder
        or any(Path(folder).glob("run.json"))
        or any(Path(folder).glob("*/run.json"))
    )
