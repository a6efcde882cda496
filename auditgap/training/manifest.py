"""The manifest of one checkpoint: which files it has, whether they are all there as they were
written, and whose it is.

    seal(folder, step=12, world=2, facts={"stage": 2, "config": "9c1e…"})    # last, by one rank
    verify(folder, hashes=True)                                               # Checkpoint(step=12, …)

DeepSpeed's shards are pickles, and opening a pickle can run any code, so a training run opens only
what this user's own auditgap wrote: `manifest.json` lists every file with its size and SHA-256 and
is signed. It also tells a whole checkpoint from a torn one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from auditgap.errors import Refused, UsageError
from auditgap.store.files import read_json, sync_folder, to_json, write_bytes
from auditgap.training.signature import check, sign
from auditgap.types import Document

SCHEMA = 1
MANIFEST = "manifest.json"


class FileFact(TypedDict):
    """What a manifest says of one file."""

    size: int  #: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is whole and this user's own. `skipped` says, a sentence each, why newer
    ones were passed over."""

    folder: Path
    step: int
    world: int  #: number of ranks that wrote it; 0: any number can read it (a universal checkpoint)
    stage: int  #: ZeRO stage
    facts: Document  #: what `seal` was given, `stage` and `config` among it
    skipped: tuple[str, ...] = ()


class Torn(Exception):
    """Why a checkpoint is not whole; said, never raised to the user."""


def hash_files(folder: Path, paths: Iterable[Path] | None = None) -> dict[str, FileFact]:
    """Relative name -> size and SHA-256 of `paths` (all files in `folder` unless given), read as a
    stream.

    Every file is also made durable (fsync), so that a signed manifest never vouches for bytes that
    a power cut can take. Ranks can share the work: each hashes what it wrote, and rank 0 seals with
    the joined dicts. Raises UsageError for links and for paths outside `folder`; DiskError.
    """
    listed = [folder / name for name in _names(folder)] if paths is None else list(paths)
    names = []
    for path in listed:
        if (
            path.is_symlink()
            or not path.is_file()
            or not path.resolve().is_relative_to(folder.resolve())
        ):
            raise UsageError(
                f"{path} is no plain file inside {folder}, so it cannot be part of a checkpoint."
            )
        names.append(path.resolve().relative_to(folder.resolve()).as_posix())
    with ThreadPoolExecutor(min(4, len(names) or 1)) as pool:  # hashing lets go of the interpreter
        return dict(
            zip(names, pool.map(lambda name: _fact(folder / name, sync=True), names), strict=True)
        )


def seal(
    folder: Path,
    *,
    step: int,
    world: int,
    facts: Mapping[str, object],
    files: Mapping[str, FileFact] | None = None,
) -> None:
    """Write the signed manifest, last and atomically: from here on the checkpoint counts. One rank,
    after all are done.

    `facts` are plain JSON: `stage` (ZeRO stage, 0–3) and `config` (the config's digest) are wanted,
    anything else is kept. `files` are the joined `hash_files` of the ranks; without them this rank
    hashes everything. Raises UsageError when a fact is missing or `files` is not what the folder
    holds; Refused when the key is open to others; DiskError.
    """
    if facts.get("stage") not in (0, 1, 2, 3) or not isinstance(facts.get("config"), str):
        raise UsageError(
            "A checkpoint's facts need stage (0 to 3) and config (the digest of the run's config)."
        )
    facts_of = dict(hash_files(folder) if files is None else files)
    if (names := set(_names(folder))) != set(facts_of):
        strange = sorted(names ^ set(facts_of))
        raise UsageError(
            f"{folder} and its list of files differ ({strange[0]}, {len(strange)} in all); every"
            " rank hashes its own."
        )
    signed = sign(
        {
            "schema": SCHEMA,
            "name": folder.name,
            "step": step,
            "world": world,
            "facts": dict(facts),
            "files": {name: facts_of[name] for name in sorted(facts_of)},
        }
    )
    for inner in {(folder / name).parent for name in facts_of} | {folder}:
        sync_folder(inner)
    write_bytes(folder / MANIFEST, to_json(signed))


def verify(folder: Path, *, hashes: bool) -> Checkpoint:
    """The checkpoint in `folder`, seen to be this user's and whole. Raises Torn, or Refused for a
    strange signature. Without `hashes` files are known by their sizes."""
    if not (folder / MANIFEST).exists():
        raise Torn("its save was cut short (no manifest.json)")
    manifest = None if (folder / MANIFEST).is_symlink() else read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("hmac"), str):
        raise Torn("its manifest.json is not readable")
    check(folder, manifest)
    # from here on every value is one that `seal` wrote
    if manifest["schema"] != SCHEMA:
        raise Refused(
            f"{folder} was made by another version of auditgap (schema {manifest['schema']}); resume"
            " with that version."
        )
    if manifest["name"] != folder.name:
        raise Refused(
            f"{folder} was made as {manifest['name']} and renamed since; give it back its name."
        )
    files: dict[str, FileFact] = manifest["files"]
    present = set(_names(folder))
    if missing := sorted(set(files) - present):
        raise Torn(
            f"{missing[0]} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    if strange := sorted(present - set(files)):
        raise Refused(
            f"{folder} holds {strange[0]}, which its manifest does not list; whoever put it there,"
            " take it out again."
        )
    for name, fact in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise Torn(f"{name} is no plain file")
        if (size := path.stat().st_size) != fact["size"]:
            raise Torn(f"{name} has {size:,} bytes where {fact['size']:,} were written")
    if hashes:
        with ThreadPoolExecutor(min(4, len(files) or 1)) as pool:
            for name, fact in zip(files, pool.map(lambda n: _fact(folder / n), files), strict=True):
                if fact["sha256"] != files[name]["sha256"]:
                    raise Torn(f"{name} is not the file that was written (its SHA-256 differs)")
    return Checkpoint(
        folder, manifest["step"], manifest["world"], manifest["facts"]["stage"], manifest["facts"]
    )


def _names(folder: Path) -> list[str]:
    """Every file below `folder` but its own manifest and unfinished temporaries, as posix names
    relative to it."""
    names = [
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_symlink() or not p.is_dir()
    ]
    return sorted(
        n for n in names if n != MANIFEST and not re.fullmatch(rf"\.{MANIFEST}\..*\.tmp", n)
    )


def _fact(path: Path, *, sync: bool = False) -> FileFact:
    with path.open("rb") as file:
        if sync:
            with suppress(OSError):  # a file system that cannot
                os.fsync(file.fileno())
        return {
            "size": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
