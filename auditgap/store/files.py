"""Bytes that are on the disk whole or not at all.

    # tmp beside it, fsync, rename: a reader never sees half a file
    write_bytes(Path("out/run.json"), b"{}")
    # out/cells/9c1e….1.corrupt: kept for whoever wants to look
    set_aside(Path("out/cells/9c1e…"))

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from auditgap.errors import AuditgapError

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
}


class DiskError(AuditgapError):
    """The disk said no (full, over quota, read-only): a sweep stops here, because every other cell
    would fail too."""


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


def read(path: Path | str) -> bytes:
    """The file's bytes. A resume reads 200,000 files, and with pathlib that takes three times as
    long."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
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


def place_folder(final: Path, contents: Mapping[str, bytes], *, stays: Callable[[], bool]) -> None:
    """Rename a whole new folder of `contents` (name → bytes) to `final`; what is there makes way,
    unless `stays()`.

    Raises DiskError.
    """
    tmp, old = temporary(final), temporary(final)
    with disk_errors(final, sum(map(len, contents.values()))):
        try:
            tmp.mkdir()
            for name, data in contents.items():
                write_new(tmp / name, data)
            sync_folder(tmp)
            while True:
                if final.exists() and not stays() and final.exists():
                    os.rename(final, old)
                elif final.exists():
                    return
                try:
                    os.rename(tmp, final)
                    break
                except OSError:  # somebody was quicker between the look and the rename: look again
                    if not final.exists():
                        raise
                    remove(old)
            sync_folder(final.parent)
        finally:
            remove(tmp)
            remove(old)


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
    """Where what can be made again is kept: $AUDITGAP_CACHE, else the user's cache folder."""
    root = (
        os.environ.get("AUDITGAP_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auditgap"
    )
    return Path(root)


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
