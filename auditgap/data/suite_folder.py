"""A suite on the disk: built once from benchmarks, read and checked ever after.

    # prompts.parquet, ledger.json, manifest.json
    built = build_suite("paper", Path("runs/suites/paper"))
    # the same suite; a changed file is refused
    read_suite(Path("runs/suites/paper")).digest

The folder is private (0700, the prompts 0600), and it appears whole or not at all. Building again
changes nothing while every source stands at the manifest's revision.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auditgap.data.benchmarks import KINDS, Wanted, wanted
from auditgap.data.ledger import FITTED, LeakageLedger, prompt_hash
from auditgap.data.prompts import dedup_key, load_prompts
from auditgap.data.suite import SCHEMA, SHORTEST, Suite, assemble, explain_missing, read_all
from auditgap.errors import UsageError
from auditgap.store import files, tables
from auditgap.types import Document, Prompt

PROMPTS, MANIFEST, LEDGER = "prompts.parquet", "manifest.json", "ledger.json"


@dataclass(frozen=True, slots=True)
class _Row:
    source: str
    kind: str
    prompt: str


def build_suite(
    spec: str,
    out: Path,
    *,
    places: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    new_revisions: bool = False,
) -> tuple[Suite, bool]:
    """The suite in `out`, and whether it was written now: a complete one of the same sources and
    revisions is only checked.

    `places`: benchmark -> file, folder or `hub:…` to read it from. Sources that are missing in a
    suite built before are tried again. Raises UsageError: a source that cannot be read (without
    `allow_missing`, or when the suite holds it already; all are named), another suite in `out`, a
    source that stands at another revision than the manifest's (without `new_revisions`). Raises
    DiskError.
    """
    out = Path(out)
    sources = wanted(spec, places)
    before = _manifest(out) if (out / MANIFEST).exists() else None
    if out.exists() and before is None and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} is there already and holds no suite; name another folder with --out."
        )
    known: dict[str, str] = {}
    if before is not None:
        names = [*before["sources"], *before["missing"]]
        if set(names) != {s.name for s in sources}:
            raise UsageError(
                f"{out} holds another suite ({', '.join(names)}); name another folder with --out,"
                " or the same --suite."
            )
        if not new_revisions:
            known = _agreed(before, sources, out)
            if not before["missing"]:
                return read_suite(out), False
    read, missing = read_all(sources, known)
    lost = (
        {}
        if before is None or new_revisions
        else {n: why for n, why in missing.items() if n in before["sources"]}
    )
    if lost or (missing and not (allow_missing and read)):
        raise UsageError(explain_missing(lost or missing))
    suite = assemble(read, missing)
    if (
        before is not None
        and suite.digest == before["digest"]
        and _sources(suite.manifest) == _sources(before)
    ):
        return read_suite(out), False
    _write(suite, out)
    return read_suite(out), True


def _sources(manifest: Mapping[str, Any]) -> Any:
    return manifest["sources"], set(manifest["missing"])


def _agreed(before: Mapping[str, Any], sources: Sequence[Wanted], out: Path) -> dict[str, str]:
    """Source -> revision of the manifest. Raises UsageError when a source now comes from elsewhere,
    or stands elsewhere."""
    changed, known = [], {}
    for source in sources:
        entry, now = before["sources"].get(source.name), source.origin
        if entry is None:
            continue
        kinds = [part.kind for part in source.benchmark.parts]
        # A benchmark without a pinned commit stays at the one that was found when the suite was
        # first built.
        is_now = [now.kind, now.place, now.revision or entry["revision"], kinds]
        was = [entry[key] for key in ("origin", "place", "revision", "kinds")]
        if was != is_now:
            changed.append(f"  {source.name}: {_told(*was)} then, {_told(*is_now)} now")
        known[source.name] = entry["revision"]
    if changed:
        raise UsageError(
            f"{out} was built from other revisions; a suite that changes under its name would make"
            " results incomparable. Name another folder with --out, or replace it with"
            " --new-revisions.\n" + "\n".join(changed)
        )
    return known


def _told(origin: str, place: str, revision: str | None, kinds: Sequence[str]) -> str:
    return (
        f"{origin} {place}"
        + (f" at {revision[:12]}" if revision else "")
        + f" ({', '.join(kinds)})"
    )


def _write(suite: Suite, out: Path) -> None:
    rows = [_Row(p.source, suite.kind(p), p.text) for p in suite]
    content = {
        PROMPTS: tables.to_bytes(tables.rows_to_table(rows, _Row)),
        LEDGER: files.to_json(suite.ledger().to_json()),
    }
    manifest = {
        **suite.manifest,
        "name": suite.name,
        "digest": suite.digest,
        "files": {name: files.sha256(data) for name, data in content.items()},
    }
    content[MANIFEST] = files.seal(manifest)
    with files.disk_errors(out, sum(map(len, content.values()))):
        out.parent.mkdir(parents=True, exist_ok=True)
        files.clean_stale(out.parent)
        tmp, old = files.temporary(out), files.temporary(out)
        try:
            tmp.mkdir(mode=files.PRIVATE_FOLDER)
            for name, data in content.items():
                files.write_new(tmp / name, data, files.PRIVATE)
            if out.exists():
                os.rename(out, old)
            os.rename(tmp, out)
            files.sync_folder(out.parent)
        except BaseException:
            files.remove(tmp)
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
        files.remove(old)


def read_suite(folder: Path) -> Suite:
    """The suite in a folder, once its files are what the manifest says.

    Raises UsageError: no suite, one of another schema, a changed or torn file, or counts and digest
    that do not agree.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{folder}: {name} cannot be read ({error.strerror}); {_AGAIN}"
            ) from None
        if files.sha256(data) != expected:
            raise UsageError(
                f"{folder}: {name} is not the file that was built (its SHA-256 is another);"
                f" {_AGAIN}"
            )
    frame = tables.to_frame(tables.from_bytes((folder / PROMPTS).read_bytes()))
    if list(frame.columns) != ["source", "kind", "prompt"]:
        raise UsageError(
            f"{folder}: {PROMPTS} has the columns {', '.join(frame.columns)}; source, kind and"
            " prompt are wanted."
        )
    prompts = tuple(Prompt(row["prompt"], source=row["source"]) for row in tables.rows_of(frame))
    kinds = dict(zip((p.id for p in prompts), frame["kind"], strict=True))
    suite = Suite(manifest["name"], prompts, manifest, kinds=kinds)
    counts = {name: entry["n"] for name, entry in manifest["sources"].items() if entry["n"]}
    agrees = (
        suite.digest == manifest["digest"],
        len({dedup_key(p.text) for p in prompts}) == len(prompts) == manifest["n"],
        Counter(p.source for p in prompts) == counts,
        Counter(kinds.values()) == manifest["n_by_kind"],
        set(kinds.values()) <= set(KINDS),
        all(len(p.text.strip()) >= SHORTEST for p in prompts),
    )
    if not all(agrees):
        raise UsageError(f"{folder}: the prompts are not those that the manifest counts; {_AGAIN}")
    return suite


_AGAIN = "take the folder away and build it again."


def _manifest(folder: Path) -> Document:
    manifest = files.read_document(folder / MANIFEST, _AGAIN.capitalize())
    if manifest is None or (schema := manifest.get("schema")) is None:
        raise UsageError(
            f"{folder} holds no suite (no {MANIFEST} of one). Build one: auditgap data"
            f" build --out {folder}"
        )
    if schema != SCHEMA:
        raise UsageError(
            f"{folder} holds a suite of schema {schema}, this auditgap knows {SCHEMA}; build it in"
            " another folder."
        )
    lacking = [
        key
        for key in ("name", "digest", "files", "sources", "missing", "n", "n_by_kind")
        if key not in manifest
    ]
    if lacking or PROMPTS not in manifest["files"]:
        raise UsageError(f"{folder}: the manifest lacks {', '.join(lacking) or PROMPTS}; {_AGAIN}")
    return manifest


def overlap(suite: Suite, other: str) -> int:
    """Prompts of the suite that something else holds too, case and white space aside: a suite's
    folder, a training's `ledger.json` (what a model was fitted to), or whatever `load_prompts`
    reads. Raises UsageError when it cannot be read."""
    path = Path(other).expanduser()
    if path.name == LEDGER:
        theirs = {
            key for key, roles in LeakageLedger.load(path).roles.items() if roles & set(FITTED)
        }
    elif path.is_dir():
        theirs = {prompt_hash(p.text) for p in read_suite(path)}
    else:
        theirs = {prompt_hash(p.text) for p in load_prompts(other)}
    return sum(prompt_hash(p.text) in theirs for p in suite)
