"""Run a worker over groups of cells, each cell exactly once, whatever dies on the way. Knows
nothing of audits.

    from auditgap import sweep

    groups = [sweep.Group("smollm2 · block15", cells, work=240.0), …]
    # this process
    outcome = sweep.local.run(groups, make_worker, store, progress=sweep.Progress())
    # a cluster
    outcome = sweep.ray.run(groups, make_worker, store, workers=8, gpus_per_worker=1)
    # {key: cause}
    outcome.failed

What is done is decided by the store alone, so the same call again does what is missing and no more.
A group with nothing left to do never reaches a worker, and when none is left no worker is made: no
model is loaded for nothing.
"""

from auditgap.sweep import local, ray
from auditgap.sweep.progress import Progress
from auditgap.sweep.state import Group, Outcome, Worker

__all__ = ["Group", "Outcome", "Progress", "Worker", "local", "ray"]
