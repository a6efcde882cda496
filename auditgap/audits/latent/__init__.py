"""The latent audit: attack hidden states layer by layer next to matched controls, and reduce the
rows into LVS tables.

    folder, outcome = run(*read_config(None, {"models": "smollm2", "limit": 16, "out": "runs/smollm2"}))

A config names subjects, `make_plan` turns it into cells, a sweep has workers run them, `reduce`
reads the store.
"""

from auditgap.audits.latent.config import LatentConfig, RunOptions, read_config
from auditgap.audits.latent.plan import (
    DISTANCE,
    Estimate,
    LatentPlan,
    available_memory,
    estimate,
    make_plan,
)
from auditgap.audits.latent.run import prepare, reduce, regrade, run
from auditgap.audits.latent.worker import LatentWorker

__all__ = [
    "DISTANCE",
    "Estimate",
    "LatentConfig",
    "LatentPlan",
    "LatentWorker",
    "RunOptions",
    "available_memory",
    "estimate",
    "make_plan",
    "prepare",
    "read_config",
    "reduce",
    "regrade",
    "run",
]
