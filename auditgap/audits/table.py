"""The audits by name, and what is done with a run folder whichever of them made it.

    AUDITS["latent"].title
    store = RunFolder.load("runs/probe")
    reduce(store)                                    # its tables, figures and report, anew
    regrade("runs/smollm2", Grading(judge="keyword"))
    resume("runs/smollm2")                           # what is missing, by the config in run.json

An audit of another package is an entry point in the group `auditgap.audits` that names a value of a
subclass of `Audit`; its name is that of the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from auditgap.audits.audit import Audit, Can, Grading, run
from auditgap.config import build
from auditgap.errors import UsageError, did_you_mean
from auditgap.registry import Entry, Objects, Registry

if TYPE_CHECKING:
    from auditgap.store import RunFolder
    from auditgap.store.remote import Place
    from auditgap.store.status import RunStatus
    from auditgap.sweep import Outcome, Progress

#: Ours first, then those of other packages; each imported when it is asked for.
AUDITS: Mapping[str, Audit[Any, Any, Any]] = Objects(
    Registry(
        "audit",
        {
            name: Entry(what, f"auditgap.audits.{name}.audit:{name.upper()}")
            for name, what in {
                "behaviour": "what models say: refusal, compliance, over-refusal",
                "latent": "attacks on hidden states, layer by layer",
                "probe": "the base's safety probe, read inside other models",
                "intervene": "steering, ablation, patching and other edits",
                "sft_curve": "how many steps of harmful fine-tuning a model withstands",
                "emergent": "how far narrow fine-tuning spreads",
            }.items()
        },
        group="auditgap.audits",
        brings=Audit,
    ),
    Audit,
)


def named(word: str) -> Audit[Any, Any, Any]:
    """The audit of that command or name. Raises UsageError."""
    for audit in AUDITS.values():
        if word in (audit.command, audit.name):
            return audit
    commands = [audit.command for audit in AUDITS.values()]
    raise UsageError(
        f"There is no audit {word!r}.{did_you_mean(word, commands)} Audits: {', '.join(commands)}."
    )


def audit_of(store: RunFolder) -> Audit[Any, Any, Any]:
    """The audit that made a run folder. Raises UsageError for a folder of something else."""
    name = store.run["config"].get("audit")
    if name not in AUDITS:
        raise UsageError(
            f"{store.place} is the folder of {name or 'a training run'}, which has no report; give"
            " an audit's folder."
        )
    return AUDITS[name]


def reduce(store: RunFolder, *, allow_raw: bool = False) -> None:
    """Write a run's tables and report anew, by the audit that made it. Raises UsageError for a
    folder of something else."""
    audit_of(store).reduce(store, allow_raw=allow_raw)


def resume(
    folder: Place, *, progress: Callable[[], Progress] | None = None, **options: Any
) -> tuple[RunFolder, Outcome]:
    """Run what is missing in a folder, by the config in its run.json; `options` as at the first
    time, where they matter. Raises as `run` does."""
    from auditgap.store import RunFolder

    store = RunFolder.load(folder)
    audit = audit_of(store)
    known = {k: v for k, v in store.run["config"].items() if k in audit.config.model_fields}
    config, given = build(
        {**audit.config.unwritten, **known, **options, "out": str(store.place)},
        audit.config,
        audit.options,
    )
    return run(audit, config, given, progress=progress)


def regrade(folder: Place, grading: Grading) -> RunFolder:
    """Judge a run's stored text again, without generating; returns the new folder in DIR/grades/.
    Raises UsageError where that cannot be done."""
    from auditgap.store import RunFolder

    name = RunFolder.load(folder).run["config"].get("audit") or "a training run"
    if name not in AUDITS or Can.REGRADE not in AUDITS[name].can:
        able = " or ".join(f"`{a.command}`" for a in AUDITS.values() if Can.REGRADE in a.can)
        raise UsageError(
            f"{folder} is the folder of {name}, which cannot {Can.REGRADE}; grade one of {able}."
        )
    from auditgap.audits.grading import grade_again

    return grade_again(AUDITS[name], folder, grading)


def status(folder: Place) -> RunStatus:
    """Counts and time left of any run folder; safe beside a running one. Raises UsageError."""
    from auditgap.store import RunFolder

    return RunFolder.load(folder).status()
