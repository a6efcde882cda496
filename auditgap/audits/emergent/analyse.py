"""The stage `analyse`: memberships, diversity, directions, and what the directions do to other
domains' models.

    store, outcome = run("runs/em", options)
    # these need no answers and no judge
    store, outcome = run("runs/em", options, parts=("membership", "diversity"))

Each part is a sweep of its own over the one run folder, in this order, since steering wants
directions. All run on transformers, whatever engine answers elsewhere: they read and edit hidden
states. Tables are made by the stage `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from auditgap.audits.emergent import directions, diversity, membership, steer
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.errors import UsageError, did_you_mean
from auditgap.store import RunFolder
from auditgap.sweep import Outcome, Progress

PARTS: Mapping[str, ModuleType] = {
    "membership": membership,
    "diversity": diversity,
    "directions": directions,
    "steer": steer,
}


def run(
    folder: str | Path,
    options: EmergentOptions,
    *,
    progress: Callable[[], Progress] | None = None,
    parts: Sequence[str] = tuple(PARTS),
) -> tuple[RunFolder, Outcome]:
    """Run what is missing of these parts; the same call again resumes.

    Raises UsageError (a part that there is not; what a part needs is missing, with the stage to run
    first), Interrupted. A part that cannot begin stops the call: what the parts before it have
    found is kept.
    """
    for part in parts:
        if part not in PARTS:
            raise UsageError(
                f"parts takes {', '.join(PARTS)}; {part!r} came.{did_you_mean(str(part), PARTS)}"
            )
    store: RunFolder | None = None
    done, skipped, failed = 0, 0, {}
    for part, module in PARTS.items():
        if part in parts:
            store, outcome = module.run(folder, options, progress=progress)
            done, skipped = done + outcome.done, skipped + outcome.skipped
            failed |= outcome.failed
    if store is None:
        raise UsageError(f"parts names what is analysed, of {', '.join(PARTS)}; none came.")
    return store, Outcome(done=done, failed=failed, skipped=skipped)
