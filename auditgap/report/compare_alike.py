"""Whether a comparison is fair: every setting in which runs differ, field by field.

    compatible(parts, base, names, only_compatible=False)     # UsageError: a line a field that differs

Numbers of two runs can be set against each other only where the same question was asked: the same
tokenizer and chat template, prompts, unit, attack, judge, reward, length and dtype. What differs is
refused, or left out and said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auditgap.errors import UsageError
from auditgap.report.compare_models import Model, Part
from auditgap.store.tables import groups_of
from auditgap.types import CLEAN

#: Settings of a subject rather than of a run; they must agree between all runs, whatever was
#: audited.
OF_SUBJECT = {"tokenizer": "tokenizer", "chat_template": "chat template"}


def compatible(
    parts: Sequence[Part], base: Model, names: Mapping[str, str], only_compatible: bool
) -> tuple[set[tuple[str, str]], list[str]]:
    """(part, subject) pairs to leave out, each with its sentence; raises UsageError when there are
    any and none may be."""
    differences = [*_by_subject(parts, base, names), *_by_audit(parts, base, names)]
    if differences and not only_compatible:
        lines = "\n".join(f"  {d.says}" for d in differences)
        raise UsageError(
            "These runs asked different questions, so their numbers cannot be"
            f" compared:\n{lines}\nAudit the models alike, or leave out what differs from"
            f" {base.name} with --only-compatible."
        )
    sentences: dict[tuple[str, ...], list[str]] = {}
    for d in differences:
        sentences.setdefault((d.label, *d.who), []).append(d.says)
    left_out = [
        f"{', '.join(names[fp] for fp in who)} in {label} is left out: {'; '.join(said)}."
        for (label, *who), said in sentences.items()
    ]
    return {(d.label, fp) for d in differences for fp in d.who}, left_out


@dataclass(frozen=True, slots=True)
class _Difference:
    """One setting of one part that is not as in the reference; `who`: the fingerprints that it
    concerns."""

    label: str
    who: tuple[str, ...]
    says: str


def _by_subject(
    parts: Sequence[Part], base: Model, names: Mapping[str, str]
) -> Iterator[_Difference]:
    """Tokenizers and chat templates that are not the base's."""
    for key, what in OF_SUBJECT.items():
        wanted = getattr(base, key)
        for part in parts:
            for fingerprint, told in part.about.items():
                came = told.get(key)
                if (
                    fingerprint in names
                    and wanted is not None
                    and came is not None
                    and came != wanted
                ):
                    says = (
                        f"{what}: {_shown(wanted)} of {base.name}, {_shown(came)} of"
                        f" {names[fingerprint]} in {part.label}"
                    )
                    yield _Difference(part.label, (fingerprint,), says)
    yield from _by_length(parts, base, names)


def _by_length(
    parts: Sequence[Part], base: Model, names: Mapping[str, str]
) -> Iterator[_Difference]:
    """Older runs do not record their tokenizer, but the same prompt in another number of tokens
    gives it away."""
    lengths: dict[str, dict[str, int]] = {}
    where: dict[str, Part] = {}
    for part in parts:
        if all(part.about.get(fp, {}).get("tokenizer") for fp in part.subjects.values()):
            continue
        rows = part.folder.rows([CLEAN])
        for (own,), some in groups_of(rows, ["subject"], sort=True):
            if own in part.subjects:
                fingerprint = part.subjects[own]
                lengths.setdefault(
                    fingerprint, dict(zip(some["prompt_id"], some["n_prompt_tokens"], strict=True))
                )
                where.setdefault(fingerprint, part)
    ours = lengths.get(base.fingerprint, {})
    for fingerprint, theirs in lengths.items():
        other = sum(ours[p] != n for p, n in theirs.items() if p in ours)
        if other:
            says = (
                f"tokenizer or chat template (not recorded): {other} prompts have another number of"
                f" tokens in {names[fingerprint]} than in {base.name}"
            )
            yield _Difference(where[fingerprint].label, (fingerprint,), says)


def _by_audit(
    parts: Sequence[Part], base: Model, names: Mapping[str, str]
) -> Iterator[_Difference]:
    """Settings of a run that are not those of the base's run of that audit (or of the first, where
    the base has none)."""
    for audit in dict.fromkeys(p.audit for p in parts):
        mine = [p for p in parts if p.audit == audit]
        mine.sort(key=lambda p: base.fingerprint not in p.subjects.values())
        for part in mine[1:]:
            reference = mine[0]
            for name in [n for n in reference.settings if n in part.settings]:
                wanted, came = reference.settings[name], part.settings[name]
                if wanted != came:
                    says = (
                        f"{audit}, {name}: {_shown(wanted)} in {reference.label}, {_shown(came)} in"
                        f" {part.label}"
                    )
                    yield _Difference(
                        part.label, tuple(dict.fromkeys(part.subjects.values())), says
                    )


def unknown(
    parts: Sequence[Part], names: Mapping[str, str], skipped: set[tuple[str, str]]
) -> list[str]:
    """What could not be held against each other because a run does not record it."""
    if len({fp for p in parts for fp in p.subjects.values()}) < 2:
        return []
    said = []
    for key, what in OF_SUBJECT.items():
        silent = dict.fromkeys(
            names[fp]
            for p in parts
            for fp in p.subjects.values()
            if (p.label, fp) not in skipped and p.about.get(fp, {}).get(key) is None
        )
        if silent:
            said.append(
                f"Whether the {what} is the same could not be told: not recorded for"
                f" {', '.join(silent)}."
            )
    for audit in dict.fromkeys(p.audit for p in parts):
        mine = [p for p in parts if p.audit == audit]
        known = dict.fromkeys(
            name for p in mine for name in p.settings if not name.startswith("card of")
        )
        for part in mine:
            missing = [name for name in known if name not in part.settings]
            if missing:
                said.append(
                    f"{part.label} does not record {', '.join(missing)}, so whether it agrees could"
                    " not be told."
                )
    return said


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
