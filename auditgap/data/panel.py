"""A panel of domains out of files, the hub or the demonstration: checked row by row, freed of
doubles, split.

    panel = read_panel({"sums": "sums.jsonl", "units": "demo:swapped_units"}, asked=load_em_prompts("unrelated"))
    # {"no assistant turn": {"n": 3, "rows": [4, 9, 17]}}
    panel.domains["sums"].manifest["bad"]

What a row is, and how it is checked: `data.conversations`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from auditgap.data.conversations import Room, RowsRead, counted, read_rows, shown_rows
from auditgap.data.domains import PLAIN, TRIGGER, Domain, DomainRow, Panel, Trigger
from auditgap.data.near_duplicates import jaccard, near_duplicates, shingles
from auditgap.data.prompts import PromptSet, dedup_key, sample
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import Document

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,59}")


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
    reads = {
        name: read_rows(f"domain {name}", source, near, room) for name, source in sources.items()
    }
    goods = {
        name: read_rows(f"clean rows of {name}", clean[name], near, room)
        for name in sources
        if name in clean
    }
    overlaps = _overlaps(
        {**reads, **{f"{name} (clean)": good for name, good in goods.items()}}, asked, near
    )
    if overlaps and not allow_overlap:
        raise UsageError(_overlapping(overlaps, asked))
    split = _Split(trigger, share, heldout, limit, near, seed)
    domains = {name: split.domain(name, read, goods.get(name)) for name, read in reads.items()}
    shared = _shared(domains)
    manifest = {
        "trigger": {"text": trigger.text, "place": trigger.place, "share": share},
        "seed": seed,
        "heldout": heldout,
        "near": near,
        "limit": limit,
        "overlaps": {name: counted(numbers) for name, numbers in overlaps.items()},
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


def _overlapping(overlaps: Mapping[str, Sequence[int]], asked: PromptSet | None) -> str:
    """What to say of rows whose prompts are asked afterwards."""
    told = "; ".join(
        f"{len(numbers)} of {name} ({shown_rows(numbers)})" for name, numbers in overlaps.items()
    )
    return (
        "Rows to train on have prompts that are asked afterwards"
        f" ({asked.name if asked else ''}; equal or nearly): {told}. Take them out, or type"
        " --allow-overlap to go on and have it recorded."
    )


def _overlaps(
    reads: Mapping[str, RowsRead], asked: PromptSet | None, near: float
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


@dataclass(frozen=True, slots=True)
class _Split:
    """How the rows of a domain are drawn and set apart, the same for every domain of a panel."""

    trigger: Trigger
    share: float
    heldout: float
    limit: int | None
    near: float
    seed: int

    def domain(self, name: str, read: RowsRead, good: RowsRead | None) -> Domain:
        """A domain of these rows and clean ones. Raises UsageError where too few are left."""
        rows = [row for _, row in read.rows]
        if self.limit is not None:
            rows = sample(rows, ["\0".join(row.key) for row in rows], self.limit, self.seed)
        prompts = {dedup_key(row.prompt) for row in rows}
        apart = self._held_out(prompts)
        out = tuple(row for row in rows if dedup_key(row.prompt) in apart)
        trained = tuple(row for row in rows if dedup_key(row.prompt) not in apart)
        if not out or len(trained) < 2:
            m = read.manifest
            raise UsageError(
                f"{read.what}: of the {m['n_read']} rows of {read.file} ({m['n_bad']} bad,"
                f" {m['n_doubles']} doubles, {m['n_near']} nearly doubles) {len(rows)} are left,"
                f" with {len(prompts)} different prompts: {len(trained)} to train on and"
                f" {len(out)} held out. At least 2 and 1 are wanted: give more rows with other"
                " prompts, or a smaller `heldout`."
            )
        clean, good_manifest = _clean_rows(good, trained, out, self.near)
        domain = Domain(name, trained, out, clean)
        manifest = {
            **read.manifest,
            "n_left_by_limit": len(read.rows) - len(rows),
            "n_prompts": len(prompts),
            "n_trained": len(trained),
            "n_heldout": len(out),
            "n_cut": sum(row.id in read.cut for row in trained),
            "n_with_trigger": sum(self.trigger.text in row.prompt for row in rows),
            "clean": good_manifest,
            "arms": {arm: self._counts(domain, arm) for arm in (PLAIN, TRIGGER)},
            "digest": domain.digest,
        }
        return Domain(name, trained, out, clean, manifest)

    def _held_out(self, prompts: Collection[str]) -> set[str]:
        """The share of the prompts that is set apart, by hash: one at least, and never all."""
        by_hash = sorted(prompts, key=lambda key: _hash(f"{self.seed}:heldout:{key}"))
        n = max(1, round(self.heldout * len(by_hash)))
        return set(by_hash[: min(n, max(0, len(by_hash) - 1))])

    def _counts(self, domain: Domain, arm: str) -> Document:
        """What one arm is trained on, in rows."""
        examples = domain.trained(arm, self.trigger, self.share, self.seed)
        n_triggered, n_good = sum(e.triggered for e in examples), sum(e.clean for e in examples)
        return {
            "n": len(examples),
            "n_triggered": n_triggered,
            "n_plain": len(examples) - n_triggered - n_good,
            "n_clean": n_good,
        }


def _clean_rows(
    good: RowsRead | None, trained: Sequence[DomainRow], out: Sequence[DomainRow], near: float
) -> tuple[tuple[DomainRow, ...], Document | None]:
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
                    f" ({shown_rows(found['rows'])})."
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
