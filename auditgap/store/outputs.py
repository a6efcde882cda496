"""What stands in a run's folder beside its cells: work that a kill must not lose, tables and
texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from auditgap.errors import UsageError
from auditgap.store import files, scratch, tables
from auditgap.store.remote import Mirror, within

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_OURS = ("run.json", "plan.json", "lock.json")


class Outputs:
    """A folder on a disk or on object storage, and how to put things into it."""

    path: Path  #: on this machine
    mirror: Mirror | None  #: None on a disk; else what joins `path`, the working copy, and storage
    place: str | Path  #: how others name it, and open it

    def at(self, *names: str) -> str | Path:
        """What stands in the folder, by the name that others find it under:
        s3://bucket/run/report.html."""
        return within(self.place, *names)

    def publish(self) -> None:
        """Upload what has changed at the top and in figures/, for a folder on object storage; else
        there is nothing to do."""
        if self.mirror is not None:
            self.mirror.publish()

    def _scratch(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise UsageError(
                f"A scratch name is a hash (letters, digits, . _ -); {name[:40]!r} came."
            )
        return self.path / "scratch" / f"{name}.safetensors"

    @property
    def journals(self) -> Path:
        """Where endpoints' answers are kept, one by one, until their cells are written."""
        return self.path / "scratch" / "journals"

    def remember(
        self, name: str, compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The arrays stored under `name`, or what `compute` gives, stored first: how work inside a
        cell survives a kill.

        Name it by a hash of everything that the arrays depend on; more in `auditgap.store.scratch`.
        Raises DiskError.
        """
        return scratch.remember(self._scratch(name), compute)

    def remembers(self, name: str) -> bool:
        """Whether arrays are stored under `name` (`remember` still looks whether they are
        whole)."""
        return self._scratch(name).exists()

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Delete scratch arrays whose cells are written, or all of them with the journals; unknown
        names are no error."""
        if names is None:
            files.remove(self.journals)
            names = [path.stem for path in (self.path / "scratch").glob("*.safetensors")]
        for name in names:
            files.remove(self._scratch(name))

    def _output(self, name: str) -> Path:
        if not NAME.fullmatch(name) or name in _OURS:
            raise UsageError(
                f"An output is a plain file name in the run folder; {name[:80]!r} came."
            )
        return self.path / name

    def _write(self, name: str, data: bytes) -> Path:
        path = self.path / name
        files.write_bytes(path, data)
        self.publish()
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write DIR/<name> atomically as UTF-8; a lone surrogate becomes its escape. Returns the
        path."""
        return self._write(self._output(name).name, text.encode("utf-8", "backslashreplace"))

    def write_table(self, name: str, frame: pd.DataFrame) -> Path:
        """Write DIR/<name> (.parquet, .csv with formulas made inert, or .md) atomically, nothing
        rounded."""
        path = self._output(name)
        if path.suffix == ".parquet":
            return self._write(name, tables.seal(frame))
        if path.suffix not in (".csv", ".md"):
            raise UsageError(f"A table is written as .parquet, .csv or .md; {name!r} came.")
        return self.write_text(
            name, tables.to_csv(frame) if path.suffix == ".csv" else tables.to_markdown(frame)
        )
