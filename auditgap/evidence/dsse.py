"""in-toto Statements v1 in DSSE envelopes, signed with Ed25519.

    envelope = sign(statement(subjects, TYPE, predicate), key)
    write(path, envelope);  read(path).statement;  read(path).signed_by(public)

Formats: https://github.com/in-toto/attestation/tree/main/spec/v1 and
https://github.com/secure-systems-lab/dsse. What is signed is the pre-authentication encoding of the
payload, byte for byte as it stands in the envelope: nothing is parsed before the signature holds.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from auditgap.errors import UsageError
from auditgap.evidence import keys
from auditgap.store import files
from auditgap.types import Document, canonical

PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"


def pae(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    name = kind.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def statement(
    subjects: Sequence[Mapping[str, Any]], kind: str, predicate: Mapping[str, Any]
) -> Document:
    """An in-toto Statement: `predicate` (of the type `kind`) about the subjects."""
    return {
        "_type": STATEMENT,
        "subject": [dict(subject) for subject in subjects],
        "predicateType": kind,
        "predicate": dict(predicate),
    }


@dataclass(frozen=True)
class Envelope:
    """What was signed, and the signatures."""

    payload: bytes
    kind: str
    signatures: tuple[tuple[str, bytes], ...]  #: (key's id, signature)

    @property
    def statement(self) -> Document:
        """The payload as a Statement. Raises UsageError: it is none."""
        try:
            found = json.loads(self.payload)
        except (ValueError, RecursionError):
            found = None
        parts = ("subject", "predicateType", "predicate")
        if not isinstance(found, dict) or found.get("_type") != STATEMENT:
            raise UsageError("The envelope's payload is no in-toto Statement v1.")
        if not all(part in found for part in parts) or not isinstance(found["predicate"], dict):
            raise UsageError("The envelope's Statement lacks its subject or its predicate.")
        return found

    @property
    def sha256(self) -> str:
        """Of the payload: how another statement names this one."""
        return files.sha256(self.payload)

    def signed_by(self, key: Ed25519PublicKey) -> bool:
        """Whether a signature of this key is over this very payload."""
        for _, signature in self.signatures:
            try:
                key.verify(signature, pae(self.kind, self.payload))
            except InvalidSignature:
                continue
            return self.kind == PAYLOAD
        return False

    def to_json(self) -> Document:
        """As DSSE writes it."""
        return {
            "payload": base64.b64encode(self.payload).decode("ascii"),
            "payloadType": self.kind,
            "signatures": [
                {"keyid": keyid, "sig": base64.b64encode(sig).decode("ascii")}
                for keyid, sig in self.signatures
            ],
        }


def sign(what: Mapping[str, Any], key: Ed25519PrivateKey) -> Envelope:
    """The statement, canonical JSON, signed."""
    payload = canonical(json.loads(files.to_json(what))).encode("ascii")
    signature = key.sign(pae(PAYLOAD, payload))
    return Envelope(payload, PAYLOAD, ((keys.id_of(key.public_key()), signature),))


def from_json(value: Any, where: Path | str) -> Envelope:
    """The envelope that a document is. Raises UsageError."""
    try:
        signatures = tuple(
            (str(one.get("keyid", "")), base64.b64decode(one["sig"], validate=True))
            for one in value["signatures"]
        )
        payload = base64.b64decode(value["payload"], validate=True)
        return Envelope(payload, str(value["payloadType"]), signatures)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        raise UsageError(
            f"{where} is no DSSE envelope (payload, payloadType, signatures). Give what `auditgap"
            " plan` or `auditgap attest` wrote."
        ) from None


def read(path: Path) -> Envelope:
    """The envelope in a file. Raises UsageError: no file, no envelope."""
    try:
        value = json.loads(files.read(path))
    except OSError:
        raise UsageError(f"There is no {path}. Make one: auditgap attest DIR --key KEY") from None
    except (ValueError, RecursionError):
        value = None
    return from_json(value, path)


def write(path: Path, envelope: Envelope) -> Path:
    """Write it, whole or not at all. Raises DiskError."""
    with files.disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, files.to_json(envelope.to_json()))
    return path
