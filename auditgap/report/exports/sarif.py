"""Findings as a SARIF 2.1.0 log (OASIS): a line is a result, its criterion a rule.

    fail -> kind "fail", level "error"; pass -> "pass"; could not tell, not measured -> "open"

Of `open` the standard says that there was insufficient information to decide; every kind but `fail`
has the level `none`. A result has a stable fingerprint, so that a code-scanning service knows it again
from run to run.
"""

from __future__ import annotations

from urllib.parse import quote

import auditgap
from auditgap.report.findings import Findings, shown
from auditgap.report.text import clean
from auditgap.report.verdict_lines import FAIL, PASS, Line
from auditgap.store import files
from auditgap.types import Document, digest

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_KINDS = {PASS: "pass", FAIL: "fail"}


def write(findings: Findings) -> bytes:
    rules = list(dict.fromkeys((line.id, line.question) for line in findings.lines))
    driver = {
        "name": "auditgap",
        "version": auditgap.__version__,
        "rules": [{"id": id, "shortDescription": {"text": clean(said)}} for id, said in rules],
    }
    ended = {"endTimeUtc": findings.written} if findings.written else {}
    run: Document = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"auditgap/{clean(findings.title)}/"},
        "invocations": [{"executionSuccessful": True, **ended}],
        "columnKind": "unicodeCodePoints",
        "results": [_result(line, findings, [id for id, _ in rules]) for line in findings.lines],
        "properties": {"answer": str(findings.answer), "sentence": findings.sentence},
    }
    return files.to_json({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def _result(line: Line, findings: Findings, rules: list[str]) -> Document:
    kind = _KINDS.get(line.answer, "open")
    said = f"{line.question}: {line.answer}" + (f", {line.figure}" if line.figure else "")
    about = {k: v for k, v in line.describe().items() if k not in ("question", "reason")}
    return {
        "ruleId": line.id,
        "ruleIndex": rules.index(line.id),
        "kind": kind,
        "level": "error" if kind == "fail" else "none",
        "message": {"text": clean(f"{said}. {line.why}".replace("\u00a0", " "))},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": _uri(findings.place)}},
                "logicalLocations": [{"name": clean(line.subject or findings.title)}],
            }
        ],
        "partialFingerprints": {"criterion/v1": digest([line.id, line.subject], 32)},
        "properties": {k: clean(v) if isinstance(v, str) else v for k, v in about.items()},
    }


def _uri(place: str) -> str:
    return quote(clean(shown(place)).replace("\\", "/"), safe="/:")
