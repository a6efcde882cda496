"""Findings as files that other programs read: a format is one line of this table, and has its module.

    EXPORTS["sarif"].write(findings, Path("gate.sarif"))

`auditgap export RUN --format NAME` and `auditgap gate … --out-NAME FILE` are made from it. No format
holds a prompt, a completion or an absolute path; names of models are cleaned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from auditgap.registry import Entry, Registry

if TYPE_CHECKING:
    from auditgap.report.findings import Findings

_HERE = "auditgap.report.exports"


@dataclass(frozen=True, slots=True)
class Export(Entry):
    """A format; its `home` is a function of `Findings` that returns bytes."""

    suffix: str = ".json"

    def write(self, findings: Findings, path: Path) -> Path:
        """Write the file, whole or not at all. Raises DiskError."""
        from auditgap.store import files  # which opens tables; help has no need of them

        with files.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, self.load()(findings))
        return path


EXPORTS: Registry[Export] = Registry(
    "export format",
    {
        "json": Export("every line as plain values", f"{_HERE}.plain:to_json"),
        "sarif": Export("SARIF 2.1.0, for code scanning", f"{_HERE}.sarif:write", ".sarif"),
        "junit": Export("JUnit XML, for test reports", f"{_HERE}.junit:write", ".xml"),
        "cyclonedx": Export("CycloneDX 1.6 ML-BOM", f"{_HERE}.cyclonedx:write", ".cdx.json"),
        "every-eval-ever": Export(
            "every-eval-ever 0.3.0, a document a model and line",
            f"{_HERE}.every_eval_ever:write",
            ".eee.json",
        ),
        "summary": Export("Markdown, for a job summary", f"{_HERE}.plain:to_markdown", ".md"),
    },
)
