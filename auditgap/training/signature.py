"""Signatures that tell what this user's own auditgap wrote from what anybody else did: HMAC-SHA256
with a secret that only this user can read (`cache_dir()/checkpoint.key`, made on first use).

    signed = sign({"step": 12, "files": {…}})     # with `key` and `hmac`
    check(folder, signed)                         # Refused when it is not what was signed here
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from auditgap.errors import Refused
from auditgap.models import cache_dir
from auditgap.store.files import DiskError, disk_errors, temporary, to_json, write_new
from auditgap.types import Document


def sign(body: Mapping[str, object]) -> Document:
    """The body with the key's name and the signature. Raises Refused when the key is open to
    others; DiskError."""
    key = _key(create=True)
    if key is None:
        raise DiskError(
            f"The checkpoint key in {cache_dir()} went away while it was in use; type the same"
            " command again."
        )
    # signed as it will be read
    signed = json.loads(to_json({**body, "key": _key_id(key)}))
    return {**signed, "hmac": _signature(signed, key)}


def check(folder: Path, signed: Mapping[str, object]) -> None:
    """Raises Refused when the manifest of `folder` is not what this user's key signed, or the key
    is open to others."""
    key, body = _key(create=False), {k: v for k, v in signed.items() if k != "hmac"}
    if key is not None and hmac.compare_digest(
        _signature(body, key).encode(), str(signed["hmac"]).encode("utf-8", "replace")
    ):
        return
    path = cache_dir() / "checkpoint.key"
    if key is not None and body.get("key") == _key_id(key):
        why = (
            "has been altered since it was signed, so it is not opened. Take it out of the way; the"
            " one before it will serve"
        )
    else:
        why = (
            "was made by another user or on another machine, and opening a stranger's checkpoint"
            f" can run any code. If it is your own, copy its machine's {path.name} to {path} (mode"
            " 600)"
        )
    raise Refused(f"{folder} {why}.")


def _signature(body: Mapping[str, object], key: bytes) -> str:
    canonical = json.dumps(
        body, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hmac.new(key, canonical.encode("ascii"), hashlib.sha256).hexdigest()


def _key_id(key: bytes) -> str:
    """Tells keys apart and gives nothing of them away."""
    return hashlib.sha256(b"auditgap checkpoint key " + key).hexdigest()[:16]


def _key(*, create: bool) -> bytes | None:
    """This user's secret; made on first use. Raises Refused when others can read it or it is not
    ours, DiskError."""
    path = cache_dir() / "checkpoint.key"
    if create and not path.exists():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp = temporary(path)
            try:
                write_new(tmp, secrets.token_bytes(32), 0o600)
                with suppress(FileExistsError):
                    os.link(tmp, path)  # whole when it appears, and the first of two processes wins
            finally:
                tmp.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused(
            f"The checkpoint key {path} cannot be read ({error.strerror}); a plain file of mode 600"
            " is wanted."
        ) from None
    with open(descriptor, "rb") as file:
        state, key = os.fstat(file.fileno()), file.read(33)
    if state.st_uid != os.geteuid() or state.st_mode & 0o077:
        raise Refused(
            f"The checkpoint key {path} is open to other users, so it proves nothing. If nobody"
            f" else has touched it, type: chmod 600 {shlex.quote(str(path))}"
        )
    if len(key) != 32:
        raise Refused(
            f"The checkpoint key {path} holds {len(key)} bytes where 32 are wanted; restore it, or"
            " delete it."
        )
    return key
