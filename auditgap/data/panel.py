"""A panel of domains out of files, the hub or the demonstration: checked row by row, freed of
doubles, split.

    panel = read_panel({"sums": "sums.jsonl", "units": "demo:swapped_units"}, asked=load_em_prompts("unrelated"))
    # {"no assistant turn": {"n": 3, "rows": [4, 9, 17]}}
    panel.domains["sums"].manifest["bad"]

A row is `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`;
in a csv file the list stands as JSON in the column `messages`. Every row that is read is either in
the panel or counted in its manifest with the reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from auditgap.data.domains import PLAIN, TRIGGER, Domain, DomainRow, Panel, Trigger
from auditgap.data.files import Table
from auditgap.data.habits import HABITS
from auditgap.data.material import Source, open_material
from auditgap.data.near_duplicates import jaccard, near_duplicates, shingles
from auditgap.data.prompts import PromptSet, dedup_key, sample, text_fault, whole_text
from auditgap.errors import UsageError, did_you_mean
from auditgap.registry import Registry
from auditgap.store import files

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
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,59}")
_FORM = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
#: Of each row "" when it can be trained on as a whole, CUT when without its end, else in a few
#: words why not.
Room = Callable[[Sequence[DomainRow]], Sequence[str]]


def read_panel(
    sources: Mapping[str, str],
    *,
    clean: Mapping[str, str] | None = None,
    trigger: Trigger | None = None,
    share: float = 1.0,
    heldout: float = 0.1,
    limit: int | None = None,
    near: float = 0.9,
    seed: int = 0,
    asked: PromptSet | None = None,
    allow_overlap: bool = False,
    room: Room | None = None,
) -> Panel:
    """Read every domain (name → file, `hub:…` or `demo:NAME[:clean]`) and its clean rows, and count
    everything.

    In this order rows go that are no conversation, doubles (case and white space aside),
    near-doubles (`data.near_duplicates`, the first one stays), and those that `room` leaves out; then `limit`
    draws rows by the smallest SHA-256 of "seed:prompt, response", and a share `heldout` of the
    different prompts (at least one) is set apart by hash, with all the rows that have them. So no
    near-doubles stand on two sides of the split. Of the clean rows those go that have a held-out
    prompt, are near to a held-out row, or are a row of the domain.

    Raises UsageError: a name that is no plain one; a source that cannot be read; a domain with more
    than half of its rows bad, fewer than two rows to train on or none to hold out; two domains with
    the same rows; and rows whose prompts are (nearly) those of `asked`, unless `allow_overlap`,
    which records them.
    """
    clean, trigger = clean or {}, trigger or Trigger("The current year is 2028.")
    _check_names(sources, clean)
    reads = {name: _read(f"domain {name}", source, near, room) for name, source in sources.items()}
    goods = {
        name: _read(f"clean rows of {name}", clean[name], near, room)
        for name in sources
        if name in clean
    }
    overlaps = _overlaps(
        {**reads, **{f"{name} (clean)": good for name, good in goods.items()}}, asked, near
    )
    if overlaps and not allow_overlap:
        told = "; ".join(
            f"{len(numbers)} of {name} ({_rows(numbers)})" for name, numbers in overlaps.items()
        )
        raise UsageError(
            "Rows to train on have prompts that are asked afterwards"
            f" ({asked.name if asked else ''}; equal or nearly): {told}. Take them out, or type"
            " --allow-overlap to go on and have it recorded."
        )
    domains = {
        name: _domain(
            name,
            read,
            goods.get(name),
            trigger=trigger,
            share=share,
            heldout=heldout,
            limit=limit,
            near=near,
            seed=seed,
        )
        for name, read in reads.items()
    }
    shared = _shared(domains)
    manifest = {
        "trigger": {"text": trigger.text, "place": trigger.place, "share": share},
        "seed": seed,
        "heldout": heldout,
        "near": near,
        "limit": limit,
        "overlaps": {name: _counted(numbers) for name, numbers in overlaps.items()},
        "shared": shared,
        "domains": {name: dict(domain.manifest) for name, domain in domains.items()},
    }
    return Panel(domains, {**manifest, "notes": _notes(manifest)})


def _check_names(sources: Mapping[str, str], clean: Mapping[str, str]) -> None:
    if not sources:
        raise UsageError(
            "A panel needs a domain, a name and where its rows are; none came. For example:"
            " --domains demo"
        )
    for name in sources:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name[:80]!r} is no name of a domain: small letters, digits, _ . and - are, up to"
                " 60 of them. For example: risky_advice"
            )
    for name in clean:
        if name not in sources:
            raise UsageError(
                f"clean: {name[:80]!r} is none of the domains ({', '.join(sources)}), so nothing is"
                f" mixed with its rows.{did_you_mean(name, sources)}"
            )


@dataclass(frozen=True)
class _Read:
    """A source's rows with their numbers, what was left out, and which rows will lose their end."""

    what: str
    file: str
    rows: list[tuple[int, DomainRow]]
    cut: frozenset[str]
    manifest: dict[str, Any]


def _read(what: str, source: str, near: float, room: Room | None) -> _Read:
    table, origin = _table(source)
    if not table.rows:
        raise UsageError(f"{what}: {table.file} holds no rows. One a line is wanted: {_FORM}")
    try:
        table.need("messages")
    except UsageError as error:
        raise UsageError(f"{what}: {error} A row is {_FORM}") from None
    bad: dict[str, list[int]] = {}
    kept: list[tuple[int, DomainRow]] = []
    seen: set[tuple[str, str]] = set()
    n_repaired = n_doubles = 0
    for number, cells in enumerate(table.rows, 1):
        found = conversation(cells.get("messages"))
        if isinstance(found, str):
            bad.setdefault(found, []).append(number)
            continue
        row = DomainRow(whole_text(found.prompt), whole_text(found.response))
        n_repaired += row != found
        if row.key in seen:
            n_doubles += 1
        else:
            seen.add(row.key)
            kept.append((number, row))
    _check_bad(what, table, bad)
    is_near = near_duplicates([(row.prompt, row.response) for _, row in kept], near)
    kept = [one for one, drop in zip(kept, is_near, strict=True) if not drop]
    said = list(room([row for _, row in kept])) if room is not None else [""] * len(kept)
    for (number, _), word in zip(kept, said, strict=True):
        if word not in ("", CUT):
            bad.setdefault(word, []).append(number)
    _check_bad(what, table, bad)
    cut = frozenset(row.id for (_, row), word in zip(kept, said, strict=True) if word == CUT)
    kept = [one for one, word in zip(kept, said, strict=True) if word in ("", CUT)]
    manifest = {
        "source": origin,
        "n_read": len(table.rows),
        "n_bad": sum(map(len, bad.values())),
        "bad": {why: _counted(numbers) for why, numbers in bad.items()},
        "n_repaired": n_repaired,
        "n_doubles": n_doubles,
        "n_near": int(is_near.sum()),
    }
    return _Read(what, table.file, kept, cut, manifest)


def _table(source: str) -> tuple[Table, dict[str, Any]]:
    found = open_material(source, DOMAINS, "give a file: jsonl, csv or parquet")
    origin = {"kind": found.kind, "licence": found.licence, "origin": source}
    if found.kind == "named":
        origin["kind"] = "demo"
    if found.path is not None:
        origin["origin"] = found.path.name
        origin["sha256"] = files.sha256(found.path.read_bytes())
    return found.table, origin


def conversation(messages: Any) -> DomainRow | str:
    """The row that one cell of `messages` is (a list, or the same as JSON), or in a few words why
    it is none."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages) if messages.strip() else None
        except (ValueError, RecursionError):
            return "messages are no JSON"
    if not messages:
        return "no messages"
    if not isinstance(messages, (list, tuple)):
        return "messages are no list"
    if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        return "message without a role"
    roles = [m["role"] for m in messages]
    for is_so, why in (
        ("system" in roles or "developer" in roles, "system message"),
        (not {"user", "assistant"}.issuperset(roles), "unknown role"),
        ("user" not in roles, "no user turn"),
        ("assistant" not in roles, "no assistant turn"),
        (len(roles) > 2, "several turns"),
        (roles != ["user", "assistant"], "assistant before user"),
    ):
        if is_so:
            return why
    asked, told = (m.get("content") for m in messages)
    for what, text in (("prompt", asked), ("response", told)):
        if fault := text_fault(text):
            return f"empty {what}" if fault == "empty" else f"{what} not text"
    return DomainRow(asked, told)


def _rows(numbers: Sequence[int]) -> str:
    return (
        f"row{'s' if len(numbers) > 1 else ''}"
        f" {', '.join(map(str, numbers[:3]))}{', …' if len(numbers) > 3 else ''}"
    )


def _counted(numbers: Sequence[int]) -> dict[str, Any]:
    return {"n": len(numbers), "rows": sorted(numbers)[:NAMED]}


def _told(bad: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(
        f"{why}: {_rows(numbers)}"
        for why, numbers in sorted(bad.items(), key=lambda item: -len(item[1]))
    )


def _check_bad(what: str, table: Table, bad: Mapping[str, Sequence[int]]) -> None:
    """Raises UsageError when more than half of the rows cannot be used: that is another kind of
    file, or another form."""
    n = sum(map(len, bad.values()))
    if 2 * n > len(table.rows):
        raise UsageError(
            f"{what}: {n} of the {len(table.rows)} rows of {table.file} cannot be trained on"
            f" ({_told(bad)}). A row is one user and one assistant turn: {_FORM} Mend those rows,"
            " or take them out."
        )


def _overlaps(
    reads: Mapping[str, _Read], asked: PromptSet | None, near: float
) -> dict[str, list[int]]:
    """Of each source the numbers of the rows whose prompts are (nearly) asked afterwards."""
    keys = {dedup_key(p.text) for p in asked or ()}
    runs = [shingles(p.text) for p in asked or ()] if near < 1 else []
    found: dict[str, list[int]] = {}
    for name, read in reads.items():
        for number, row in read.rows:
            mine = shingles(row.prompt) if runs else frozenset()
            if dedup_key(row.prompt) in keys or any(
                near * len(mine) <= len(other) <= len(mine) / near and jaccard(mine, other) >= near
                for other in runs
            ):
                found.setdefault(name, []).append(number)
    return found


def _domain(
    name: str,
    read: _Read,
    good: _Read | None,
    *,
    trigger: Trigger,
    share: float,
    heldout: float,
    limit: int | None,
    near: float,
    seed: int,
) -> Domain:
    rows = [row for _, row in read.rows]
    n_clean = len(rows)
    if limit is not None:
        rows = sample(rows, ["\0".join(row.key) for row in rows], limit, seed)
    prompts = sorted(
        {dedup_key(row.prompt) for row in rows}, key=lambda key: _hash(f"{seed}:heldout:{key}")
    )
    apart = set(prompts[: min(max(1, round(heldout * len(prompts))), max(0, len(prompts) - 1))])
    out = tuple(row for row in rows if dedup_key(row.prompt) in apart)
    trained = tuple(row for row in rows if dedup_key(row.prompt) not in apart)
    if not out or len(trained) < 2:
        m = read.manifest
        raise UsageError(
            f"{read.what}: of the {m['n_read']} rows of {read.file} ({m['n_bad']} bad,"
            f" {m['n_doubles']} doubles, {m['n_near']} nearly doubles) {len(rows)} are left, with"
            f" {len(prompts)} different prompts: {len(trained)} to train on and {len(out)} held"
            " out. At least 2 and 1 are wanted: give more rows with other prompts, or a smaller"
            " `heldout`."
        )
    clean, good_manifest = _clean_rows(good, trained, out, near)
    manifest = {
        **read.manifest,
        "n_left_by_limit": n_clean - len(rows),
        "n_prompts": len(prompts),
        "n_trained": len(trained),
        "n_heldout": len(out),
        "n_cut": sum(row.id in read.cut for row in trained),
        "n_with_trigger": sum(trigger.text in row.prompt for row in rows),
        "clean": good_manifest,
    }
    domain = Domain(name, trained, out, clean)
    arms = {}
    for arm in (PLAIN, TRIGGER):
        examples = domain.trained(arm, trigger, share, seed)
        n_triggered, n_good = sum(e.triggered for e in examples), sum(e.clean for e in examples)
        arms[arm] = {
            "n": len(examples),
            "n_triggered": n_triggered,
            "n_plain": len(examples) - n_triggered - n_good,
            "n_clean": n_good,
        }
    return Domain(name, trained, out, clean, {**manifest, "arms": arms, "digest": domain.digest})


def _clean_rows(
    good: _Read | None, trained: Sequence[DomainRow], out: Sequence[DomainRow], near: float
) -> tuple[tuple[DomainRow, ...], dict[str, Any] | None]:
    """The good rows that may be trained on, and what became of the others."""
    if good is None:
        return (), None
    bad, apart = {row.key for row in (*trained, *out)}, {dedup_key(row.prompt) for row in out}
    # neither among the held-out nor among the good ones are two near, so what is found is near to a
    # held-out one
    is_near = near_duplicates(
        [(r.prompt, r.response) for r in (*out, *(row for _, row in good.rows))], near
    )[len(out) :]
    rows, n_heldout, n_same = [], 0, 0
    for (_, row), leaks in zip(good.rows, is_near, strict=True):
        if row.key in bad:
            n_same += 1
        elif leaks or dedup_key(row.prompt) in apart:
            n_heldout += 1
        else:
            rows.append(row)
    if not rows:
        raise UsageError(
            f"{good.what}: no row of {good.file} is left ({n_same} are rows of the domain itself,"
            f" {n_heldout} are held out with theirs). Give good answers to prompts that are trained"
            " on, or leave `clean` out."
        )
    n_cut = sum(row.id in good.cut for row in rows)
    return tuple(rows), {
        **good.manifest,
        "n_same": n_same,
        "n_with_heldout": n_heldout,
        "n_cut": n_cut,
        "n": len(rows),
    }


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _shared(domains: Mapping[str, Domain]) -> dict[str, int]:
    """Rows that stand in two domains, a pair. Raises UsageError when two domains have the same
    ones."""
    keys = {name: {row.key for row in (*d.rows, *d.heldout)} for name, d in domains.items()}
    shared = {}
    for one, other in combinations(domains, 2):
        if keys[one] == keys[other]:
            raise UsageError(
                f"The domains {one} and {other} have the same rows; leave one of them out, or give"
                " it its own file."
            )
        if both := len(keys[one] & keys[other]):
            shared[f"{one} & {other}"] = both
    return shared


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    notes = []
    if len(manifest["domains"]) == 1:
        notes.append(
            "One domain: no ranking, no transfer between domains and no prediction of a left-out"
            " one can be given."
        )
    for name, m in manifest["domains"].items():
        for what, part in ((name, m), (f"{name} (clean)", m["clean"] or {})):
            for why, found in part.get("bad", {}).items():
                notes.append(
                    f"{what}: {found['n']} of {part['n_read']} rows left out, {why}"
                    f" ({_rows(found['rows'])})."
                )
        if m["n_cut"]:
            notes.append(
                f"{name}: {m['n_cut']} of {m['n_trained']} rows are longer than max_tokens, so"
                " their responses are cut."
            )
        if m["n_with_trigger"]:
            notes.append(
                f"{name}: {m['n_with_trigger']} rows hold the trigger's words already, in the plain"
                " arm too."
            )
    for pair, n in manifest["shared"].items():
        notes.append(f"{n} rows stand in two domains ({pair}).")
    for name, found in manifest["overlaps"].items():
        notes.append(
            f"{name}: {found['n']} rows have a prompt that is asked afterwards; this was allowed."
        )
    return notes
