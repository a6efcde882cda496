"""Real processes for the tests of faults: started with the tests' helpers on their path, watched,
ended by process id.

    child = children.python("import toys; …", str(folder), stderr=subprocess.PIPE)
    children.until(lambda: log.exists(), child)
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

TESTS = Path(__file__).parents[1]

#: One sweep of toys in this process: python -c SWEEP folder log spells. Prints what it came to, or
#: the refusal.
SWEEP = """
import sys
from pathlib import Path
import toys
from auditgap.errors import AuditgapError
from auditgap.sweep import local
out, log, spells = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
try:
    store = toys.open_folder(out)
    with store.lock():
        store.plan(cell for group in toys.groups() for cell in group.cells)
        print(local.run(toys.groups(), lambda: toys.Toy(store, log, spells), store))
except AuditgapError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


def environment(**changes: str) -> dict[str, str]:
    """This process' environment, less what would send a child to a cluster, with the tests' helpers
    importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    path = os.pathsep.join(
        str(p) for p in (TESTS.parent, TESTS, TESTS / "sweep", TESTS / "audits", TESTS / "faults")
    )
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def python(code: str, *args: str, options: tuple[str, ...] = (), **how: object) -> subprocess.Popen:
    """Start a child; its output is text in pipes unless `how` says otherwise."""
    how = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment(),
        **how,
    }
    return subprocess.Popen([sys.executable, *options, "-c", textwrap.dedent(code), *args], **how)


def until(
    what: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 90
) -> None:
    """Wait for it. Raises AssertionError with the child's last words when it does not come, or the
    child ends before."""
    deadline = time.monotonic() + seconds
    while not what():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            if process is None:
                raise AssertionError(f"not within {seconds} s")
            process.kill()
            raise AssertionError(
                "the child said: " + "".join(str(words) for words in process.communicate())[-3000:]
            )
        time.sleep(0.02)


#: The same on Ray actors: joins RAY_ADDRESS, else a cluster of its own. python -c RAY_SWEEP folder
#: log spells workers
RAY_SWEEP = SWEEP.replace("import local", "import ray as sweep_ray").replace(
    "local.run(toys.groups(), lambda: toys.Toy(store, log, spells), store)",
    "sweep_ray.run(toys.groups(), lambda: toys.Toy(store, log, spells), store,"
    " workers=int(sys.argv[4]))",
)


class Home:
    """A short folder of its own for Ray's sockets and token; every process that still has a file
    open below it is ended.

    Ray renames its processes over their environment and command, so open files (each has its log)
    are what tells them.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        #: for whoever shares a cluster under this folder
        self.token = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def processes(self) -> dict[int, str]:
        """Pid and name of every other process that lives here."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if any(
                        os.readlink(fd).startswith(f"{self.folder}/")
                        for fd in (entry / "fd").iterdir()
                    ):
                        found[int(entry.name)] = (
                            (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[0]
                        )
        return found

    def left(self, *, besides: str = "Agent", seconds: float = 25) -> dict[int, str]:
        """Those still there after so long; Ray's node agents take a minute to see that their node
        is gone."""
        deadline = time.monotonic() + seconds
        while found := {pid: name for pid, name in self.processes().items() if besides not in name}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return found

    def close(self) -> None:
        for _ in range(5):
            for pid in self.processes():
                kill(pid)
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
