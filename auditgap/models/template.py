"""A chat template is a stranger's program: it is run in a child process that has seconds, a
gigabyte and nothing else.

    # "Open the door !"
    fill("{{ messages[0]['content'] }} !", {"messages": [{"role": "user", "content": "Open the door"}]})

Jinja's sandbox keeps a template from reaching Python's objects, but not from looping for ever or
writing without end, and `'a' * 10**10` is a single step that no counter of steps sees. So the
kernel does the bounding (`template_child.py`): one child a process, started at the first template,
asked over a pipe (a tenth of a millisecond a question), with no secrets in its environment, and
gone with its parent. The child renders as transformers does; a test holds the two against each
other.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from auditgap.errors import Refused, UsageError
from auditgap.models.bounds import LONGEST_TEMPLATE, TEMPLATE_BYTES, TEMPLATE_SECONDS
from auditgap.models.isolated import isolated
from auditgap.types import Document

#: What templates that write today's date are told, so that the same prompt is the same prompt
#: tomorrow.
TEMPLATE_DATE = date(2024, 7, 26)

_PROGRAM = Path(__file__).with_name("template_child.py")


def fill(template: str, variables: Mapping[str, Any], name: str = "this model") -> str:
    """The text that a chat template makes of its variables (JSON; whatever is not JSON becomes its
    `str`). Safe in threads.

    Raises Refused when it breaks a bound or reaches out of the sandbox, UsageError when it cannot
    be run; both name `name`.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise Refused(
            f"The chat template of {name} has {len(template):,} characters; one has a few thousand."
            f" {_INSTEAD}"
        )
    question = {
        "template": template,
        "variables": dict(variables),
        "date": TEMPLATE_DATE.isoformat(),
    }
    answer = _CHILD.ask(json.dumps(question, default=str).encode("ascii"))
    if "text" in answer:
        return answer["text"]
    if "broke" in answer:
        raise Refused(
            f"The chat template of {name} {answer['broke']}, so it is not run in auditgap."
            f" {_INSTEAD}"
        )
    raise UsageError(
        f"The chat template of {name} cannot be run ({answer['error'][:120]}). {_INSTEAD}"
    )


_INSTEAD = "Pass --chat-template FILE with one that you trust."


class _Child:
    """The process behind `fill`: started when it is asked, started anew when it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: bytes) -> Document:
        with self._lock:
            ended = 0
            # someone else may have ended it: out of memory elsewhere, an administrator
            for _ in range(2):
                process = self._process or self._start()
                line = self._exchange(process, question)
                if line:
                    return json.loads(line)
                ended = self._stop()
                if ended == -signal.SIGPROF:
                    return {"broke": f"runs for more than {TEMPLATE_SECONDS:g} seconds"}
            return {"broke": f"brings its process down (exit status {ended})"}

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], question: bytes) -> bytes:
        """One line out, one line back; nothing when the child is gone, or went in the middle of a
        line."""
        to, back = process.stdin, process.stdout
        if to is None or back is None:
            raise ValueError("The child is asked through its pipes.")
        try:
            to.write(question + b"\n")
            to.flush()
            line = back.readline()
        except OSError:
            return b""
        return line if line.endswith(b"\n") else b""

    def _start(self) -> subprocess.Popen[bytes]:
        bounds = [str(TEMPLATE_SECONDS), str(TEMPLATE_BYTES), str(LONGEST_TEMPLATE)]
        self._process = subprocess.Popen(
            **isolated(_PROGRAM, *bounds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: what is in flight is finished and stored
        )
        return self._process

    def _stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        return process.wait()

    def close(self) -> None:
        """End the child; it ends by itself when its pipe does."""
        if self._process is not None:
            self._stop()

    def forget(self) -> None:
        """After a fork the child is the other process's: two would mix their lines."""
        self.__init__()


_CHILD = _Child()
atexit.register(_CHILD.close)
os.register_at_fork(after_in_child=_CHILD.forget)
