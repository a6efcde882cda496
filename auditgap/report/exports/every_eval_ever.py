"""Findings as documents of every-eval-ever 0.3.0, the shared schema of evaluation results: a line a
model, each a document of its own.

    {"schema_version": "0.3.0", "evaluation_id": "auditgap/tuned/1793534400", "evaluation_results": […]}

A line of the verdict table is a result where it has a figure; its verdict, criterion and reason are
its details. A line without one is in the document too: the schema wants a number of every result,
and none is made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import auditgap
from auditgap.report.findings import Findings, shown
from auditgap.report.text import clean
from auditgap.report.verdict_lines import Line
from auditgap.store import files
from auditgap.types import Document

SCHEMA = "0.3.0"


def write(findings: Findings) -> bytes:
    documents = (_document(findings, subject) for subject in findings.subjects)
    return b"".join(files.to_json(document, indent=None) for document in documents)


def _document(findings: Findings, subject: Mapping[str, Any]) -> Document:
    name = str(subject.get("name"))
    mine = [line for line in findings.lines if line.subject == name]
    names = {str(one.get("name")) for one in findings.subjects}
    others = [line for line in findings.lines if line.subject not in names]
    model = clean(shown(name))
    when = (
        str(int(datetime.fromisoformat(findings.written).timestamp())) if findings.written else "0"
    )
    return {
        "schema_version": SCHEMA,
        "evaluation_id": f"auditgap/{model}/{when}",
        **({"evaluation_timestamp": when} if findings.written else {}),
        "retrieved_timestamp": when,
        "source_metadata": {
            "source_name": clean(findings.title),
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {
            "name": "auditgap",
            "version": auditgap.__version__,
            "additional_details": {"answer": clean(findings.sentence), **_untold(others)},
        },
        "model_info": _model(subject, model, mine),
        "evaluation_results": [_result(findings, x) for x in mine if x.value is not None],
    }


def _model(subject: Mapping[str, Any], model: str, lines: list[Line]) -> Document:
    here = bool(subject.get("architecture"))  # of an endpoint nothing is known of the weights
    facts = {key: subject.get(key) for key in ("fingerprint", "architecture", "dtype")}
    return {
        "name": model,
        "id": model,
        "additional_details": {
            "deployment_type": "self_deployed" if here else "unknown",
            "model_availability": "unknown",
            **{key: clean(value) for key, value in facts.items() if value},
            **_untold([line for line in lines if line.value is None]),
        },
    }


def _untold(lines: list[Line]) -> dict[str, str]:
    return {f"verdict:{line.id}": clean(f"{line.answer}: {line.why}") for line in lines}


def _result(findings: Findings, line: Line) -> Document:
    uncertainty: Document = {} if line.n is None else {"num_samples": line.n}
    if line.lo is not None and line.hi is not None:
        ends = {"lower": line.lo, "upper": line.hi, "confidence_level": 0.95}
        uncertainty["confidence_interval"] = ends
    details = {
        "verdict": str(line.answer),
        "reason": clean(line.why),
        "figure": clean(line.figure),
        "criterion": clean(line.criterion),
        "threshold": "" if line.threshold is None else repr(line.threshold),
    }
    return {
        "evaluation_name": clean(line.question),
        "source_data": {
            "dataset_name": f"prompts of {clean(shown(findings.place))}",
            "source_type": "other",
        },
        "metric_config": {
            "metric_id": f"auditgap.{line.id}",
            "metric_name": clean(line.question),
            "lower_is_better": line.id not in findings.rising,
        },
        "score_details": {
            "score": line.value,
            "details": {key: said for key, said in details.items() if said},
            **({"uncertainty": uncertainty} if uncertainty else {}),
        },
    }
