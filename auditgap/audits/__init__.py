"""The audits: what each measures stands in its own folder; here only which one made a run folder.

reduce(RunFolder.load("runs/probe"))        # its tables, figures and report, anew
"""

from __future__ import annotations

from collections.abc import Mapping

from auditgap.errors import UsageError
from auditgap.store import RunFolder

#: The main table of each audit's folder, `NAME.parquet`; a study of emergent misalignment has many.
TABLES: Mapping[str, str | None] = {
    "latent": "lvs",
    "behaviour": "behaviour",
    "probe": "probe",
    "intervene": "interventions",
    "sft_curve": "curve",
    "emergent": None,
}


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """Write a run's tables and report anew, by the audit that made it. Raises UsageError for a
    folder of something else."""
    from auditgap.audits.behaviour.run import reduce as behaviour
    from auditgap.audits.emergent.report import reduce as emergent
    from auditgap.audits.intervene.run import reduce as intervene
    from auditgap.audits.latent.run import reduce as latent
    from auditgap.audits.probe.run import reduce as probe
    from auditgap.audits.sft_curve.run import reduce as sft_curve

    by_audit = {
        "latent": latent,
        "probe": probe,
        "behaviour": behaviour,
        "sft_curve": sft_curve,
        "intervene": intervene,
        "emergent": emergent,
    }
    audit = store.run["config"].get("audit")
    if audit not in by_audit:
        raise UsageError(
            f"{store.path} is the folder of {audit or 'a training run'}, which has no report; give"
            " an audit's folder."
        )
    by_audit[audit](store, allow_raw=allow_raw)
