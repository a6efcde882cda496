"""Bytes that are on the disk whole or not at all.

    # tmp beside it, fsync, rename: a reader never sees half a file
    write_bytes(Path("out/run.json"), b"{}")
    # out/plan.json.1.corrupt: kept for whoever wants to look
    set_aside(Path("out/plan.json"))
    # JSON that carries its own checksum: the one door to the documents of a run
    write_document(Path("out/plan.json"), {"cells": []});  read_document(Path("out/plan.json"))

Temporary names carry host and process (`.run.json.node7.4242-1f3a….tmp`), so that a later run can
tell the leavings of a dead process from the work of a live one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from auditgap.errors import AuditgapError, UsageError
from auditgap.types import Document, canonical

CHECKSUM = "checksum"  #: the member of a sealed document that holds its SHA-256
PRIVATE = 0o600  #: mode of files that can hold prompts or completions
PRIVATE_FOLDER = 0o700
HOST = socket.gethostname()

_HOST_IN_NAMES = re.sub(r"[^A-Za-z0-9-]", "_", HOST)
_TMP = re.compile(r"^\..+\.(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>\d+)-[0-9a-f]+\.tmp$")
_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make the file system writable or choose another folder",
    errno.EACCES: "check the folder's permissions or choose another folder",
    errno.EPERM: "check the folder's permissions or choose another folder",
    errno.EIO: "check the disk",
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.ESTALE),
        "it was moved or removed under the run, so put it back or name its new place",
    ),
}


class DiskError(AuditgapError):
    """The disk said no (full, over quota, read-only): a sweep stops here, because every other cell
    would fail too."""


class Damaged(UsageError):
    """A stored file is not what was written; the message names it and says what to do."""

    def __init__(self, path: Path | str, why: str, advice: str = "") -> None:
        advice = advice or "Run the command that wrote it again: what it held is made anew."
        super().__init__(f"{path} is damaged: {why}. {advice}")


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` (`needed` bytes) into a sentence
    (`DiskError`)."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise DiskError(
            f"Could not write {path} ({needed:,} bytes needed): {os.strerror(error.errno)}. What"
            f" was finished before is intact; {_ADVICE[error.errno]}, then run the same command"
            " again."
        ) from error


def check_writable(folder: Path) -> None:
    """Raises UsageError where a folder could not be made, DiskError where nothing could be written
    into it; makes nothing."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(
            f"{there} is a file; a run needs a folder of its own. Choose another name."
        )
    with disk_errors(folder):
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, "")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")


def make_folder(path: Path) -> None:
    """Have a folder, with those above it. Raises UsageError where none can ever be made (below a
    file, below /proc), DiskError as everything that writes."""
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(
                f"The folder {path} cannot be made: {os.strerror(error.errno or errno.ENOENT)}."
                " Choose one below a folder that can be written to, for example --out runs/mine."
            ) from error


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def to_json(value: Any, indent: int | None = 1) -> bytes:
    """JSON in ASCII (a lone surrogate survives as an escape); NaN and infinity raise ValueError:
    they are no JSON."""

    def plain(x: Any) -> Any:  # numpy scalars become numbers, paths and the like their text
        return x.item() if hasattr(x, "item") else str(x)

    return (
        json.dumps(value, ensure_ascii=True, allow_nan=False, indent=indent, default=plain) + "\n"
    ).encode("ascii")


def seal(document: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """The document as JSON with its own checksum: the SHA-256 of its canonical JSON."""
    body = json.loads(to_json(document, indent=None))
    return to_json({**body, CHECKSUM: sha256(canonical(body).encode("ascii"))}, indent=indent)


def unseal(path: Path | str, *, required: bool = True, advice: str = "") -> Document:
    """The sealed document in a file, without its checksum. `required`: one that has none is
    damaged; else it is of a release that wrote none.

    Raises Damaged, FileNotFoundError.
    """
    return opened(read(path), path, required=required, advice=advice)


def opened(data: bytes, path: Path | str, *, required: bool = True, advice: str = "") -> Document:
    """The same of bytes that `path` held. Raises Damaged."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise Damaged(path, "it cannot be read as JSON", advice) from None
    if not isinstance(document, dict):
        if required:
            raise Damaged(path, "it is no JSON object", advice)
        return document
    if CHECKSUM not in document and not required:
        return _of_earlier(document, path, advice)
    if not _is_sum_of(document.pop(CHECKSUM, None), document):
        raise Damaged(path, "its checksum is not that of its content", advice)
    return document


def _of_earlier(document: Document, path: Path | str, advice: str) -> Document:
    """A document without a checksum. Raises Damaged where it has one under a changed name."""
    last = next(reversed(document), "")
    if last and _is_sum_of(document[last], {k: v for k, v in document.items() if k != last}):
        raise Damaged(path, f"its checksum is called {last!r}", advice)
    return document


def _is_sum_of(stored: Any, document: Document) -> bool:
    try:
        return stored == sha256(canonical(document).encode("ascii"))
    except ValueError:  # NaN or infinity, which we never write
        return False


def write_document(path: Path, document: Mapping[str, Any], mode: int = 0o666) -> None:
    """Replace `path` by the sealed document. Raises DiskError."""
    write_bytes(path, seal(document), mode)


def read_document(path: Path | str, advice: str = "") -> Document | None:
    """The document in a file, checked; None where there is no file. One that an earlier release
    wrote has no checksum and is taken as it is. Raises Damaged."""
    try:
        document: Any = unseal(path, required=False, advice=advice)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(document, dict):
        raise Damaged(path, "it is no JSON object", advice)
    return document


def read(path: Path | str) -> bytes:
    """The file's bytes. A resume reads 10,000 files, and with pathlib that takes three times as
    long."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts, left = [], max(1, os.fstat(descriptor).st_size)
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def read_json(path: Path | str) -> Any | None:
    """The parsed file; None when it is absent, torn or no JSON."""
    try:
        return json.loads(read(path))
    except (OSError, ValueError, RecursionError):
        return None


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses and that says who made it."""
    return path.with_name(f".{path.name}.{_HOST_IN_NAMES}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Create `path` with `data` and fsync it (not atomic by itself: for files inside a temporary
    folder)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace `path` by `data` atomically and durably. Raises DiskError."""
    tmp = temporary(path)
    with disk_errors(path, len(data)):
        try:
            write_new(tmp, data, mode)
            os.replace(tmp, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                tmp.unlink()
            raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; file systems that cannot (some network ones) are left
    alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Where what can be made again is kept: $AUDITGAP_CACHE, else the user's cache folder. Raises
    UsageError where nobody says whose that is."""
    if own := os.environ.get("AUDITGAP_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auditgap"
    except RuntimeError:  # a number without an entry among the users, as in a container
        raise UsageError(
            "This user has no home folder (HOME is not set, and the system knows none). Set"
            " AUDITGAP_CACHE to a folder that can be written to."
        ) from None


def folder_name(name: str) -> str:
    """A stranger's name (a model's, as typed) as the name of one folder: its last part, if that is
    plain; else its plain letters and a hash of all of it, so that two names stay two folders and
    none leads elsewhere."""
    last = Path(name).name
    if re.fullmatch(r"[A-Za-z0-9_=+@-][A-Za-z0-9_.=+@-]{0,99}", last):
        return last
    plain = re.sub(r"[^A-Za-z0-9_.=+@-]+", "_", last)[:60].strip("._")
    return f"{plain or 'model'}-{sha256(name.encode('utf-8', 'surrogatepass'))[:8]}"


def set_aside(path: Path) -> Path:
    """Rename a torn file or folder to `<name>.<n>.corrupt` and return the new path. Raises
    DiskError."""
    n = 1
    while (aside := path.with_name(f"{path.name}.{n}.corrupt")).exists():
        n += 1
    with disk_errors(aside):
        os.rename(path, aside)
    return aside


def alive(pid: int) -> bool:
    """Whether a process with this id runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def clean_stale(folder: Path) -> int:
    """Delete temporaries whose maker is dead on this host; those of other hosts may be in use, so
    they stay."""
    stale = []
    for path in folder.glob(".*.tmp"):
        name = _TMP.match(path.name)
        if name and name["host"] == _HOST_IN_NAMES and not alive(int(name["pid"])):
            stale.append(path)
    for path in stale:
        remove(path)
    return len(stale)
