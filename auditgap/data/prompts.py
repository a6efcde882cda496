"""A prompt set, cleaned and identified: empty prompts dropped, doubles dropped, a sample drawn, all
of it counted.

    harmbench = load_prompts("harmbench", limit=50, seed=0)
    harmbench.digest                           # goes into every cell's key
    harmbench.provenance["n_duplicates"]       # 0

A sample is chosen by hash, so it does not depend on the file's order, and `limit=50` holds all of
`limit=20`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from auditgap.data.files import Table
from auditgap.data.material import open_material
from auditgap.data.sources import SOURCES
from auditgap.errors import UsageError
from auditgap.types import Document, Prompt, digest

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ItemSet(Generic[_Item]):
    """Items in order, where they came from, and a `digest` of what makes them what they are, in
    that order."""

    name: str
    items: tuple[_Item, ...]
    provenance: Document = field(default_factory=dict)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest([self._identity(item) for item in self.items]))

    def _identity(self, item: _Item) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[_Item]:
        return iter(self.items)


@dataclass(frozen=True)
class PromptSet(ItemSet[Prompt]):
    """Prompts in order, and where they came from. `digest` hashes the ordered prompt ids and
    targets."""

    def _identity(self, item: Prompt) -> Any:
        return [item.id, item.target]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.items


def dedup_key(text: str) -> str:
    """What makes two prompts the same: lower case, white space folded."""
    return " ".join(text.lower().split())


def load_prompts(
    name_or_file: str, *, limit: int | None = None, seed: int = 0, column: str = "prompt"
) -> PromptSet:
    """A named set, `hub:ID@REVISION[:CONFIG][:SPLIT]`, or a local jsonl, csv, parquet or txt file.
    An optional column `target` sets targets.

    `limit` draws that many by the smallest SHA-256 of "seed:prompt" and keeps them in the set's
    order. The first of a pair of doubles stays. Raises UsageError: unknown name, missing file or
    column, broken file, nothing left.
    """
    check_limit(limit)
    found = open_material(name_or_file, SOURCES, "give a file: jsonl, csv, parquet or txt")
    name, provenance = found.name, Document(found.provenance)
    prompts, counts = _clean(found.table, name, column)
    n_clean = len(prompts)
    if limit is not None:
        prompts = sample(prompts, [p.text for p in prompts], limit, seed)
    provenance |= {
        "column": column,
        **counts,
        "n_clean": n_clean,
        "n": len(prompts),
        "limit": limit,
        "seed": seed,
    }
    provenance["notes"] = notes_on(provenance)
    return PromptSet(name, tuple(prompts), provenance)


def _clean(table: Table, name: str, column: str) -> tuple[list[Prompt], Document]:
    if not table.rows:
        raise UsageError(f"{table.file} holds no rows; at least one prompt is wanted.")
    table.need(column)
    prompts: dict[str, Prompt] = {}
    dropped: Counter[str] = Counter()
    n_duplicates = n_repaired = 0
    for number, row in enumerate(table.rows, 1):
        text: Any = row.get(column)
        target = row.get("target")
        if target is not None and not isinstance(target, str):
            raise UsageError(
                f"{table.file}, row {number}: `target` must be text; {type(target).__name__} came."
            )
        if fault := text_fault(text):
            dropped[fault] += 1
            continue
        whole, target = whole_text(text), whole_text(target) if target and target.strip() else None
        n_repaired += whole != text
        if (key := dedup_key(whole)) in prompts:
            n_duplicates += 1
        else:
            prompts[key] = Prompt(whole, source=name, target=target)
    if not prompts:
        causes = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in dropped.items())
        raise UsageError(
            f"No prompt is left of {table.file}: of its {len(table.rows)} rows {causes} in column"
            f" {column!r}."
        )
    counts = {
        "n_read": len(table.rows),
        "n_duplicates": n_duplicates,
        "n_dropped": dict(dropped),
        "n_repaired": n_repaired,
    }
    return list(prompts.values()), counts


def text_fault(text: object) -> str:
    """Why a cell holds no prompt: `empty`, `not_text`; "" when it does."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return "empty"
    return "" if isinstance(text, str) else "not_text"


def whole_text(text: str) -> str:
    """Lone surrogates (possible in JSON, not in UTF-8) as U+FFFD: no tokenizer and no parquet file
    can take them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_limit(limit: object) -> None:
    """Raises UsageError unless --limit is None or a whole number above 0."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UsageError(
            f"--limit must be a whole number above 0; {limit!r} came. For example: --limit 50"
        )


def sample(items: list[_Item], texts: Sequence[str], limit: int, seed: int) -> list[_Item]:
    """The `limit` items whose text has the smallest SHA-256 of "seed:text", in the order they came
    in."""
    draws = [hashlib.sha256(f"{seed}:{text}".encode()).digest() for text in texts]
    chosen = set(sorted(range(len(items)), key=draws.__getitem__)[:limit])
    return [item for i, item in enumerate(items) if i in chosen]


def notes_on(provenance: Document) -> list[str]:
    """Sentences that belong in the report: what was left out, and what so small a set cannot
    show."""
    notes = []
    if provenance["n"] == 1:
        notes.append("One prompt: no confidence interval can be given.")
    if provenance["limit"] and provenance["limit"] > provenance["n_clean"]:
        notes.append(f"--limit {provenance['limit']} asked, the set holds {provenance['n_clean']}.")
    for why, n in provenance["n_dropped"].items():
        notes.append(f"{n} dropped: {why.replace('_', ' ')}.")
    if provenance["n_duplicates"]:
        notes.append(f"{provenance['n_duplicates']} doubles dropped (case and white space aside).")
    if provenance["n_repaired"]:
        notes.append(
            f"{provenance['n_repaired']} held broken Unicode (lone surrogates), now U+FFFD."
        )
    return notes
