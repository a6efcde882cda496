"""Which cells were read and found whole, and what their files looked like then: a resume need not
read them again.

    seen = Seen(Path("out/index"))
    mark = seen.mark("out/cells/9c1e…")         # sizes, times and inodes of its two files
    # False; and once seen.add({"9c1e…": mark}) was said: True
    seen.holds("9c1e…", mark)

As with git's index, a file of the same inode, size and time is taken for the same. That is a hint,
and never more: every number that is shown comes from a file that is read and checked then, and
whoever finds a cell torn drops it here, so that the next run computes it again. The file may be
deleted at any time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from auditgap.errors import AuditgapError
from auditgap.store import files

NAME = "seen.json"
#: Fewer cells than this are read every time, sooner than this file is.
SMALL = 2000

Mark = list[int]


class Seen:
    """The marks of one run folder, read when first asked for. Pickled without them: what a worker
    sees is its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._lock = threading.Lock()
        self._marks: dict[str, Mark] | None = None

    def __reduce__(self) -> tuple[type[Seen], tuple[Path]]:
        return Seen, (self.path.parent,)

    @staticmethod
    def mark(cell: str) -> Mark | None:
        """What the two files of a cell's folder look like; None where one is not there."""
        try:
            stats = os.stat(f"{cell}/record.json"), os.stat(f"{cell}/rows.parquet")
        except OSError:
            return None
        return [value for stat in stats for value in (stat.st_mtime_ns, stat.st_size, stat.st_ino)]

    def holds(self, key: str, mark: Mark | None) -> bool:
        """Whether the cell was found whole when its files looked like that."""
        return mark is not None and self._known().get(key) == mark

    def add(self, marks: Mapping[str, Mark]) -> None:
        """Remember cells that were read and found whole; `mark` was taken before they were read."""
        if not marks:
            return
        with self._lock:
            known = self._loaded()
            known.update(marks)
            if len(known) >= SMALL:
                self._save(known)

    def drop(self, key: str) -> None:
        """Forget a cell that was found torn."""
        with self._lock:
            known = self._loaded()
            if known.pop(key, None) is not None:
                self._save(known)

    def _known(self) -> dict[str, Mark]:
        if self._marks is None:
            with self._lock:
                self._loaded()
        return self._marks or {}

    def _loaded(self) -> dict[str, Mark]:
        if self._marks is None:
            found = files.read_json(self.path)
            self._marks = (
                {k: v for k, v in found.items() if isinstance(v, list)}
                if isinstance(found, dict)
                else {}
            )
        return self._marks

    def _save(self, known: Mapping[str, Mark]) -> None:
        # a folder that can only be read, a full disk: no hint, then
        with suppress(OSError, AuditgapError):
            self.path.parent.mkdir(exist_ok=True)
            files.write_bytes(self.path, files.to_json(known, indent=None))
