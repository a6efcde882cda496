"""Ed25519 keys as PEM files: a private one that only its owner may read, a public one beside it.

public = make(Path("auditor.pem"))          # auditor.pem, mode 0600, and auditor.pem.pub
key = private(Path("auditor.pem"));  public = read(Path("auditor.pem.pub"))
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from auditgap.errors import UsageError
from auditgap.store import files

PUBLIC = ".pub"  #: what the public key's file adds to the private one's name
_NEW = "auditgap plan … --sign auditor.pem --new-key"


def make(path: Path) -> Path:
    """Write a new private key and its public one; the public one's path. Raises UsageError where
    there is a file already, DiskError."""
    beside = path.with_name(path.name + PUBLIC)
    for one in (path, beside):
        if one.exists():
            raise UsageError(
                f"{one} is there already; a key is never replaced. Choose another name."
            )
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with files.disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, pem, files.PRIVATE)
    shown = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    files.write_bytes(beside, shown)
    return beside


def private(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file. Raises UsageError: none, not Ed25519, or open to others."""
    if path.is_file() and path.stat().st_mode & 0o077:
        raise UsageError(
            f"{path} can be read by others than its owner, so anybody may have signed with it."
            f" Type: chmod 600 {path}, or make a new one: {_NEW}"
        )
    try:
        key = serialization.load_pem_private_key(files.read(path), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(
            f"{path} holds no Ed25519 private key in PEM without a password. Make one: {_NEW}"
        )
    return key


def read(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file. Raises UsageError: none, or not Ed25519."""
    try:
        key = serialization.load_pem_public_key(files.read(path))
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(
            f"{path} holds no Ed25519 public key in PEM; give the file NAME.pem{PUBLIC} that stands"
            " beside the private one."
        )
    return key


def id_of(key: Ed25519PublicKey) -> str:
    """How a key is named: the SHA-256 of its SubjectPublicKeyInfo (DER)."""
    return files.sha256(
        key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
