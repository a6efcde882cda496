"""A process of one's own to talk to: it is started, told things, listened to, and certainly ended.

    child = Child("auditgap.engines.vllm.process", {"model": "/models/llama"}, {"VLLM_NO_USAGE_STATS": "1"})
    # the first thing it said: {"window": 8192, …}
    child.ready
    child.tell({"do": "speak", "wishes": […]}, [payload])         # its answer
    # it and all that it started are gone
    child.close()

What travels is JSON, with bytes behind it; nothing is unpickled at either end. The child leads a
process group, writes what it and its libraries chatter into a file that only its owner may read,
and looks every second whether its parent still lives. One that says nothing for too long is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from auditgap.errors import AuditgapError
from auditgap.types import Document

#: Called with (done, total) while an answer is being made.
Progress = Callable[[int, int], None]


def send(
    connection: Connection, message: Mapping[str, Any], payloads: Sequence[bytes] = ()
) -> None:
    """A JSON object, and bytes behind it."""
    connection.send_bytes(json.dumps({**message, "payloads": len(payloads)}).encode("ascii"))
    for payload in payloads:
        connection.send_bytes(payload)


def receive(connection: Connection) -> tuple[Document, list[bytes]]:
    """What `send` sent. Raises EOFError or OSError when nobody is left at the other end."""
    message = json.loads(connection.recv_bytes())
    return message, [connection.recv_bytes() for _ in range(message.pop("payloads"))]


class Failed(AuditgapError):
    """The child could not do what it was told; `kind` is the name of what it raised there, `answer`
    all that it said of it."""

    def __init__(self, kind: str, said: str, log: Path, answer: Mapping[str, Any]) -> None:
        super().__init__(said)
        self.kind, self.said, self.log, self.answer = kind, said, log, answer


class Child:
    """`python -m MODULE FD PARENT SCRATCH`, which first reads its settings from the connection and
    answers when it is ready."""

    def __init__(
        self,
        module: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        patience: float | None = None,
    ) -> None:
        #: seconds of silence, while it starts and while it is asked, after which it is killed;
        #: None: it is waited for
        self._patience = patience
        # its temporary folder: what it leaves there goes with it
        self._scratch = Path(tempfile.mkdtemp(prefix="auditgap-"))
        self.log = self._scratch / "log"
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                # -P: a folder that happens to be named like a package where the user stands is not
                # one
                [
                    sys.executable,
                    "-P",
                    "-m",
                    module,
                    str(theirs.fileno()),
                    str(os.getpid()),
                    str(self._scratch),
                ],
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=handle,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment, "TMPDIR": str(self._scratch)},
                start_new_session=True,
            )
        except BaseException:
            self._connection.close()
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            os.close(handle)
            theirs.close()
        # an engine that nobody closes, or a program that just ends, leaves neither a process nor a
        # file
        self._forgotten = weakref.finalize(
            self, _forget, self._connection, self._process, self._scratch, os.getpid()
        )
        try:
            self.ready = self.tell(settings)
        except AuditgapError:
            self.close(keep_log=True)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def closed(self) -> bool:
        return self._connection.closed

    def tell(
        self,
        message: Mapping[str, Any],
        payloads: Sequence[bytes] = (),
        progress: Progress | None = None,
    ) -> Document:
        """What it answers. Raises Failed with what it raised, AuditgapError when it has ended or
        was killed for its silence."""
        return self.exchange(message, payloads, progress)[0]

    def exchange(
        self,
        message: Mapping[str, Any],
        payloads: Sequence[bytes] = (),
        progress: Progress | None = None,
    ) -> tuple[Document, list[bytes]]:
        """The same, with the bytes behind the answer."""
        with self._lock:
            if self._connection.closed:
                raise AuditgapError("This engine is closed; open another.")
            alarm = _Alarm(self._process, self._patience)
            try:
                send(self._connection, message, payloads)
                while True:
                    answer, data = receive(self._connection)
                    alarm.set()
                    if "done" not in answer:
                        break
                    if progress is not None:
                        progress(answer["done"], answer["total"])
            except (EOFError, OSError):
                self.close(keep_log=True)
                why = self._exit_reason() if not alarm.rang else self._silence()
                raise AuditgapError(why) from None
            except BaseException:  # half an answer would be taken for the next one
                self.close(patience=1)
                raise
            finally:
                alarm.off()
        if "error" in answer:
            raise Failed(answer["error"], answer["said"], self.log, answer)
        return answer, data

    def close(self, *, patience: float = 10.0, keep_log: bool = False) -> None:
        """End it and its group: it is asked by hanging up, and after `patience` seconds killed. A
        second call does nothing."""
        if self._connection.closed:
            return
        self._forgotten.detach()
        _end(self._connection, self._process, patience)
        kept = self.log.read_bytes() if keep_log else None
        shutil.rmtree(self._scratch, ignore_errors=True)
        if kept is not None:
            self._scratch.mkdir(mode=0o700, exist_ok=True)
            self.log.touch(mode=0o600)
            self.log.write_bytes(kept)

    def tail(self, n_lines: int = 3) -> str:
        """The last lines of its log, on one line."""
        with suppress(OSError):
            lines = [
                line.strip()
                for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.strip()
            ]
            return " | ".join(line[:200] for line in lines[-n_lines:])
        return ""

    def _silence(self) -> str:
        return (
            f"The engine's process said nothing for {self._patience:.0f} seconds and was ended. Its"
            f" log, {self.log}, ends: {self.tail() or 'nothing was written'}"
        )

    def _exit_reason(self) -> str:
        code = self._process.returncode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            how += ", as when a machine runs out of memory" if -code == signal.SIGKILL else ""
        return (
            f"The engine's process ended of itself ({how}). Its log, {self.log}, ends:"
            f" {self.tail() or 'nothing was written'}"
        )


class _Alarm:
    """Kills a process and its group once `patience` seconds have passed since it was last set."""

    def __init__(self, process: subprocess.Popen[bytes], patience: float | None) -> None:
        self.process, self.patience, self.rang = process, patience, False
        self._timer: threading.Timer | None = None
        self.set()

    def set(self) -> None:
        self.off()
        if self.patience is not None:
            self._timer = threading.Timer(self.patience, self._ring)
            self._timer.daemon = True
            self._timer.start()

    def off(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        self.rang = True
        _kill_group(self.process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(connection: Connection, process: subprocess.Popen[bytes], patience: float) -> None:
    """Hang up; after `patience` seconds kill what is left of the process and its group."""
    connection.close()
    deadline = time.monotonic() + patience
    # looked at without being reaped: while it is a zombie nobody else can be given its group's
    # number
    while (
        not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    _kill_group(process)
    process.wait()


def _forget(
    connection: Connection, process: subprocess.Popen[bytes], scratch: Path, owner: int
) -> None:
    # a fork of the owner has the object, but not the child
    if os.getpid() == owner and not connection.closed:
        _end(connection, process, 1.0)
        shutil.rmtree(scratch, ignore_errors=True)


def die_with(parent: int, scratch: Path) -> None:
    """In the child: a thread that ends it, its group and its scratch folder once `parent` is gone,
    even amid a computation."""

    def watch() -> None:
        while True:
            time.sleep(1)
            end_without(parent, scratch)

    end_without(parent, scratch)
    threading.Thread(target=watch, daemon=True).start()


def end_without(parent: int, scratch: Path) -> None:
    """In the child: end it, its group and its scratch folder if `parent` is gone."""
    if os.getppid() == parent:
        return
    shutil.rmtree(scratch, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
