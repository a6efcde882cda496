"""Training checkpoints on disk: which one is whole, whose it is, and what may be deleted. It opens
none of them.

    # root/step00000012, where every rank now writes its shards
    folder = begin(root, step=12)
    # rank 0, after all ranks are done
    seal(folder, step=12, world=2, facts={"stage": 2, "config": "9c1e…"})
    point(root, 12); rotate(root, keep=2)
    # Found(folder=…/step00000012, step=12, world=2, skipped=())
    found = latest(root)

DeepSpeed's shards are pickles, and opening a pickle can run any code, so a training run opens only
what this user's own auditgap wrote: `manifest.json`, written last, lists every file with its size
and SHA-256 and is signed (HMAC-SHA256) with a secret that only this user can read
(`cache_dir()/checkpoint.key`). The manifest also tells a whole checkpoint from a torn one; `latest`
is a hint for people and for DeepSpeed's tools, and never decides.

On disk:

    step00000012/manifest.json      no manifest: the save was cut short
    step00000012_universal/         the same checkpoint, converted for another number of ranks (`check_world`, `adopt`)
    .step00000008.deleting/         on its way out
    latest                          "step00000012"
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from auditgap.errors import AuditgapError, Refused, UsageError
from auditgap.models import cache_dir
from auditgap.store.files import (
    DiskError,
    clean_stale,
    disk_errors,
    read_json,
    remove,
    set_aside,
    sync_folder,
    temporary,
    to_json,
    write_bytes,
    write_new,
)

__all__ = [
    "Checkpoint",
    "Conversion",
    "FileFact",
    "adopt",
    "begin",
    "check_world",
    "hash_files",
    "latest",
    "name_of",
    "point",
    "rotate",
    "seal",
    "steps",
]

SCHEMA = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step(\d{8,})")
_LEAVING = re.compile(r"\.step\d{8,}(_universal)?\.deleting")
_UNIVERSAL = "_universal"


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
    facts: Mapping[str, Any]  #: what `seal` was told, `stage` and `config` among it
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversion:
    """A checkpoint that has to be converted before this number of ranks can read it."""

    folder: Path  #: where the universal checkpoint goes
    command: str  #: what to type, in one line; it ends by sealing the folder
    sentence: str  #: the refusal with the command in it


class _Torn(Exception):
    """Why a checkpoint is not whole; said, never raised to the user."""


# ------------------------------------------------------------------ write


def name_of(step: int) -> str:
    """`step00000012`: sorts by step, and is the tag that DeepSpeed is given."""
    return f"step{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps that have a folder, whole or not, ascending."""
    if not root.is_dir():
        return []
    return sorted(
        int(m[1])
        for p in root.iterdir()
        if (m := _STEP.fullmatch(p.name)) and p.is_dir() and not p.is_symlink()
    )


def begin(root: Path, step: int) -> Path:
    """The folder to write a step's checkpoint into, made new and empty; leavings of earlier kills
    are cleaned.

    One rank calls it before any writes. A torn folder of that step is set aside as
    `step….1.corrupt`. Raises AuditgapError when the step has a whole checkpoint already: resuming
    from it is what was wanted; DiskError.
    """
    folder = root / name_of(step)
    with disk_errors(folder):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        if folder.exists():
            try:
                # as `latest` does: what it passed over is written again
                _verify(folder, hashes=True)
            except (_Torn, Refused):
                set_aside(folder)
            else:
                raise AuditgapError(
                    f"{folder} already holds the checkpoint of step {step}; resume from it, or"
                    " delete it first."
                )
        folder.mkdir()
    return folder


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
    facts: Mapping[str, Any],
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
    key = _key(create=True)
    if key is None:
        raise DiskError(
            f"The checkpoint key in {cache_dir()} went away while it was in use; type the same"
            " command again."
        )
    body = {
        "schema": SCHEMA,
        "name": folder.name,
        "step": step,
        "world": world,
        "facts": dict(facts),
        "key": _key_id(key),
        "files": {name: facts_of[name] for name in sorted(facts_of)},
    }
    body = json.loads(to_json(body))  # signed as it will be read
    for inner in {(folder / name).parent for name in facts_of} | {folder}:
        sync_folder(inner)
    write_bytes(folder / MANIFEST, to_json({**body, "hmac": _signature(body, key)}))


def point(root: Path, step: int) -> None:
    """Let `latest` name a step, atomically. After `seal`: the pointer never names what is not
    whole."""
    write_bytes(root / "latest", (name_of(step) + "\n").encode())


# ------------------------------------------------------------------- read


def latest(root: Path, *, say: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole and this user's own; None when training never got as far
    as one.

    Torn ones (a shard missing, cut short or altered, no manifest) are passed over, and `skipped`
    says so; `say` gets the same sentences. Every byte is hashed. Raises Refused when the newest
    complete manifest is not signed by this user's key, and UsageError when there were checkpoints
    and none is whole: starting again is for a person to decide.
    """
    skipped: list[str] = []
    sealed = False
    for step in reversed(steps(root)):
        folder = root / name_of(step)
        try:
            found = _verify(folder, hashes=True)
        except _Torn as why:
            skipped.append(f"Checkpoint {folder.name} was passed over: {why}.")
            sealed = sealed or (folder / MANIFEST).exists()
            if say:
                say(skipped[-1])
            continue
        pointer = _pointer(root)
        if pointer and pointer > found.folder.name and not (root / pointer).exists():
            skipped.append(
                f"Checkpoint {pointer} was passed over: `latest` names it and it is not there."
            )
            if say:
                say(skipped[-1])
        return Checkpoint(
            found.folder, found.step, found.world, found.stage, found.facts, tuple(skipped)
        )
    pointer = _pointer(root)
    if sealed or pointer:
        why = " ".join(skipped) or f"`latest` names {pointer}, which is not there."
        raise UsageError(
            f"{root} holds no whole checkpoint to go on from. {why} Restore one, or delete {root}"
            " to start at step 0."
        )
    return None  # nothing, or a first save that a kill cut short: the same command starts again


def check_world(found: Checkpoint, world: int, stage: int) -> Conversion | Checkpoint:
    """Whether `world` ranks at ZeRO `stage` can read a checkpoint: it (or its sealed universal
    twin), or what to type first.

    Returns `found` itself when world and stage agree; the sealed `…_universal` folder as a Found
    with `world` 0 when it is there; else the Conversion that makes it. Raises UsageError for
    another stage; Refused as `latest` does.
    """
    if stage != found.stage:
        raise UsageError(
            f"{found.folder} was written at ZeRO stage {found.stage}, and this run is set to stage"
            f" {stage}. Resume with the ds_config of stage {found.stage}, or choose a new run"
            " folder."
        )
    if world == found.world or found.world == 0:
        return found
    twin = found.folder.with_name(found.folder.name + _UNIVERSAL)
    if (twin / MANIFEST).exists():
        try:
            return _verify(twin, hashes=True)
        except _Torn:
            pass  # converted again: the twin is only a copy
    python = shlex.quote(sys.executable)
    inject = " --inject_missing_state" if stage in (1, 2) else ""
    command = (
        f"{python} -m deepspeed.checkpoint.ds_to_universal --input_folder"
        f" {shlex.quote(str(found.folder))} --output_folder {shlex.quote(str(twin))}"
        f" --num_extract_workers 1 --num_merge_workers 1{inject} && {python} -m"
        f" auditgap.training.checkpoints adopt {shlex.quote(str(twin))}"
    )
    ranks = f"{found.world} rank{'s' if found.world != 1 else ''}"
    sentence = (
        f"{found.folder} was written by {ranks}, and this run has {world}. To go on with {world},"
        f" type first: {command}"
    )
    return Conversion(twin, command, sentence)


def adopt(twin: Path) -> Checkpoint:
    """Seal a `…_universal` folder that this user has just converted, with the step and facts of the
    checkpoint beside it.

    Raises UsageError when the name is another or the checkpoint that it was made from is not there
    or not whole.
    """
    source = twin.with_name(twin.name.removesuffix(_UNIVERSAL))
    if not twin.is_dir() or source.name == twin.name or not _STEP.fullmatch(source.name):
        raise UsageError(
            f"{twin} is no converted checkpoint; a folder such as"
            f" checkpoints/{name_of(12)}{_UNIVERSAL} is wanted."
        )
    try:
        found = _verify(source, hashes=True)
    except _Torn as why:
        raise UsageError(
            f"{twin} was made from {source.name}, which is not whole: {why}. Convert a whole one."
        ) from None
    remove(twin / MANIFEST)
    seal(twin, step=found.step, world=0, facts={**found.facts, "converted_from_world": found.world})
    return Checkpoint(
        twin, found.step, 0, found.stage, {**found.facts, "converted_from_world": found.world}
    )


# ----------------------------------------------------------------- rotate


def rotate(root: Path, keep: int = 2, also: Collection[int] = ()) -> list[int]:
    """Delete old checkpoints but the `keep` newest whole ones and the steps in `also`; returns the
    steps deleted.

    The newest whole one always stays, whatever `keep` says, and so does anything newer than it,
    anything that another user's key signed, and everything when nothing is whole. Each goes by a
    rename first, so that a kill at any moment leaves either the whole checkpoint or none of it
    under its name. Whole means here: signed, and every file there in its size (hashing everything
    at every save would cost more than the save). Raises DiskError.
    """
    whole, torn = [], []
    for step in steps(root):
        try:
            _verify(root / name_of(step), hashes=False)
        except _Torn:
            torn.append(step)
        except Refused:
            continue
        else:
            whole.append(step)
    kept = {*whole[-max(1, keep) :], *also}
    gone = [s for s in sorted({*whole, *torn}) if s not in kept and whole and s < whole[-1]]
    if whole and (_pointer(root) or "") != name_of(whole[-1]):
        point(root, whole[-1])  # before the deletions: it may name one of them
    for step in gone:
        for name in (name_of(step) + _UNIVERSAL, name_of(step)):
            if (root / name).is_dir():
                with disk_errors(root / name):
                    os.rename(root / name, _free(root / f".{name}.deleting"))
    if gone:
        sync_folder(root)
    _sweep(root)
    return gone


def _free(path: Path) -> Path:
    remove(path)  # the leavings of a kill
    return path


def _sweep(root: Path) -> None:
    """Finish deletions and drop half-written pointers that a kill left behind."""
    for path in list(root.iterdir()) if root.is_dir() else ():
        if _LEAVING.fullmatch(path.name):
            remove(path)
    clean_stale(root)


# ------------------------------------------------------------------ inside


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


def _pointer(root: Path) -> str | None:
    """The step folder that `latest` names; None when there is no such file or it names something
    else."""
    try:
        name = (root / "latest").read_text(encoding="utf-8")[:80].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _STEP.fullmatch(name) else None


def _verify(folder: Path, *, hashes: bool) -> Checkpoint:
    """The checkpoint in `folder`, seen to be this user's and whole. Raises _Torn, or Refused for a
    strange signature."""
    if not (folder / MANIFEST).exists():
        raise _Torn("its save was cut short (no manifest.json)")
    manifest = None if (folder / MANIFEST).is_symlink() else read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("hmac"), str):
        raise _Torn("its manifest.json is not readable")
    body = {k: v for k, v in manifest.items() if k != "hmac"}
    _check_signature(folder, body, manifest["hmac"])
    # from here on every value is one that `seal` wrote
    if body["schema"] != SCHEMA:
        raise Refused(
            f"{folder} was made by another version of auditgap (schema {body['schema']}); resume"
            " with that version."
        )
    if body["name"] != folder.name:
        raise Refused(
            f"{folder} was made as {body['name']} and renamed since; give it back its name."
        )
    files: dict[str, FileFact] = body["files"]
    present = set(_names(folder))
    if missing := sorted(set(files) - present):
        raise _Torn(
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
            raise _Torn(f"{name} is no plain file")
        if (size := path.stat().st_size) != fact["size"]:
            raise _Torn(f"{name} has {size:,} bytes where {fact['size']:,} were written")
    if hashes:
        with ThreadPoolExecutor(min(4, len(files) or 1)) as pool:
            for name, fact in zip(files, pool.map(lambda n: _fact(folder / n), files), strict=True):
                if fact["sha256"] != files[name]["sha256"]:
                    raise _Torn(f"{name} is not the file that was written (its SHA-256 differs)")
    return Checkpoint(folder, body["step"], body["world"], body["facts"]["stage"], body["facts"])


def _check_signature(folder: Path, body: Mapping[str, Any], signature: str) -> None:
    key = _key(create=False)
    if key is not None and hmac.compare_digest(
        _signature(body, key).encode(), signature.encode("utf-8", "replace")
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


def _signature(body: Mapping[str, Any], key: bytes) -> str:
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


def _main(words: list[str]) -> int:
    if len(words) != 2 or words[0] != "adopt":
        print(
            "usage: python -m auditgap.training.checkpoints adopt"
            " CHECKPOINTS/step00000012_universal",
            file=sys.stderr,
        )
        return UsageError.exit_code
    try:
        found = adopt(Path(words[1]))
    except AuditgapError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{found.folder} is sealed; run the training command again.")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
