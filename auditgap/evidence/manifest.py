"""A model's folder as OpenSSF model signing describes it: every file with its SHA-256, and one digest
of all, by which other statements name the model.

    found = of(Path("tuned"))                  # {"serialization": {…}, "resources": [{"name", …}]}
    root(found)                                # the digest of the subject
    differences(signed, found)                 # [("model.safetensors", "9c1e…", "77aa…")]

The predicate of https://model_signing/signature/v1.0 and its root digest: the SHA-256 over the
files' digests in the order of their paths
(https://github.com/sigstore/model-transparency/blob/main/docs/model_signing_format.md). So a
signature of the model's maker names the same digest, where it leaves out the same files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from auditgap.types import Document

TYPE = "https://model_signing/signature/v1.0"
#: Not of the model: what version control and the hub's client keep beside it.
IGNORED = (".cache", ".git", ".gitattributes", ".github", ".gitignore")


def of(folder: Path) -> Document:
    """The manifest of a folder that `models.preflight` has looked at."""
    found: dict[PurePosixPath, str] = {}
    for place, folders, names in os.walk(folder, followlinks=False):
        here = Path(place)
        if here == folder:
            folders[:] = [name for name in folders if name not in IGNORED]
            names = [name for name in names if name not in IGNORED]
        for name in names:
            with (here / name).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found[PurePosixPath((here / name).relative_to(folder).as_posix())] = sha256
    return {
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": True,  # the hub's cache is made of them
            "ignore_paths": list(IGNORED),
        },
        "resources": [
            {"name": str(path), "algorithm": "sha256", "digest": found[path]}
            for path in sorted(found)
        ],
    }


def root(manifest: Mapping[str, Any]) -> str:
    """The digest of all files together."""
    digests = (bytes.fromhex(one["digest"]) for one in manifest["resources"])
    return hashlib.sha256(b"".join(digests)).hexdigest()


def differences(signed: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(file, digest that was signed, digest now) of each file that is not the same; "absent" where
    there is none."""
    before, now = (
        {one["name"]: one["digest"] for one in manifest["resources"]}
        for manifest in (signed, found)
    )
    return [
        (name, before.get(name, "absent"), now.get(name, "absent"))
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
