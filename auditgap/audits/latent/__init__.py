"""The latent audit: attack hidden states layer by layer next to matched controls, and reduce the
rows into LVS tables.

    folder, outcome = run(LATENT, *LATENT.read(None, {"models": "smollm2", "limit": 16, "out": "runs/smollm2"}))

A config names subjects, `make_plan` turns it into cells, a sweep has workers run them, `reduce`
reads the store.
"""

from auditgap.audits.exports import exports

__getattr__ = exports(
    __name__,
    {
        "config": ("LatentConfig", "RunOptions"),
        "plan": (
            "prepare",
            "DISTANCE",
            "LatentPlan",
            "make_plan",
        ),
        "timing": ("Estimate", "estimate"),
        "worker": ("LatentWorker",),
    },
)
