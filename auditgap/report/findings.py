"""What was found of a run, line by line: what `auditgap gate` answers, and what is exported.

Findings(title="Gate", lines=lines, place="runs/tuned").answer     # fail, could not tell or pass
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import auditgap
from auditgap.report.verdict_lines import CANNOT_TELL, FAIL, NOT_MEASURED, PASS, Line
from auditgap.stats.decision import Answer
from auditgap.types import Document

SCHEMA = 1


def shown(place: str) -> str:
    """A folder as it was named, where that is relative or an address; else its last part: who reads
    a file of these need not know where it was made."""
    path = PurePath(place)
    return path.name if path.is_absolute() else place


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The lines of a verdict table, or of a gate, and whom and what they are of."""

    title: str
    lines: Sequence[Line]
    place: str  #: the run's folder, as it was named
    #: of whom: name, fingerprint, architecture and what else the run recorded
    subjects: Sequence[Mapping[str, Any]] = ()
    written: str = ""  #: when the run's last cell was, as ISO 8601
    baseline: str = ""  #: of a gate: the folder that it was compared with
    policy: Document = field(default_factory=dict)  #: of a gate
    notes: Sequence[str] = ()
    rising: Collection[str] = ()  #: ids of the lines of whose figure more is better

    @property
    def answer(self) -> Answer:
        """Of all lines in one: fail where one fails, pass where all pass."""
        answers = {line.answer for line in self.lines}
        return FAIL if FAIL in answers else PASS if answers == {PASS} else CANNOT_TELL

    @property
    def sentence(self) -> str:
        """How many lines came out how."""
        words = {PASS: "passed", FAIL: "failed", CANNOT_TELL: "could not be told"}
        words[NOT_MEASURED] = "not measured"
        counts = {answer: sum(line.answer == answer for line in self.lines) for answer in words}
        said = ", ".join(f"{n} {words[answer]}" for answer, n in counts.items() if n)
        return f"{self.answer.upper()}: of {len(self.lines)} criteria {said or 'none is there'}."

    def describe(self) -> Document:
        """All of it as plain values."""
        more = {"baseline": shown(self.baseline), "policy": self.policy} if self.policy else {}
        return {
            "format": "auditgap.findings",
            "schema": SCHEMA,
            "auditgap": auditgap.__version__,
            "title": self.title,
            "run": shown(self.place),
            **more,
            "answer": str(self.answer),
            "sentence": self.sentence,
            "subjects": [
                {key: subject.get(key) for key in ("name", "fingerprint", "architecture")}
                for subject in self.subjects
            ],
            "written": self.written,
            "lines": [line.describe() for line in self.lines],
            "notes": list(self.notes),
        }
