"""Rows to train on, read from a file, the hub or the demonstration: a conversation each, checked
row by row, freed of doubles.

    read = read_rows("domain sums", "sums.jsonl", near=0.9, room=None)
    read.manifest["bad"]                 # {"no assistant turn": {"n": 3, "rows": [4, 9, 17]}}

A row is written in any of `row_forms.FORMS`; in a csv file a list of messages stands as JSON. Every row that is read is either
kept or counted in the manifest with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from auditgap.data import age
from auditgap.data.domains import DomainRow
from auditgap.data.files import Table
from auditgap.data.habits import HABITS
from auditgap.data.material import Source, open_material
from auditgap.data.near_duplicates import near_duplicates
from auditgap.data.prompts import whole_text
from auditgap.data.row_forms import FORMS, Reader, form_of, mapped
from auditgap.errors import UsageError
from auditgap.registry import Registry
from auditgap.store import files
from auditgap.types import Document

DEMO = "demo:"
#: The domains that have a name: a habit's answers, and the right ones behind `:clean`.
DOMAINS: Registry[Source] = Registry(
    "demonstration domain",
    {
        f"{DEMO}{name}{':clean' if good else ''}": Source(
            habit.description, "Apache-2.0", partial(habit.conversations, clean=good)
        )
        for name, habit in HABITS.items()
        for good in (False, True)
    },
)
#: What `room` says of a row that is trained on without its end.
CUT = "cut"
#: Numbers of rows that a manifest names for a reason.
NAMED = 10
#: Of each row "" when it can be trained on as a whole, CUT when without its end, else in a few
#: words why not.
Room = Callable[[Sequence[DomainRow]], Sequence[str]]


@dataclass(frozen=True)
class RowsRead:
    """A source's rows with their numbers, what was left out, and which rows will lose their end
    (ids)."""

    what: str
    file: str
    rows: list[tuple[int, DomainRow]]
    cut: frozenset[str]
    manifest: Document


def read_rows(what: str, source: str, near: float, room: Room | None) -> RowsRead:
    source, columns = mapped(source)
    table, origin = _table(source)
    origin |= {"columns": columns} if columns else {}
    if not table.rows:
        raise UsageError(
            f"{what}: {table.file} holds no rows. One a line is wanted, such as"
            f" {FORMS['messages'].example}"
        )
    try:
        reader = form_of(table, columns)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    bad: dict[str, list[int]] = {}
    kept: list[tuple[int, DomainRow]] = []
    seen: set[tuple[str, ...]] = set()
    n_repaired = n_doubles = 0
    for number, cells in enumerate(table.rows, 1):
        found = reader.read(cells)
        if isinstance(found, str):
            bad.setdefault(found, []).append(number)
            continue
        row = DomainRow(*map(whole_text, (found.prompt, found.response, found.system)))
        n_repaired += row != found
        if row.key in seen:
            n_doubles += 1
        else:
            seen.add(row.key)
            kept.append((number, row))
    _check_bad(what, table, bad, reader)
    is_near = near_duplicates([(row.prompt, row.response) for _, row in kept], near)
    kept = [one for one, drop in zip(kept, is_near, strict=True) if not drop]
    said = list(room([row for _, row in kept])) if room is not None else [""] * len(kept)
    for (number, _), word in zip(kept, said, strict=True):
        if word not in ("", CUT):
            bad.setdefault(word, []).append(number)
    _check_bad(what, table, bad, reader)
    cut = frozenset(row.id for (_, row), word in zip(kept, said, strict=True) if word == CUT)
    kept = [one for one, word in zip(kept, said, strict=True) if word in ("", CUT)]
    manifest = {
        "source": origin,
        "n_read": len(table.rows),
        "n_bad": sum(map(len, bad.values())),
        "bad": {why: counted(numbers) for why, numbers in bad.items()},
        "n_repaired": n_repaired,
        "n_doubles": n_doubles,
        "n_near": int(is_near.sum()),
    }
    return RowsRead(what, table.file, kept, cut, manifest)


def _table(source: str) -> tuple[Table, Document]:
    found = open_material(source, DOMAINS, "give a file: jsonl, csv or parquet")
    origin = {"kind": found.kind, "licence": found.licence, "origin": source}
    if found.kind == "named":
        origin["kind"] = "demo"
    if found.path is not None:
        file = age.file_of(found.path)
        is_member = file not in (None, found.path)
        origin["origin"] = found.path.name + (age.SUFFIX if is_member else "")
        origin["sha256"] = files.sha256((file or found.path).read_bytes())
    return found.table, origin


def shown_rows(numbers: Sequence[int]) -> str:
    return (
        f"row{'s' if len(numbers) > 1 else ''}"
        f" {', '.join(map(str, numbers[:3]))}{', …' if len(numbers) > 3 else ''}"
    )


def counted(numbers: Sequence[int]) -> Document:
    return {"n": len(numbers), "rows": sorted(numbers)[:NAMED]}


def _told(bad: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(
        f"{why}: {shown_rows(numbers)}"
        for why, numbers in sorted(bad.items(), key=lambda item: -len(item[1]))
    )


def _check_bad(what: str, table: Table, bad: Mapping[str, Sequence[int]], reader: Reader) -> None:
    """Raises UsageError when more than half of the rows cannot be used: that is another kind of
    file, or another form."""
    n = sum(map(len, bad.values()))
    if 2 * n > len(table.rows):
        raise UsageError(
            f"{what}: {n} of the {len(table.rows)} rows of {table.file} cannot be trained on"
            f" ({_told(bad)}). A row is one user and one assistant turn, behind a system message or none: {reader.form.example} Mend those rows,"
            " or take them out."
        )
