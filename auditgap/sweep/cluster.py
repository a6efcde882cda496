"""A connection to Ray: to the cluster of this job or of an address, or to one of our own on this
machine.

    # bounded in memory, no dashboard, a token of its own; gone after the block
    with cluster() as ray:
        ray.cluster_resources()
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.sweep.state import cause_of

OBJECT_STORE_BYTES = 150_000_000  #: of a local cluster; summaries are all that goes through it
_JOINED = ("RAY_ADDRESS", "RAY_JOB_ID")


@contextmanager
def cluster(address: str | None = None, *, cpus: int | None = None) -> Iterator[Any]:
    """The `ray` module, connected: to `address`, to the cluster of this job, or to a local one that
    ends with the block.

    A connection that is open already is used and left open. `cpus`: what a local cluster offers
    (None: all cores).
    """
    if (loaded := sys.modules.get("ray")) is not None and loaded.is_initialized():
        yield loaded
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "This needs Ray, which is not installed. Type: pip install 'ray[default]'  (or leave"
            " Ray out)."
        )
    if address is None and any(os.environ.get(name) for name in _JOINED):
        address = "auto"
    with nullcontext() if address else _local_cluster_environment() as folder:
        # after the environment is set: Ray reads its security settings when it is imported
        import ray

        _read_settings_again()
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if address:
            with _connection_errors(address):
                ray.init(address=address, **quiet)
        else:
            ray.init(
                num_cpus=cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                # Ray opens its folder to everybody; the one around it stays ours
                _temp_dir=f"{folder}/r",
                **quiet,
            )
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _connection_errors(address: str) -> Iterator[None]:
    """A sentence instead of a traceback, and within seconds: Ray itself waits minutes for an
    address where nobody is."""
    target = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    try:
        if host_and_port := re.fullmatch(r"(?:ray://)?([^/:]+|\[.+\]):(\d+)", target):
            socket.create_connection(
                (host_and_port[1].strip("[]"), int(host_and_port[2])), timeout=10
            ).close()
        yield
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"No Ray cluster answers at {target or address} ({cause_of(error)}). Check the address"
            " and RAY_AUTH_TOKEN_PATH, or leave the address out to start a cluster on this"
            " machine."
        ) from error


@contextmanager
def _local_cluster_environment() -> Iterator[str]:
    """A short temporary folder of our own (socket paths may not exceed 107 bytes) and a token of
    our own.

    Left to itself Ray writes a token to ~/.ray, which later clusters of this user would then
    enforce.
    """
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ag-", dir=base if len(base) <= 28 else "/tmp")
    token = Path(folder) / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    # whatever is set for other clusters: Ray listens on every interface of the machine, so ours is
    # never open
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_TOKEN": None}
    before = {name: os.environ.get(name) for name in ours}
    _set_environment(ours)
    try:
        yield folder
    finally:
        _set_environment(before)
        _read_settings_again()
        shutil.rmtree(folder, ignore_errors=True)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _read_settings_again() -> None:
    """Ray caches RAY_AUTH_MODE and the token for good, so an earlier import or cluster in this
    process would decide."""
    if "ray" in sys.modules:
        # not public: where a release moves them, only a second cluster fails
        with suppress(ImportError, AttributeError):
            raylet: Any = importlib.import_module("ray._raylet")
            raylet.Config.initialize("")
            raylet.AuthenticationTokenLoader.instance().reset_cache()
