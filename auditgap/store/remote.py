"""A run folder on object storage: a working copy here, and the storage that makes a cell count.

    # the same calls as on a disk
    store = RunFolder.open("s3://bucket/runs/llama", config=…, info=…)
    mirror = store.mirror
    # ~/.cache/auditgap/storage/3f2a…: where tables and reports are written and read
    mirror.path
    # the record last: it makes the cell count
    mirror.push_cell("9c1e…", {"rows.parquet": rows, "record.json": record})
    mirror.pull_cells()               # one listing, then what is new, several at a time

Objects are named as the files of a run folder are (`auditgap.store`), so that a copy of the prefix
is a run folder. `cells/` of the working copy holds nothing that storage does not; `scratch/` never
leaves the machine. Credentials are those that the storage's own library finds (for S3 the
environment, ~/.aws or the machine's role); none is taken, kept or shown here.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from auditgap.errors import UsageError
from auditgap.store import files
from auditgap.store.files import DiskError

#: Storage whose objects appear whole or not at all, and the package that reaches it.
PROTOCOLS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "memory": "fsspec",
}
THREADS = 16  #: downloads at a time
FIRST_SECONDS = 6.0  #: of trying before storage that has never answered is given up,
PATIENCE = 30.0  #: and storage that has answered this process before
OUTPUTS = "figures"  #: the one folder of outputs beside the files at the top

_EXISTS = ("PreconditionFailed", "412")
_NO_CONDITIONS = ("NotImplemented", "501")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_PART = re.compile(r"[A-Za-z0-9_=+@,:~-][A-Za-z0-9_.=+@,:~-]{0,254}")

Place = str | os.PathLike[str]  #: of a run folder: a path, or a URL such as s3://bucket/runs/llama
_Answer = TypeVar("_Answer")


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
            f"{command} needs a folder on a disk, and {_shown(str(place))} is none. For example:"
            " --out runs/mine"
        )


class Mirror:
    """One prefix of object storage and its working copy. Picklable: it travels as its URL and
    reaches storage by itself."""

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self.path = files.cache_dir() / "storage" / files.sha256(self.url.encode("utf-8"))[:16]
        self._make_folders()
        # finished cells that this process has seen to be in storage and here
        self._whole: set[str] = set()
        self._sent = self._outputs()  # what an earlier process left here is not ours to send
        self._answered = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.url,)

    # --------------------------------------------------------------- objects

    def read(self, name: str) -> bytes | None:
        """The object's bytes; None when there is none. Raises DiskError, as all below do, when
        storage does not answer."""
        try:
            found = self._ask(lambda: self._system.cat_file(self._object(name)))
            return found.encode() if isinstance(found, str) else found
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> Any | None:
        """The object's JSON; None when it is absent or none."""
        try:
            return json.loads(self.read(name) or b"")
        except (ValueError, RecursionError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Put the object, whole or not at all."""
        try:
            self._ask(lambda: self._system.pipe_file(self._object(name), data))
        except FileNotFoundError as error:
            raise self._refusal(error) from None

    def create(self, name: str, data: bytes) -> bool:
        """Put the object unless there is one; False when somebody else's is there."""
        path = self._object(name)

        def put() -> None:
            try:
                self._system.pipe_file(path, data, mode="create")
            except OSError as error:
                if _code(error) in _EXISTS:
                    raise FileExistsError(name) from None
                if _code(error) not in _NO_CONDITIONS:
                    raise
                if self._system.exists(path):  # storage without conditional writes: nearly as good
                    raise FileExistsError(name) from None
                self._system.pipe_file(path, data)

        try:
            self._ask(put)
        except FileNotFoundError as error:
            raise self._refusal(error) from None
        except FileExistsError:
            return self.read(name) == data  # ours, when only the answer to it was lost
        return True

    def delete(self, name: str) -> None:
        """Delete the object, if it is there."""
        with suppress(FileNotFoundError):
            self._ask(lambda: self._system.rm_file(self._object(name)))

    def names(self, under: str) -> list[str]:
        """All objects below the folder `under` ("": everything), as names such as
        cells/9c1e…/record.json; one listing."""
        return self._below(lambda: self._system.find(self._object(under) if under else self._root))

    def entries(self) -> list[str]:
        """What stands at the top: names of objects and of folders."""
        return self._below(lambda: self._system.ls(self._root, detail=False))

    def folders_with(self, file: str) -> list[str]:
        """The folders at the top that have such a file."""
        return [
            name
            for name in sorted(self.entries())
            if _PART.fullmatch(name) and self.read(f"{name}/{file}") is not None
        ]

    def _below(self, call: Callable[[], Iterable[str]]) -> list[str]:
        try:
            found = self._ask(call)
        except FileNotFoundError:
            return []
        start = f"{self._root}/"
        return [
            path[len(start) :].rstrip("/")
            for path in found
            if path.startswith(start) and path != start
        ]

    def _object(self, name: str) -> str:
        return f"{self._root}/{name}"

    @cached_property
    def _root(self) -> str:
        return str(self._system._strip_protocol(self.url)).rstrip("/")

    @cached_property
    def _system(self) -> fsspec.AbstractFileSystem:
        protocol = self.url.split("://")[0]
        # others write there too
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        s3 = PROTOCOLS[protocol] == "s3fs"
        # it would try for minutes where nobody answers; how often and how long is decided in `_ask`
        if s3:
            # of one object's parts: it would ask for its size before every download
            options["max_concurrency"] = 1
            options["config_kwargs"] = {
                "connect_timeout": 4,
                "read_timeout": 8,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": THREADS,
            }
        try:
            # of abfs:// the account's name stands in the URL
            system, _ = fsspec.url_to_fs(self.url, **options)
        except ImportError:
            extra = "'auditgap[s3]'" if s3 else PROTOCOLS[protocol]
            raise UsageError(
                f"{protocol}:// needs {PROTOCOLS[protocol]}, which is not installed. Type: pip"
                f" install {extra}"
            ) from None
        except Exception as error:
            raise self._refusal(error) from None
        if s3:
            system.retries = 1
        return system

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        """What `call` gives, tried again while storage does not answer; then a sentence
        (DiskError), never its own words, which can hold keys. FileNotFoundError and FileExistsError
        of an object go through."""
        until = time.monotonic() + (PATIENCE if self._answered else FIRST_SECONDS)
        pause = 0.2
        while True:
            try:
                answer = call()
                self._answered = True
                return answer
            except (FileNotFoundError, FileExistsError) as error:
                if _code(error) == "NoSuchBucket":
                    raise self._refusal(error) from None
                self._answered = True
                raise
            except (UsageError, DiskError):
                raise
            except Exception as error:
                if _hopeless(error) or time.monotonic() + pause > until:
                    self._answered = False  # what is asked on the way out waits less
                    raise self._refusal(error) from None
            time.sleep(pause)
            pause = min(2 * pause, 4.0)

    def _refusal(self, error: Exception) -> DiskError:
        if isinstance(error, FileNotFoundError):
            return DiskError(
                f"There is no bucket for {self.url}. Make it, or check the name, then run the same"
                " command again."
            )
        if _hopeless(error):
            return DiskError(
                f"Storage refused {self.url} ({_reason(error)}): no credentials, or none that may"
                " do this. Set them as its own tools want them (S3: AWS_ACCESS_KEY_ID with"
                " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) and run the same command again."
            )
        return DiskError(
            f"Storage does not answer for {self.url} ({_reason(error)}). What was finished before"
            " is intact; check the network and the endpoint (S3: AWS_ENDPOINT_URL), then run the"
            " same command again."
        )

    # ----------------------------------------------------------------- cells

    def push_cell(self, key: str, contents: Mapping[str, bytes]) -> None:
        """Upload a cell's files in their order: record.json stands last, and until it is there
        nothing counts."""
        for name, data in contents.items():
            self.write(f"cells/{key}/{name}", data)
        if "rows.parquet" in contents:
            self._whole.add(key)

    def pull_cells(self) -> None:
        """Have `cells/` here as storage has it: one listing, then what is new; what storage has no
        more goes.

        A finished cell that is here is not asked for again (its rows' checksum is the reader's to
        check), a failed one is.
        """
        here = set(filter(_is_key, os.listdir(self.path / "cells")))
        found = (name.split("/") for name in self.names("cells"))
        there = {
            parts[1]
            for parts in found
            if len(parts) == 3 and parts[2] == "record.json" and _is_key(parts[1])
        }
        for key in here - there:  # looked at before the listing, so nobody has just finished it
            files.remove(self.path / "cells" / key)
        self._whole &= there
        self._whole |= {key for key in (here & there) - self._whole if self._is_done(key)}
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self.pull_cell, sorted(there - self._whole)))

    def pull_cell(self, key: str, *, afresh: bool = False) -> None:
        """Have one cell here as storage has it; `afresh`: also one that was finished when it was
        last looked at.

        One that is torn in storage is put aside (`*.corrupt`) and counts as absent.
        """
        if key in self._whole and not afresh:
            return
        self._whole.discard(key)
        final = self.path / "cells" / key
        was_here = final.exists()
        data = self.read(f"cells/{key}/record.json")
        if data is None:
            if was_here:
                files.remove(final)
            return
        record = _record(data)
        contents = {"record.json": data}
        if record.get("status") == "done":
            if self._same(final, data, record):
                self._whole.add(key)
                return
            rows = self.read(f"cells/{key}/rows.parquet")
            contents = {} if rows is None else {"rows.parquet": rows, **contents}
            record = (
                record if rows is not None and files.sha256(rows) == record.get("sha256") else {}
            )
        elif (final / "record.json").is_file() and (final / "record.json").read_bytes() == data:
            return
        if not record:
            self._put_aside(key, data, contents)
            files.remove(final)
            return
        files.place_folder(final, contents, stays=lambda: self._same(final, data, record))
        if "rows.parquet" in contents:
            self._whole.add(key)

    def _is_done(self, key: str) -> bool:
        record = files.read_json(self.path / "cells" / key / "record.json")
        return isinstance(record, dict) and record.get("status") == "done"

    def _same(self, final: Path, data: bytes, record: Mapping[str, Any]) -> bool:
        """Whether `final` holds this record and the rows that it speaks of."""
        try:
            if (final / "record.json").read_bytes() != data:
                return False
            return record.get("status") != "done" or files.sha256(
                (final / "rows.parquet").read_bytes()
            ) == record.get("sha256")
        except OSError:
            return False

    def _put_aside(self, key: str, record: bytes, contents: Mapping[str, bytes]) -> None:
        aside = self.path / "cells" / f"{key}.{files.sha256(record)[:8]}.corrupt"
        if not aside.exists():  # else it was seen before
            files.place_folder(aside, {"record.json": record, **contents}, stays=lambda: True)

    # ----------------------------------------------------------------- files

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
        """Upload the outputs (files at the top, and `figures/`) that have changed here since the
        last time; what has gone goes."""
        now = self._outputs()
        for name, stamp in now.items():
            if self._sent.get(name) != stamp:
                self.write(name, (self.path / name).read_bytes())
        figures = {name for name in now if name.startswith(f"{OUTPUTS}/")}
        if figures != {name for name in self._sent if name.startswith(f"{OUTPUTS}/")}:
            # of an earlier report: it would pass for this one's
            for name in set(self.names(OUTPUTS)) - figures:
                self.delete(name)
        self._sent = now

    def clear(self) -> None:
        """Empty the working copy: storage has no such run (any more)."""
        for path in self.path.iterdir():
            if not path.name.startswith("."):
                files.remove(path)
        self._make_folders()
        self._whole, self._sent = set(), {}

    def _make_folders(self) -> None:
        with files.disk_errors(self.path):
            self.path.mkdir(mode=files.PRIVATE_FOLDER, parents=True, exist_ok=True)
            for folder in ("cells", "generations", "scratch"):
                (self.path / folder).mkdir(mode=files.PRIVATE_FOLDER, exist_ok=True)

    def _outputs(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, start in ((self.path, ""), (self.path / OUTPUTS, f"{OUTPUTS}/")):
            for path in folder.iterdir() if folder.is_dir() else ():
                if (
                    path.is_file()
                    and not path.name.startswith(".")
                    and not path.name.endswith(".corrupt")
                ):
                    found[start + path.name] = _stamp(path)
        return found


def _is_key(name: str) -> bool:
    return bool(_KEY.fullmatch(name)) and not name.endswith(".corrupt")


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with every atomic write."""
    about = path.stat()
    return about.st_mtime_ns, about.st_ino


def _record(data: bytes) -> dict[str, Any]:
    """A cell's record; {} when it is torn."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return (
        record
        if isinstance(record, dict) and record.get("status") in ("done", "failed", "retrying")
        else {}
    )


def _checked(url: str) -> str:
    """The URL without a slash at its end. Raises UsageError: no storage that we know, credentials
    in it, odd names."""
    protocol, _, rest = url.rstrip("/").partition("://")
    bucket, *parts = rest.split("/")
    # abfs://container@account/… is a name
    if ":" in bucket or ("@" in bucket and PROTOCOLS.get(protocol) != "adlfs"):
        raise UsageError(
            "The URL has a user, a password or a port in it, and would end up in logs with it."
            " Write s3://bucket/runs/llama, and set the rest in the storage's own variables (S3:"
            " AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)."
        )
    if protocol not in PROTOCOLS:
        raise UsageError(
            f"{_shown(url)}: a run's folder is a path, or a URL of {', '.join(sorted(PROTOCOLS))}."
            " For example: --out s3://bucket/runs/llama"
        )
    if not parts or not all(_PART.fullmatch(part) for part in (bucket, *parts)):
        raise UsageError(
            f"{_shown(url)} names no place for a run: a bucket and at least one folder, in plain"
            " letters. For example: --out s3://bucket/runs/llama"
        )
    return f"{protocol}://{rest}"


def _shown(url: str) -> str:
    """A URL as it may be shown: without what stands before an @ or behind a question mark."""
    protocol, _, rest = url.partition("://")
    return f"{protocol.rsplit('@')[-1][:20]}://{rest.rsplit('@', 1)[-1].split('?')[0][:200]}"


def _code(error: BaseException) -> str:
    """The storage's own word for an error, such as NoSuchBucket; "" where it has none."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _reason(error: BaseException) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "", _code(error))[:60] or type(error).__name__


def _hopeless(error: BaseException) -> bool:
    """Whether asking again cannot help: storage does not know us."""
    return (
        isinstance(error, PermissionError)
        or "Credential" in type(error).__name__
        or "ProfileNotFound" in type(error).__name__
    )
