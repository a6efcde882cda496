"""The audits: what each measures stands in its own folder; `Audit` is what they have in common, and
`AUDITS` names them.

    audit = AUDITS["probe"]
    folder, outcome = run(audit, *audit.read(None, {"base": "./base", "triples": "demo"}))
"""

from auditgap.audits.audit import Audit, Can, Grading, Plan, run
from auditgap.audits.options import AuditOptions
from auditgap.audits.table import AUDITS, audit_of, reduce, regrade, resume, status

__all__ = [
    "AUDITS",
    "Audit",
    "AuditOptions",
    "Can",
    "Grading",
    "Plan",
    "audit_of",
    "reduce",
    "regrade",
    "resume",
    "run",
    "status",
]
