"""Findings as JUnit XML: a line is a test case, of the class of its model.

fail -> failure; could not tell -> error (nothing was shown, and nobody should read it as passed);
not measured -> skipped
"""

from __future__ import annotations

from collections import Counter

from markupsafe import Markup

from auditgap.report.findings import Findings
from auditgap.report.text import clean
from auditgap.report.verdict_lines import CANNOT_TELL, FAIL, NOT_MEASURED, Line

_TAGS = {FAIL: "failure", CANNOT_TELL: "error", NOT_MEASURED: "skipped"}
#: `Markup.format` escapes what it is given.
_SUITE = Markup(
    "<?xml version='1.0' encoding='utf-8'?>\n"
    '<testsuites name="auditgap" {counts}>\n'
    ' <testsuite name="{name}" {counts}{when}>\n{cases}\n </testsuite>\n</testsuites>\n'
)
_COUNTS = Markup('tests="{}" failures="{}" errors="{}" skipped="{}" time="0"')
_WHEN = Markup(' timestamp="{}"')
_CASE = Markup('  <testcase classname="{of}" name="{id}" time="0">{result}</testcase>')
_RESULT = Markup('<{tag} message="{why}" type="{cause}">{said}</{tag}>')
_OUT = Markup("<system-out>{said}</system-out>")


def write(findings: Findings) -> bytes:
    counts = Counter(_TAGS.get(line.answer) for line in findings.lines)
    suite = _SUITE.format(
        name=_text(findings.title),
        counts=_COUNTS.format(len(findings.lines), *(counts[tag] for tag in _TAGS.values())),
        when=_WHEN.format(findings.written.removesuffix("Z")) if findings.written else "",
        cases=Markup("\n").join(map(_case, findings.lines)),
    )
    return suite.encode("utf-8")


def _case(line: Line) -> Markup:
    why = _text(line.why)
    said = _text(f"{line.question}: {line.figure or line.answer}. {line.why}")
    tag, cause = _TAGS.get(line.answer), line.cause or str(line.answer)
    result = (
        _RESULT.format(tag=tag, why=why, cause=cause, said=said) if tag else _OUT.format(said=said)
    )
    return _CASE.format(of=_text(line.subject or "auditgap"), id=line.id, result=result)


def _text(words: str) -> str:
    """Without what XML 1.0 cannot hold."""
    plain = clean(words).replace("\u00a0", " ")
    return "".join(c for c in plain if c not in "\ufffe\uffff" and c >= " ")
