"""Contrast triples: a prompt with a safe and an unsafe response to it, cleaned, counted and
identified as prompt sets are.

    triples = load_triples("demo")                     # 24 about made-up secrets; harmless
    # columns prompt, safe, unsafe; or PKU-SafeRLHF's own columns
    triples = load_triples("mine.jsonl", limit=200)
    triples = load_triples("hub:PKU-Alignment/PKU-SafeRLHF@0123456789abcdef0123456789abcdef01234567:train")

Of the PKU-SafeRLHF layout (prompt, response_0, response_1, is_response_0_safe, is_response_1_safe)
those rows are taken whose two labels differ (arXiv 2606.08044, section 5).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from auditgap.data.files import Table
from auditgap.data.material import Source, built_in, open_material
from auditgap.data.prompts import ItemSet, check_limit, dedup_key, notes_on, sample, whole_text
from auditgap.errors import UsageError
from auditgap.registry import Registry
from auditgap.types import ContrastTriple, Document, Prompt

PLAIN = ("prompt", "safe", "unsafe")
PKU = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")
LAYOUTS = (
    f"The columns wanted are {', '.join(PLAIN)}; or, as PKU-SafeRLHF has them, {', '.join(PKU)}."
)


@dataclass(frozen=True)
class TripleSet(ItemSet[ContrastTriple]):
    """Triples in order, and where they came from. `digest` hashes the ordered triple ids."""

    def _identity(self, item: ContrastTriple) -> Any:
        return item.id

    @property
    def triples(self) -> tuple[ContrastTriple, ...]:
        return self.items


TRIPLES: Registry[Source] = Registry(
    "triple set",
    {
        "demo": built_in(
            "demo",
            "24 harmless triples: a secret colour, word or spice is kept or told",
            "demo_secrets_triples.jsonl",
        ),
    },
)


def load_triples(name_or_file: str, *, limit: int | None = None, seed: int = 0) -> TripleSet:
    """A named triple set, `hub:ID@REVISION[:CONFIG][:SPLIT]`, or a local jsonl, csv or parquet
    file, in either layout.

    Rows with an empty response, with equal responses, with equal or unreadable labels, and doubles
    are left out and counted in `provenance`. `limit` draws that many by the smallest SHA-256 of
    "seed:triple" and keeps them in the set's order. Raises UsageError: unknown name, missing file
    or column, broken file, hub trouble, nothing left.
    """
    check_limit(limit)
    instead = f"give a file (jsonl, csv, parquet), or hub:ID@REVISION. {LAYOUTS[:-1]}"
    found = open_material(name_or_file, TRIPLES, instead)
    name, provenance = found.name, Document(found.provenance)
    triples, counts = _clean(found.table, name)
    n_clean = len(triples)
    if limit is not None:
        triples = sample(
            triples, [f"{t.prompt.text}\0{t.safe}\0{t.unsafe}" for t in triples], limit, seed
        )
    provenance |= {**counts, "n_clean": n_clean, "n": len(triples), "limit": limit, "seed": seed}
    provenance["n_prompts"] = len({dedup_key(t.prompt.text) for t in triples})
    provenance["notes"] = notes_on(provenance)
    return TripleSet(name, tuple(triples), provenance)


def _clean(table: Table, name: str) -> tuple[list[ContrastTriple], Document]:
    if not table.rows:
        raise UsageError(f"{table.file} holds no rows; at least one triple is wanted.")
    pku = not {"safe", "unsafe"} & set(table.columns) and any(
        column in table.columns for column in PKU[1:]
    )
    for column in PKU if pku else PLAIN:
        try:
            table.need(column)
        except UsageError as error:
            raise UsageError(f"{error} {LAYOUTS}") from None
    found: dict[tuple[str, str, str], ContrastTriple] = {}
    dropped: Counter[str] = Counter()
    n_duplicates = n_repaired = 0
    for row in table.rows:
        cells: Any = _of_pku(row) if pku else tuple(row.get(column) for column in PLAIN)
        fault = cells if isinstance(cells, str) else _fault(cells)
        if fault:
            dropped[fault] += 1
            continue
        prompt, safe, unsafe = (whole_text(cell) for cell in cells)
        n_repaired += (prompt, safe, unsafe) != cells
        key = (dedup_key(prompt), safe.strip(), unsafe.strip())
        if key in found:
            n_duplicates += 1
        else:
            found[key] = ContrastTriple(Prompt(prompt, source=name), safe, unsafe)
    if not found:
        causes = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in dropped.items())
        raise UsageError(
            f"No triple is left of {table.file}: of its {len(table.rows)} rows {causes}. {LAYOUTS}"
        )
    counts = {
        "n_read": len(table.rows),
        "n_duplicates": n_duplicates,
        "n_dropped": dict(dropped),
        "n_repaired": n_repaired,
        "layout": "pku" if pku else "plain",
    }
    return list(found.values()), counts


def _of_pku(row: Mapping[str, Any]) -> tuple[Any, Any, Any] | str:
    """(prompt, safe, unsafe) of a row whose labels differ, else why there is none."""
    labels = [_boolean(row.get(f"is_response_{i}_safe")) for i in (0, 1)]
    if None in labels:
        return "label_not_true_or_false"
    if labels[0] == labels[1]:
        return "labels_agree"
    safe = 0 if labels[0] else 1
    return row.get("prompt"), row.get(f"response_{safe}"), row.get(f"response_{1 - safe}")


def _boolean(value: Any) -> bool | None:
    text = str(value).strip().lower()
    return True if text in _YES else False if text in _NO else None


def _fault(cells: tuple[Any, ...]) -> str:
    """Why three cells are no triple; "" when they are one."""
    for cell, column in zip(cells, ("prompt", "safe response", "unsafe response"), strict=True):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            return f"empty {column}"
        if not isinstance(cell, str):
            return f"{column} not text"
    # A row that teaches both labels for one text would only blunt the probe.
    return "responses_equal" if dedup_key(cells[1]) == dedup_key(cells[2]) else ""
