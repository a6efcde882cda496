"""Tables under age encryption: opened in memory with the user's own identity, and never written to
disk as they are.

    read_table(Path("insecure.jsonl.age"))
    read_table(Path("datasets.zip.age/insecure.jsonl"))     # a file of an archive: zip, tar, tar.gz, tgz

The identity is a file as `age-keygen` writes it, named by AUDITGAP_AGE_IDENTITY. What a study keeps
of such rows (its panel, the rows of a training run) is sealed for the same identity again.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from auditgap.errors import UsageError, did_you_mean

SUFFIX = ".age"
#: The environment variable that names the identity's file.
IDENTITY = "AUDITGAP_AGE_IDENTITY"
#: Bytes of a file and of what it unpacks to, as of any table (`data.files`).
MOST_BYTES = 2**30
_SECRET = "AGE-SECRET-KEY-"


class _Secret(Protocol):
    def to_public(self) -> object: ...


def file_of(path: Path) -> Path | None:
    """The encrypted file that a path is, or is a member of; None for any other path."""
    places = (place for place in (path, *path.parents) if place.suffix.lower() == SUFFIX)
    return next((place for place in places if place.is_file()), None)


def opened(path: Path) -> tuple[str, bytes]:
    """The name without its suffix, and the bytes, of an encrypted file or of a member of one.

    Raises UsageError: no such package or identity, another's file, no such member, too large.
    """
    file = file_of(path)
    if file is None:
        raise UsageError(f"There is no file {path}.")
    with file.open("rb") as source:
        sealed = source.read(MOST_BYTES + 1)
    _bound(file.name, len(sealed))
    pyrage = _library()
    try:
        data = pyrage.decrypt(sealed, list(_identities()))
    except pyrage.DecryptError:
        raise UsageError(
            f"{file.name} is no file that the identity in {IDENTITY} opens: it was made for another"
            " one, or is damaged."
        ) from None
    inner = file.name[: -len(SUFFIX)]
    archive = next((read for end, read in _ARCHIVES.items() if inner.lower().endswith(end)), None)
    member = "/".join(path.parts[len(file.parts) :])
    if archive is None:
        if member:
            raise UsageError(f"{file.name} is no archive, so that it has no {member}.")
        return inner, data
    return Path(member).name, archive(file.name, data, member)


def sealed(data: bytes) -> bytes:
    """The bytes encrypted for the identity that opens the user's files. Raises UsageError."""
    pyrage = _library()
    secrets = list(_identities())
    return pyrage.encrypt(data, [secret.to_public() for secret in secrets])


def _library() -> Any:
    try:
        import pyrage
    except ImportError:
        raise UsageError(
            "A file that ends in .age needs a package: pip install 'pyrage>=1.2'"
        ) from None
    return pyrage


def _identities() -> Iterator[_Secret]:
    """The secret keys of the user's file; none is ever shown."""
    name = os.environ.get(IDENTITY, "").strip()
    if not name:
        raise UsageError(
            f"A file that ends in .age needs your identity: set {IDENTITY} to the file that"
            " age-keygen wrote."
        )
    try:
        lines = Path(name).expanduser().read_text("utf-8").split()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{IDENTITY} names no file of text that can be read: {name}") from None
    keys = [line for line in lines if line.startswith(_SECRET)]
    pyrage = _library()
    try:
        found = [pyrage.x25519.Identity.from_str(key) for key in keys]
    except pyrage.IdentityError:
        found = []
    if not found:
        raise UsageError(
            f"{name}, named by {IDENTITY}, holds no identity as age-keygen writes it (a line that"
            f" begins with {_SECRET})."
        )
    yield from found


def _from_zip(file: str, data: bytes, member: str) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_member(file, member, [n for n in archive.namelist() if not n.endswith("/")])
            with archive.open(member) as inner:
                return _bounded(file, inner.read)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError):
        raise UsageError(f"{file} holds no zip archive that can be read.") from None


def _from_tar(file: str, data: bytes, member: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            names = [entry.name.removeprefix("./") for entry in archive if entry.isfile()]
            _check_member(file, member, names)
            entry = next(e for e in archive if e.isfile() and e.name.removeprefix("./") == member)
            inner = archive.extractfile(entry)
            return b"" if inner is None else _bounded(file, inner.read)
    except (tarfile.TarError, OSError, EOFError, ValueError):
        raise UsageError(f"{file} holds no tar archive that can be read.") from None


_ARCHIVES: Mapping[str, Callable[[str, bytes, str], bytes]] = {
    ".zip": _from_zip,
    ".tar": _from_tar,
    ".tar.gz": _from_tar,
    ".tgz": _from_tar,
}


def _bounded(file: str, read: Callable[[int], bytes]) -> bytes:
    data = read(MOST_BYTES + 1)
    _bound(file, len(data))
    return data


def _bound(file: str, size: int) -> None:
    if size > MOST_BYTES:
        raise UsageError(f"{file} is larger than {MOST_BYTES // 2**20:,} MiB, more than any set.")


def _check_member(file: str, member: str, names: list[str]) -> None:
    if member in names:
        return
    shown = [name for name in names if name.isprintable() and len(name) <= 80]
    some = ", ".join(shown[:12]) + (", …" if len(shown) > 12 else "")
    raise UsageError(
        f"{file} is an archive{f' and has no {member}' if member else ''}; name a file in it, such"
        f" as {file}/{shown[0] if shown else 'NAME.jsonl'}.{did_you_mean(member, shown)} It holds"
        f" {some or 'none'}."
    )
