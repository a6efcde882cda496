"""Answers that were paid for, on disk: a line each, appended as they come, so that a kill costs
only what was in flight.

    journal = Journal(Path("runs/llama/scratch/answers.jsonl"))
    # {"key": "9c1e…", "text": "Blue.", …}
    journal.add("9c1e…", Reply("Blue."))
    Journal(journal.path).replies["9c1e…"]                            # Reply("Blue.")

The keys are hashes of the questions; the answers are what models said, so the file's mode is 0600.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from auditgap.engines import Reply
from auditgap.store import files
from auditgap.store.files import PRIVATE, disk_errors


class Journal:
    """Answers by the hash of what they answer: its own, and those in the other journals of its
    folder, whoever wrote them.

    A line that a kill has torn is cut off before the next is written; one that cannot be read
    counts as not asked. One process writes a journal at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        with disk_errors(path):
            for other in sorted(path.parent.glob("*.jsonl")):
                if other != path:
                    with suppress(FileNotFoundError):  # its cell has been written meanwhile
                        self.replies |= _replies_in(files.read(other), other)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)
            with open(descriptor, "rb+") as file:
                os.fchmod(descriptor, PRIVATE)
                data = file.read()
                whole = data.rfind(b"\n") + 1
                if whole < len(data):
                    file.truncate(whole)
        self.replies |= _replies_in(data[:whole], path)

    def add(self, key: str, reply: Reply) -> None:
        """Keep an answer, or a chain of thought that never came to one. Raises DiskError, and
        leaves no torn line behind."""
        entry = {
            "key": key,
            "text": reply.text,
            "stopped": reply.stopped,
            "logprobs": [dict(t) for t in reply.logprobs],
            **({"chain": reply.chain} if reply.chain else {}),
            **({"problem": reply.problem} if reply.problem else {}),
        }
        line = files.seal(entry, indent=None)
        with disk_errors(self.path, len(line)):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    os.ftruncate(descriptor, before)
                    raise
            finally:
                os.close(descriptor)
        self.replies[key] = reply


def _replies_in(data: bytes, path: Path) -> dict[str, Reply]:
    """The answers in a journal's lines, by their keys."""
    found: dict[str, Reply] = {}
    for line in data.splitlines():
        try:
            entry = files.opened(line, path, required=False)
            tops = tuple({str(t): float(v) for t, v in top.items()} for top in entry["logprobs"])
            if (
                isinstance(entry["key"], str)
                and isinstance(entry["text"], str)
                and isinstance(entry["stopped"], bool)
            ):
                found[entry["key"]] = Reply(
                    entry["text"],
                    None,
                    entry["stopped"],
                    tops,
                    str(entry.get("problem", "")),
                    str(entry.get("chain", "")),
                )
        except (files.Damaged, ValueError, TypeError, KeyError, AttributeError):
            continue
    return found
