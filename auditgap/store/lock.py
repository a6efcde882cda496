"""One writer a run folder: an OS lock that dies with its process, and a note beside it that says
who holds it.

    # a second writer gets: "out is being written by process 4242 on node7 (auditgap run …)"
    with hold(Path("out")):
        …

The OS lock is trusted on one host. A note left by *another* host is never overruled silently: on a
shared file system the lock may not travel, so `--break-lock` has to be said. A run on object
storage keeps its note there, put only where none is; the OS lock is then that of the working copy.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import filelock

from auditgap.errors import UsageError
from auditgap.store.files import (
    HOST,
    DiskError,
    alive,
    disk_errors,
    read_json,
    to_json,
    write_bytes,
)
from auditgap.store.remote import Mirror
from auditgap.types import Document

NOTE = "lock.json"


def holder(folder: Path, mirror: Mirror | None = None) -> Document | None:
    """Who writes the folder now: {"pid", "host", "command", "since"}; None when nobody does, as far
    as this host can see."""
    note = _note(folder, mirror)
    if note is None or (note["host"] == HOST and not alive(note["pid"])):
        return None
    return note


@contextmanager
def hold(folder: Path, *, break_lock: bool = False, mirror: Mirror | None = None) -> Iterator[None]:
    """Hold the folder's lock. Raises UsageError naming the holder when another process has it,
    DiskError."""
    shown = folder if mirror is None else mirror.url
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        with disk_errors(folder / ".lock"):
            lock.acquire()
    except filelock.Timeout:
        note = holder(folder, mirror)
        if not break_lock or (note is not None and note["host"] == HOST):
            raise UsageError(
                _refusal(shown, note, "Wait for it, stop it, or choose another folder")
            ) from None
        # the dead host's lock stays on the file that we take out of the way
        (folder / ".lock").unlink(missing_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    try:
        note = _note(folder, mirror)
        if note is not None and note["host"] != HOST and not break_lock:
            raise UsageError(
                _refusal(shown, note, "If that process is gone for certain, add --break-lock")
            )
        me = {
            "pid": os.getpid(),
            "host": HOST,
            "command": _command(),
            "since": _now(),
            "token": secrets.token_hex(8),  # a process of another container may have our pid
        }
        if mirror is None:
            write_bytes(folder / NOTE, to_json(me))
        else:
            _put(mirror, note, me)
        try:
            yield
        finally:
            with suppress(OSError, DiskError):  # a note that stays names a dead process
                if _note(folder, mirror) == me:  # and not that of one who broke the lock
                    if mirror is None:
                        (folder / NOTE).unlink()
                    else:
                        mirror.delete(NOTE)
    finally:
        lock.release()


def _put(mirror: Mirror, before: Document | None, me: Document) -> None:
    """Leave our note in storage in place of `before` (one that may be overruled, or none). Raises
    UsageError: somebody is there."""
    if before is not None:
        # with a cache folder of its own
        if before["host"] == HOST and before["pid"] != os.getpid() and alive(before["pid"]):
            raise UsageError(
                _refusal(mirror.url, before, "Wait for it, stop it, or choose another folder")
            )
        mirror.delete(NOTE)
    if not mirror.create(NOTE, to_json(me)):
        now = _note(mirror.path, mirror)
        raise UsageError(
            _refusal(mirror.url, now, "Wait for it, stop it, or choose another folder")
        )


def _note(folder: Path, mirror: Mirror | None) -> Document | None:
    note = read_json(folder / NOTE) if mirror is None else mirror.read_json(NOTE)
    return (
        note
        if isinstance(note, dict) and isinstance(note.get("pid"), int) and "host" in note
        else None
    )


def _refusal(folder: Path | str, note: Document | None, advice: str) -> str:
    if note is None:
        return (
            f"{folder} is locked by a process that left no name. {advice}; when nothing runs, add"
            " --break-lock."
        )
    return (
        f"{folder} is being written by process {note['pid']} on {note['host']} since"
        f" {note.get('since')} ({note.get('command')}). {advice}."
    )


def _command() -> str:
    """Program and leading words of the command; options are left out, they can hold keys."""
    words = [Path(sys.argv[0] or "python").name]
    for word in sys.argv[1:]:
        if word.startswith("-"):
            break
        words.append(word)
    return " ".join(words)[:120]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
