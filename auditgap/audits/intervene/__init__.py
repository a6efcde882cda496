"""The intervention audit: steer, ablate, patch, turn and push a model, each next to a control as
large, and see what opens it.

    folder, outcome = run(*read_config(None, {"models": "smollm2", "limit": 48, "out": "runs/interventions"}))
    # site × intervention × strength: ASR, the control's, their difference
    folder.path / "interventions.csv"

The prompts are split by hash: directions and searches are fitted on one half, and measured on the
other.
"""

from auditgap.audits.edits import export_edits
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions, read_config
from auditgap.audits.intervene.plan import IntervenePlan, estimate, make_plan
from auditgap.audits.intervene.rows import InterveneRow
from auditgap.audits.intervene.run import prepare, reduce, run
from auditgap.audits.intervene.worker import InterveneWorker

__all__ = [
    "InterveneConfig",
    "InterveneOptions",
    "IntervenePlan",
    "InterveneRow",
    "InterveneWorker",
    "estimate",
    "export_edits",
    "make_plan",
    "prepare",
    "read_config",
    "reduce",
    "run",
]
