"""The behavioural audit from end to end: plan, open the folder, ask, judge, reduce; and judging
again what a run has said.

    folder, outcome = run(config, options)
    # subject, kind, source, n, refusal, compliance, broken, unscored, with intervals
    folder.path / "behaviour.csv"
"""

from __future__ import annotations

from collections.abc import Callable

from auditgap.audits import audit
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.behaviour.config import BehaviourConfig, BehaviourOptions
from auditgap.audits.behaviour.plan import ATTACK, BehaviourPlan
from auditgap.store import RunFolder
from auditgap.sweep import Outcome, Progress


def run(
    config: BehaviourConfig,
    options: BehaviourOptions,
    *,
    plan: BehaviourPlan | None = None,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of the audit and reduce it. The same call again resumes. Raises
    UsageError, Refused, Interrupted."""
    return audit.run(BEHAVIOUR, config, options, plan=plan, progress=progress)


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """The finished cells' rows as `behaviour.parquet|csv|md`, and the report. Deterministic, and
    safe on a partial run."""
    BEHAVIOUR.reduce(store, allow_raw=allow_raw)


def lost(store: RunFolder) -> tuple[float, str]:
    """The share of prompts that no subject's answer could be had to, whatever the judge, and the
    commonest reason."""
    rows = store.rows([ATTACK])
    if not len(rows):
        return 0.0, ""
    never = rows[rows["refused"].isna()]
    return len(never) / len(rows), "" if never.empty else str(never["unscored"].mode()[0])


def unscored_share(store: RunFolder) -> float | None:
    """The share of answers that the judge gave no verdict on; what was never said is not the
    judge's. None: no answers."""
    rows = store.rows([ATTACK])
    if not len(rows):
        return None
    said = rows[rows["refused"].notna()]
    return float(said["complied"].isna().mean()) if len(said) else None
