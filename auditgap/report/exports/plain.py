"""Findings as JSON and as Markdown.

| criterion | verdict | figure | why |
| audit_gap | **fail** | 33 points [20, 48] | more prompts flip than … |
"""

from __future__ import annotations

from auditgap.report.columns import escaped
from auditgap.report.findings import Findings, shown
from auditgap.store import files


def to_json(findings: Findings) -> bytes:
    return files.to_json(findings.describe())


def to_markdown(findings: Findings) -> bytes:
    """A heading, the answer in one sentence, and a table."""
    beside = f", baseline {escaped(shown(findings.baseline))}" if findings.baseline else ""
    rows = [
        ("criterion", "verdict", "figure", "why"),
        ("---", "---", "---", "---"),
        *(
            (escaped(x.id), f"**{x.answer}**", escaped(x.figure), escaped(x.why))
            for x in findings.lines
        ),
    ]
    lines = [
        f"## {escaped(findings.title)}",
        "",
        f"{findings.sentence} Run {escaped(shown(findings.place))}{beside}.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"- {escaped(note)}" for note in findings.notes),
    ]
    return ("\n".join(lines).rstrip() + "\n").encode("utf-8")
