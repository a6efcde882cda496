"""A run's training checkpoints on disk: which one is whole, and what may be deleted. It opens none of
them.

    # root/step00000012, where every rank now writes its shards
    folder = begin(root, step=12)
    # rank 0, after all ranks are done
    seal(folder, step=12, world=2, facts={"stage": 2, "config": "9c1e…"})
    point(root, 12); rotate(root, keep=2)
    # Checkpoint(folder=…/step00000012, step=12, world=2, skipped=())
    found = latest(root)

A checkpoint is what its manifest says (`training.manifest`); `latest` is a hint for people and for
DeepSpeed's tools, and never decides.

On disk:

    step00000012/manifest.json      no manifest: the save was cut short
    step00000012_universal/         the same checkpoint, converted for another number of ranks (`check_world`, `adopt`)
    .step00000008.deleting/         on its way out
    latest                          "step00000012"
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.store.files import (
    clean_stale,
    disk_errors,
    remove,
    set_aside,
    sync_folder,
    write_bytes,
)
from auditgap.training.manifest import MANIFEST, Checkpoint, Torn, seal, verify

_STEP = re.compile(r"step(\d{8,})")
_LEAVING = re.compile(r"\.step\d{8,}(_universal)?\.deleting")
_UNIVERSAL = "_universal"


def name_of(step: int) -> str:
    """`step00000012`: sorts by step, and is the tag that DeepSpeed is given."""
    return f"step{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps that have a folder, whole or not, ascending."""
    if not root.is_dir():
        return []
    return sorted(
        int(m[1])
        for p in root.iterdir()
        if (m := _STEP.fullmatch(p.name)) and p.is_dir() and not p.is_symlink()
    )


def begin(root: Path, step: int) -> Path:
    """The folder to write a step's checkpoint into, made new and empty; what earlier kills left
    is cleaned.

    One rank calls it before any writes. A torn folder of that step is set aside as
    `step….1.corrupt`. Raises AuditgapError when the step has a whole checkpoint already: resuming
    from it is what was wanted; DiskError.
    """
    folder = root / name_of(step)
    with disk_errors(folder):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        if folder.exists():
            try:
                # as `latest` does: what it passed over is written again
                verify(folder, hashes=True)
            except (Torn, Refused):
                set_aside(folder)
            else:
                raise AuditgapError(
                    f"{folder} already holds the checkpoint of step {step}; resume from it, or"
                    " delete it first."
                )
        folder.mkdir()
    return folder


def point(root: Path, step: int) -> None:
    """Let `latest` name a step, atomically. After `seal`: the pointer never names what is not
    whole."""
    write_bytes(root / "latest", (name_of(step) + "\n").encode())


# ------------------------------------------------------------------- read


def latest(root: Path, *, say: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole and this user's own; None when training never got as far
    as one.

    Torn ones (a shard missing, cut short or altered, no manifest) are passed over, and `skipped`
    says so; `say` gets the same sentences. Every byte is hashed. Raises Refused when the newest
    complete manifest is not signed by this user's key, and UsageError when there were checkpoints
    and none is whole: starting again is for a person to decide.
    """
    skipped: list[str] = []
    sealed = False
    for step in reversed(steps(root)):
        folder = root / name_of(step)
        try:
            found = verify(folder, hashes=True)
        except Torn as why:
            skipped.append(f"Checkpoint {folder.name} was passed over: {why}.")
            sealed = sealed or (folder / MANIFEST).exists()
            if say:
                say(skipped[-1])
            continue
        pointer = _pointer(root)
        if pointer and pointer > found.folder.name and not (root / pointer).exists():
            skipped.append(
                f"Checkpoint {pointer} was passed over: `latest` names it and it is not there."
            )
            if say:
                say(skipped[-1])
        return replace(found, skipped=tuple(skipped))
    pointer = _pointer(root)
    if sealed or pointer:
        why = " ".join(skipped) or f"`latest` names {pointer}, which is not there."
        raise UsageError(
            f"{root} holds no whole checkpoint to go on from. {why} Restore one, or delete {root}"
            " to start at step 0."
        )
    return None  # nothing, or a first save that a kill cut short: the same command starts again


def check_world(found: Checkpoint, world: int, stage: int) -> Checkpoint | Path:
    """What `world` ranks at ZeRO `stage` can read: the checkpoint itself, its sealed universal twin
    (of `world` 0), or else the folder in which that twin has to be made.

    Raises UsageError for another stage; Refused as `latest` does.
    """
    if stage != found.stage:
        raise UsageError(
            f"{found.folder} was written at ZeRO stage {found.stage}, and this run is set to stage"
            f" {stage}. Resume with the ds_config of stage {found.stage}, or choose a new run"
            " folder."
        )
    if world == found.world or found.world == 0:
        return found
    twin = found.folder.with_name(found.folder.name + _UNIVERSAL)
    if (twin / MANIFEST).exists():
        try:
            return verify(twin, hashes=True)
        except Torn:
            pass  # converted again: the twin is only a copy
    return twin


def adopt(twin: Path) -> Checkpoint:
    """Seal a `…_universal` folder that this user has just converted, with the step and facts of the
    checkpoint beside it.

    Raises UsageError when the name is another or the checkpoint that it was made from is not there
    or not whole.
    """
    source = twin.with_name(twin.name.removesuffix(_UNIVERSAL))
    if not twin.is_dir() or source.name == twin.name or not _STEP.fullmatch(source.name):
        raise UsageError(
            f"{twin} is no converted checkpoint; a folder such as"
            f" checkpoints/{name_of(12)}{_UNIVERSAL} is wanted."
        )
    try:
        found = verify(source, hashes=True)
    except Torn as why:
        raise UsageError(
            f"{twin} was made from {source.name}, which is not whole: {why}. Convert a whole one."
        ) from None
    remove(twin / MANIFEST)
    facts = {**found.facts, "converted_from_world": found.world}
    seal(twin, step=found.step, world=0, facts=facts)
    return Checkpoint(twin, found.step, 0, found.stage, facts)


# ----------------------------------------------------------------- rotate


def rotate(root: Path, keep: int = 2, also: Collection[int] = ()) -> list[int]:
    """Delete old checkpoints but the `keep` newest whole ones and the steps in `also`; returns the
    steps deleted.

    The newest whole one always stays, whatever `keep` says, and so does anything newer than it,
    anything that another user's key signed, and everything when nothing is whole. Each goes by a
    rename first, so that a kill at any moment leaves either the whole checkpoint or none of it
    under its name. Whole means here: signed, and every file there in its size (hashing everything
    at every save would cost more than the save). Raises DiskError.
    """
    whole, torn = [], []
    for step in steps(root):
        try:
            verify(root / name_of(step), hashes=False)
        except Torn:
            torn.append(step)
        except Refused:
            continue
        else:
            whole.append(step)
    kept = {*whole[-max(1, keep) :], *also}
    gone = [s for s in sorted({*whole, *torn}) if s not in kept and whole and s < whole[-1]]
    if whole and (_pointer(root) or "") != name_of(whole[-1]):
        point(root, whole[-1])  # before the deletions: it may name one of them
    for step in gone:
        for name in (name_of(step) + _UNIVERSAL, name_of(step)):
            if (root / name).is_dir():
                with disk_errors(root / name):
                    os.rename(root / name, _free(root / f".{name}.deleting"))
    if gone:
        sync_folder(root)
    _sweep(root)
    return gone


def _free(path: Path) -> Path:
    remove(path)  # what a kill left
    return path


def _sweep(root: Path) -> None:
    """Finish deletions and drop half-written pointers that a kill left behind."""
    for path in list(root.iterdir()) if root.is_dir() else ():
        if _LEAVING.fullmatch(path.name):
            remove(path)
    clean_stale(root)


def _pointer(root: Path) -> str | None:
    """The step folder that `latest` names; None when there is no such file or it names something
    else."""
    try:
        name = (root / "latest").read_text(encoding="utf-8")[:80].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _STEP.fullmatch(name) else None
