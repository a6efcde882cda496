"""SHA-256 of large files, each read once a machine.

    digests(weights_files(folder))      # in order, files read side by side

What was read is remembered in the user's cache by what tells a file and its state: device, inode,
size, and the times when its bytes and its inode last changed. A time of change cannot be set back
by its owner, so a file that was written to is read again, whatever its name and date say. A file
that changed in the last seconds is not remembered: it could change again within the same tick.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from auditgap.store.files import (
    PRIVATE,
    PRIVATE_FOLDER,
    Damaged,
    DiskError,
    cache_dir,
    read_document,
    write_document,
)
from auditgap.types import digest

SMALL = 1 << 20  #: bytes; below, reading the file costs no more than looking it up
SETTLED = 2.0  #: seconds since the last change from which on a file is remembered
_AT_ONCE = 8


def digests(paths: Sequence[Path]) -> list[bytes]:
    """The SHA-256 of each file's bytes, in order. Raises OSError."""
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1, max(1, len(paths)))) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        seen = os.fstat(file.fileno())
        if seen.st_size < SMALL:
            return hashlib.file_digest(file, "sha256").digest()
        state = [seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]
        entry = cache_dir() / "digests" / f"{digest(state, 32)}.json"
        known = _known(entry, state)
        if known is not None:
            return known
        found = hashlib.file_digest(file, "sha256").digest()
        after = os.fstat(file.fileno())
    is_settled = time.time() - max(after.st_mtime, after.st_ctime) >= SETTLED
    if is_settled and (after.st_mtime_ns, after.st_ctime_ns) == (
        seen.st_mtime_ns,
        seen.st_ctime_ns,
    ):
        with suppress(OSError, DiskError):  # a cache that cannot be written saves nothing
            entry.parent.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
            write_document(entry, {"state": state, "sha256": found.hex()}, PRIVATE)
    return found


def _known(entry: Path, state: list[int]) -> bytes | None:
    """What was read of a file in this state; None: nothing that can be relied on."""
    try:
        document = read_document(entry)
        if document is None or document.get("state") != state:
            return None
        found = bytes.fromhex(str(document.get("sha256")))
    except (Damaged, OSError, ValueError):
        return None
    return found if len(found) == hashlib.sha256().digest_size else None
