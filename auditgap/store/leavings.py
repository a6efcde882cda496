"""What of a folder of runs may be deleted, and what it would cost: never a record, a table, a text
that was generated, or a model.

    for leaving in leavings("runs"):
        leaving.path, leaving.size, leaving.what
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from auditgap.errors import UsageError
from auditgap.store.files import disk_errors
from auditgap.store.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Leaving:
    """A file or folder that may go. `size` in bytes."""

    path: Path
    what: str
    size: int

    def delete(self) -> None:
        """Raises DiskError."""
        with disk_errors(self.path):
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)


def leavings(folder: Path | str) -> list[Leaving]:
    """Of every run at or below the folder, those that take space first. Raises UsageError where
    there is no run, and where one is being written."""
    root = Path(folder)
    runs = sorted({path.parent for name in _MARKS for path in root.rglob(name)})
    if not runs:
        raise UsageError(
            f"{root} holds no run. Give the folder of one, or one above it: auditgap clean runs"
        )
    found = [one for run in runs for one in _of(run)]
    return sorted(found, key=lambda one: -one.size)


_MARKS = ("run.json", "train.json")


def _of(run: Path) -> Iterator[Leaving]:
    if (run / "run.json").is_file():
        store = RunFolder.load(run)
        if holder := store.holder():
            raise UsageError(
                f"{run} is being written (pid {holder.get('pid')} on {holder.get('host')}). Wait"
                " for it, or give another folder."
            )
        unfinished = store.status().missing > 0
        spared = {store.journals} if unfinished else set[Path]()  # answers that were paid for
        yield from _all(
            sorted(set(run.glob("scratch/*")) - spared),
            "work inside cells that are not finished; resuming does it again"
            if unfinished
            else "work of cells that are finished",
        )
    if (run / "train.json").is_file() and (run / "model").is_dir():
        yield from _all([run / "checkpoints"], "checkpoints of a training that is done")
    yield from _all([run / "features"], "activations; they are extracted again when wanted")
    for pattern in ("*.corrupt", "cells/*.corrupt", "generations/*.corrupt"):
        yield from _all(sorted(run.glob(pattern)), "damaged, set aside and computed again")


def _all(paths: list[Path], what: str) -> Iterator[Leaving]:
    for path in paths:
        if path.exists() and not path.is_symlink():
            yield Leaving(path, what, _size(path))


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
