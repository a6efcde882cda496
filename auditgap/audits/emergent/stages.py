"""The stages of a study by the command that runs them, in order.

    store, outcome = run("analyse", "runs/em", options)     # `auditgap em analyse runs/em`

What reads hidden states runs on transformers, whatever engine answers elsewhere; steering, which
edits them and speaks, on either. It wants directions, so it comes last. Tables are made by `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from auditgap.audits.emergent import (
    directions,
    diversity,
    embedding,
    generate,
    judge,
    membership,
    reference,
    steer,
    train,
)
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.stage import Study, StudyStage
from auditgap.audits.sweeps import run_phases
from auditgap.store import RunFolder
from auditgap.sweep import Outcome, Progress

STAGES: Mapping[str, tuple[StudyStage, ...]] = {
    "train": (train.STAGE,),
    "generate": (generate.STAGE,),
    "judge": (judge.STAGE,),
    "analyse": (
        membership.STAGE,
        reference.STAGE,
        diversity.STAGE,
        embedding.STAGE,
        directions.STAGE,
        steer.STAGE,
    ),
}


def run(
    command: str,
    folder: str | Path,
    options: EmergentOptions,
    *,
    progress: Callable[[], Progress] | None = None,
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of a command's stages; the same call again resumes.

    Raises UsageError (no study; what a stage needs is missing, with the command to run first),
    Interrupted. A stage that cannot begin stops the call; what those before it found is kept.
    """
    store = Study.load(folder, break_lock=options.break_lock).store
    return store, run_phases(STAGES[command], store, options, progress)
