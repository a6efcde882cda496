"""A run folder on object storage: a working copy here, and the storage that makes a file count.

    # the same calls as on a disk
    store = RunFolder.open("s3://bucket/runs/llama", config=…, info=…)
    mirror = store.mirror
    # ~/.cache/auditgap/storage/3f2a…: where tables and reports are written and read
    mirror.path
    mirror.pull("cells")              # one listing, then what is new, several at a time

Objects are named as the files of a run folder are (`auditgap.store`), so that a copy of the prefix
is a run folder. `cells/` of the working copy holds nothing that storage does not; `scratch/` never
leaves the machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.store import files
from auditgap.store.objects import THREADS, Objects, shown

OUTPUTS = ("figures", "tables")  #: the folders of outputs beside the files at the top
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

Place = str | os.PathLike[str]  #: of a run folder: a path, or a URL such as s3://bucket/runs/llama


def is_url(place: Place) -> bool:
    """Whether a place is on object storage (`s3://…`) and no path."""
    return isinstance(place, str) and "://" in place


def within(place: Place, *names: str) -> str | Path:
    """A place inside a place: `within("s3://b/grid", "case")` is s3://b/grid/case, a path stays a
    path."""
    return "/".join((str(place).rstrip("/"), *names)) if is_url(place) else Path(place, *names)


def mirror_of(place: Place) -> Mirror | None:
    """The mirror of a URL; None for a path. Raises UsageError for a URL that cannot be a run's."""
    return Mirror(str(place)) if is_url(place) else None


def absolute(place: Place) -> str:
    """The place by a name that holds in every process: of a path the absolute one."""
    return str(place) if is_url(place) else os.path.abspath(place)


def local(place: Place) -> Path:
    """Where a place's files are on this machine: the path itself, or the working copy of a URL."""
    mirror = mirror_of(place)
    return Path(place).absolute() if mirror is None else mirror.path


def read_output(place: Place, name: str) -> bytes | None:
    """A table or report in a place, as it is there now; None when there is none."""
    mirror = mirror_of(place)
    if mirror is not None:
        return mirror.read(name)
    return (Path(place) / name).read_bytes() if (Path(place) / name).is_file() else None


@contextmanager
def outputs(place: Place) -> Iterator[Path]:
    """The folder on this machine to write a place's tables and figures in; for a URL they are
    uploaded after the block."""
    mirror = mirror_of(place)
    yield Path(place).absolute() if mirror is None else mirror.path
    if mirror is not None:
        mirror.publish()


def needs_disk(place: Place | None, command: str) -> None:
    """Raises UsageError when `place` is a URL and `command` keeps more there than finished
    files."""
    if place is not None and is_url(place):
        raise UsageError(
            f"{command} needs a folder on a disk, and {shown(str(place))} is none. For example:"
            " --out runs/mine"
        )


class Mirror(Objects):
    """One prefix of object storage and its working copy. Picklable: it travels as its URL and
    reaches storage by itself."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.path = files.cache_dir() / "storage" / files.sha256(self.url.encode("utf-8"))[:16]
        self._make_folders()
        self._sent = self._outputs()  # what an earlier process left here is not ours to send

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.url,)

    def pull(self, folder: str) -> None:
        """Have a folder here as storage has it: one listing, then what is new; what storage has no
        more goes. Its files never change, so what is here is not asked for again."""
        root = self.path / folder
        here = {
            path.relative_to(self.path).as_posix()
            for path in root.rglob("*")
            if path.is_file() and all(map(is_key, path.relative_to(root).parts))
        }
        # after the look here: nobody has just written what is missing there
        there = {
            name
            for name in self.names(folder)
            if len(parts := name.split("/")) <= 3 and all(map(is_key, parts))
        }
        for name in here - there:
            files.remove(self.path / name)
            if (parent := (self.path / name).parent) != root and not any(parent.iterdir()):
                parent.rmdir()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self.fetch, sorted(there - here)))

    def fetch(self, name: str, mode: int = 0o666) -> bytes | None:
        """Have one file here as storage has it, and return its bytes; None when there is none."""
        data = self.read(name)
        if data is not None:
            with files.disk_errors(self.path / name):
                (self.path / name).parent.mkdir(exist_ok=True)
            files.write_bytes(self.path / name, data, mode)
        return data

    def pull_file(self, name: str, mode: int = 0o666) -> bytes | None:
        """Have one file here as storage has it, and return its bytes; None when there is none, then
        it goes here too."""
        data, path = self.read(name), self.path / name
        if data is None:
            files.remove(path)
        elif not path.is_file() or path.read_bytes() != data:
            files.write_bytes(path, data, mode)
        self._sent = {**self._sent, **({name: _stamp(path)} if data is not None else {})}
        return data

    def publish(self) -> None:
        """Upload the outputs (files at the top, and OUTPUTS) that have changed here since the last
        time; what has gone goes."""
        now = self._outputs()
        for name, stamp in now.items():
            if self._sent.get(name) != stamp:
                self.write(name, (self.path / name).read_bytes())
        for folder in OUTPUTS:
            ours, sent = (
                {n for n in all_ if n.startswith(f"{folder}/")} for all_ in (now, self._sent)
            )
            if ours != sent:
                # of an earlier report: it would pass for this one's
                for name in set(self.names(folder)) - ours:
                    self.delete(name)
        self._sent = now

    def clear(self) -> None:
        """Empty the working copy: storage has no such run (any more)."""
        for path in self.path.iterdir():
            if not path.name.startswith("."):
                files.remove(path)
        self._make_folders()
        self._sent = {}

    def _make_folders(self) -> None:
        with files.disk_errors(self.path):
            self.path.mkdir(mode=files.PRIVATE_FOLDER, parents=True, exist_ok=True)
            for folder in ("cells", "generations", "scratch"):
                (self.path / folder).mkdir(mode=files.PRIVATE_FOLDER, exist_ok=True)

    def _outputs(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, start in ((self.path, ""), *((self.path / n, f"{n}/") for n in OUTPUTS)):
            for path in folder.iterdir() if folder.is_dir() else ():
                if (
                    path.is_file()
                    and not path.name.startswith(".")
                    and not path.name.endswith(".corrupt")
                ):
                    found[start + path.name] = _stamp(path)
        return found


def is_key(name: str) -> bool:
    """Whether a name is one that we give: not hidden, not set aside, no path."""
    return bool(_KEY.fullmatch(name)) and not name.endswith(".corrupt")


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with every atomic write."""
    about = path.stat()
    return about.st_mtime_ns, about.st_ino
