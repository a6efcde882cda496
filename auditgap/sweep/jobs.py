"""A command as a Ray job: started, followed, and its tables brought home.

    client = connect("http://127.0.0.1:8265")
    code = run(client, ["python", "-m", "auditgap", "grid", …], working_dir=Path("."), say=print)

`python -m auditgap.sweep.jobs DIR` is what fetches: it prints the tables in DIR, one line each,
into a job's log.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import logging
import os
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from auditgap.errors import Interrupted, UsageError
from auditgap.store import files
from auditgap.store.remote import Place, read_output
from auditgap.sweep.state import cause_of

#: What never travels with a working folder: history, secrets, environments, results and weights
#: (gitignore's patterns; a checkout's own package has a few small ones, which do).
EXCLUDED = (
    ".git",
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    ".netrc",
    ".ssh",
    ".venv",
    "venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    "runs",
    "*.safetensors",
    "*.gguf",
    "*.bin",
    "!auditgap/**/*.safetensors",
)
TABLES = ("lvs.parquet", "lvs.csv")
_MARK = "auditgap-table "
_AGENT_SECONDS = 90.0  #: that a young cluster may take until its agent has reported


def connect(address: str | None = None) -> Any:
    """A client of the cluster's dashboard. Raises UsageError: no Ray, or nobody there."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("This needs Ray, which is not installed. Type: pip install 'ray[default]'")
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        # else it names every file that stays at home
        logging.getLogger(name).setLevel(logging.WARNING)
    address = address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"No Ray dashboard answers at {address} ({cause_of(error)[:200]}). Give --address"
            " http://HOST:8265, and RAY_AUTH_TOKEN_PATH where the cluster asks for a token."
        ) from error


def run(
    client: Any,
    command: Sequence[str],
    *,
    working_dir: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Start `command` as a job, hand its log to `say` as it comes, and return its exit code (1
    where it has none).

    Raises Interrupted on Ctrl-C; the job goes on.
    """
    job = _submit(client, shlex.join(command), working_dir)
    if say is not None:
        say(f"Job {job}\n")
    shown = 0
    try:
        while (info := client.get_job_info(job)).status not in ("SUCCEEDED", "FAILED", "STOPPED"):
            if say is not None:
                shown = asyncio.run(_follow(client, job, say, shown))
            time.sleep(0.5)
        if say is not None:  # what was written between the last look and the end
            say(client.get_job_logs(job)[shown:])
    except KeyboardInterrupt:
        raise Interrupted(
            f"No longer following job {job}; it goes on. To end it: ray job stop {job}"
        ) from None
    if say is not None and info.status != "SUCCEEDED" and info.driver_exit_code is None:
        say(f"{info.message or info.status}\n")
    return (
        info.driver_exit_code
        if info.driver_exit_code is not None
        else int(info.status != "SUCCEEDED")
    )


def _submit(client: Any, entrypoint: str, working_dir: Path | None) -> str:
    environment = (
        {} if working_dir is None else {"working_dir": str(working_dir), "excludes": list(EXCLUDED)}
    )
    until = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except (
            RuntimeError
        ) as error:  # the port of a young cluster is open before its node's agent has reported
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise UsageError(
                    f"The Ray cluster did not take the job: {cause_of(error)[:300]}"
                ) from error
            time.sleep(2)


async def _follow(client: Any, job: str, say: Callable[[str], None], shown: int) -> int:
    """Say what the log has after `shown` characters, until it ends or the connection breaks; how
    many there are by now."""
    seen = 0
    with suppress(Exception):  # the network's; whether the job has ended is asked anyway
        async for text in client.tail_job_logs(job):
            if seen + len(text) > shown:
                say(text[max(0, shown - seen) :])
            seen += len(text)
    return max(seen, shown)


def fetch(client: Any, folder: str, to: Path, *, working_dir: Path | None = None) -> list[Path]:
    """The tables in `folder`, which the cluster sees, written into `to` here; by way of a second
    job's log.

    Raises UsageError when there are none.
    """
    job = _submit(client, shlex.join(["python", "-m", "auditgap.sweep.jobs", folder]), working_dir)
    while client.get_job_info(job).status not in ("SUCCEEDED", "FAILED", "STOPPED"):
        time.sleep(0.5)
    found = [
        json.loads(line[len(_MARK) :])
        for line in client.get_job_logs(job).splitlines()
        if line.startswith(_MARK)
    ]
    if not found:
        raise UsageError(
            f"The cluster sees no table in {folder}; look at the job's log: ray job logs {job}"
        )
    with files.disk_errors(to):
        to.mkdir(parents=True, exist_ok=True)
    for table in found:
        if table["name"] in TABLES:  # a name from a log is a stranger's
            files.write_bytes(to / table["name"], zlib.decompress(base64.b64decode(table["data"])))
    return [to / table["name"] for table in found if table["name"] in TABLES]


def show(folder: Place) -> None:
    """Print the tables in `folder` for `fetch`."""
    for name in TABLES:
        table = read_output(folder, name)
        if table is not None:
            print(
                _MARK
                + json.dumps(
                    {"name": name, "data": base64.b64encode(zlib.compress(table)).decode("ascii")}
                )
            )


if __name__ == "__main__":
    show(sys.argv[1])
