"""The audits: what each measures stands in its own folder; here only which one made a run folder.

reduce(RunFolder.load("runs/probe"))        # its tables, figures and report, anew
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from auditgap.errors import UsageError
from auditgap.store import RunFolder

#: Of each audit: the module whose `reduce` writes its tables, opened when it is asked for, and the
#: main table, `NAME.parquet`; a study of emergent misalignment has many.
AUDITS: Mapping[str, tuple[str, str | None]] = {
    "latent": ("auditgap.audits.latent.run", "lvs"),
    "behaviour": ("auditgap.audits.behaviour.run", "behaviour"),
    "probe": ("auditgap.audits.probe.run", "probe"),
    "intervene": ("auditgap.audits.intervene.run", "interventions"),
    "sft_curve": ("auditgap.audits.sft_curve.run", "curve"),
    "emergent": ("auditgap.audits.emergent.report", None),
}


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """Write a run's tables and report anew, by the audit that made it. Raises UsageError for a
    folder of something else."""
    audit = store.run["config"].get("audit")
    if audit not in AUDITS:
        raise UsageError(
            f"{store.path} is the folder of {audit or 'a training run'}, which has no report; give"
            " an audit's folder."
        )
    module, _ = AUDITS[audit]
    import_module(module).reduce(store, allow_raw=allow_raw)
