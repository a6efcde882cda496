"""Findings as a CycloneDX 1.6 ML-BOM: a component for each model, whose card has a metric a line.

    {"type": "audit_gap", "value": "0.33", "slice": "Audit gap", "confidenceInterval": {…}}

The verdicts stand beside as properties `auditgap:verdict:ID`; those of the audit itself, such as its
judge's, in the metadata.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import auditgap
from auditgap.report.findings import Findings
from auditgap.report.text import clean
from auditgap.report.verdict_lines import Line
from auditgap.store import files
from auditgap.types import Document, digest


def write(findings: Findings) -> bytes:
    described = findings.describe()
    names = {str(subject.get("name")) for subject in findings.subjects}
    rest = [line for line in findings.lines if line.subject not in names]
    tool = {"type": "application", "name": "auditgap", "version": auditgap.__version__}
    when = {"timestamp": findings.written} if findings.written else {}
    return files.to_json(
        {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest(described, 64))}",
            "version": 1,
            "metadata": {
                **when,
                "tools": {"components": [tool]},
                "properties": [
                    {"name": "auditgap:answer", "value": findings.sentence},
                    *_verdicts(rest),
                ],
            },
            "components": [
                _component(subject, number, findings.lines)
                for number, subject in enumerate(findings.subjects)
            ],
        }
    )


def _component(subject: Mapping[str, Any], number: int, lines: Iterable[Line]) -> Document:
    name = str(subject.get("name"))
    mine = [line for line in lines if line.subject == name]
    facts = {key: subject.get(key) for key in ("fingerprint", "dtype", "tokenizer")}
    architecture = subject.get("architecture")
    card: Document = {
        "modelParameters": {"modelArchitecture": clean(architecture)} if architecture else {},
        "quantitativeAnalysis": {
            "performanceMetrics": [_metric(line) for line in mine if line.value is not None]
        },
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model-{number}",
        "name": clean(name),
        "modelCard": card,
        "properties": [
            *({"name": f"auditgap:{k}", "value": clean(v)} for k, v in facts.items() if v),
            *_verdicts(mine),
        ],
    }


def _metric(line: Line) -> Document:
    ends = {"lowerBound": line.lo, "upperBound": line.hi}
    known = {key: repr(end) for key, end in ends.items() if end is not None}
    return {
        "type": line.id,
        "value": repr(line.value),
        "slice": clean(line.question),
        **({"confidenceInterval": known} if known else {}),
    }


def _verdicts(lines: Iterable[Line]) -> list[Document]:
    return [
        {
            "name": f"auditgap:verdict:{line.id}",
            "value": clean(f"{line.answer}: {line.why}".replace("\u00a0", " ")),
        }
        for line in lines
    ]
