"""A run that is there, opened to be judged: one audit's folder, a whole audit's, or a folder of
several runs.

    run = opened("runs/tuned")
    findings_of(run).lines          # its verdict table, at the audit's own criteria
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from functools import cached_property
from pathlib import Path

from auditgap.audits import pages, whole
from auditgap.report.findings import Findings
from auditgap.report.gather import ReportData
from auditgap.report.verdict_lines import Criteria
from auditgap.report.verdicts import CRITERIA, verdicts
from auditgap.store import RunFolder


@dataclass(frozen=True)
class OpenedRun:
    """The runs in a folder, why parts of a whole audit were not run, and where its lines are
    drawn."""

    place: str
    stores: Sequence[RunFolder]
    missing: Mapping[str, str] = field(default_factory=dict)
    criteria: Criteria = field(default_factory=Criteria)
    title: str = "Audit"

    @cached_property
    def report(self) -> ReportData:
        return pages.from_store(self.stores)

    @cached_property
    def incomplete(self) -> str:
        """Which planned cells are in no table; "" where all are."""
        lacks = [
            f"{now.planned - now.finished} of {now.planned} planned cells of {store.path.name}"
            for store in self.stores
            if (now := store.status()).finished < now.planned
        ]
        return ", ".join(lacks)

    @property
    def written(self) -> str:
        """When the last cell was, in UTC; "" where none is done."""
        times = [now for store in self.stores if (now := store.status().last_write) is not None]
        return max(times).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if times else ""


def stores_in(folder: str) -> list[RunFolder]:
    """The run in a folder, or the runs in the folders in it. Raises UsageError: neither."""
    parts = (
        []
        if "://" in folder or (Path(folder) / "run.json").is_file()
        else sorted(Path(folder).glob("*/run.json"))
    )
    return [RunFolder.load(part.parent) for part in parts] or [RunFolder.load(folder)]


def opened(folder: str) -> OpenedRun:
    """Open what an audit left in `folder`. Raises UsageError where nothing did."""
    if "://" in folder or not whole.is_whole(Path(folder)):
        return OpenedRun(folder, stores_in(folder))
    title, criteria, missing = whole.described(Path(folder))
    return OpenedRun(folder, whole.stores(Path(folder)), missing, criteria, title)


def findings_of(run: OpenedRun) -> Findings:
    """A run's own verdict table."""
    lines = verdicts(run.report, pages.by_table(), run.criteria, run.missing)
    return Findings(
        title=run.title,
        lines=lines,
        place=run.place,
        subjects=run.report.subjects,
        written=run.written,
        notes=[f"In no table: {run.incomplete}."] if run.incomplete else [],
        rising=rising(),
    )


def rising() -> frozenset[str]:
    """The ids of the lines of whose figure more is better; a gate's differences are not among
    them."""
    asked = (*CRITERIA, *(one for part in pages.by_table() for one in part.criteria))
    return frozenset(one.id for one in asked if one.more_is_better)
