"""The intervention audit: steer, ablate, patch, turn and push a model, each next to a control as
large, and see what opens it.

    folder, outcome = run(INTERVENE, *INTERVENE.read(None, {"models": "smollm2", "limit": 48, "out": "runs/interventions"}))
    # site × intervention × strength: ASR, the control's, their difference
    folder.path / "interventions.csv"

The prompts are split by hash: directions and searches are fitted on one half, and measured on the
other.
"""

from auditgap.audits.exports import exports

__getattr__ = exports(
    __name__,
    {
        "config": ("InterveneConfig", "InterveneOptions"),
        "plan": ("IntervenePlan", "estimate", "make_plan", "prepare"),
        "rows": ("InterveneRow",),
        "worker": ("InterveneWorker",),
    },
)
