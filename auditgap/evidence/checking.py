"""Whether a run is what was signed: with the public key and the run's folder alone, on any machine,
without the model.

    seen = verify(store, keys.read(Path("auditor.pem.pub")))
    for finding in seen.findings: print(finding)      # nothing: every signed figure stands
    seen.not_checked                                  # what this folder does not let one check

Tables and verdicts are computed again from the cells, whose content the signature binds. Numbers of
another machine may differ in their last digits and still agree; what is stored is compared exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from auditgap.errors import AuditgapError, UsageError
from auditgap.evidence import attest, cells, dsse, manifest
from auditgap.report.gather import PartData
from auditgap.report.verdict_lines import Criteria
from auditgap.store import RunFolder, files
from auditgap.store.files import Damaged
from auditgap.store.tables import rows_of, stored_sha256, to_csv, to_markdown, unseal
from auditgap.types import Document

_Made = TypeVar("_Made")

CLOSE = 1e-9  #: of two machines' figures, relative
_FORMS: Mapping[str, Callable[[pd.DataFrame], str]] = {"csv": to_csv, "md": to_markdown}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was signed."""

    what: str  #: its kind, in a word or two: "row", "criterion", "dropped cell", …
    where: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}, {self.where}: {self.expected} was signed, {self.found} is there"


@dataclass
class Seen:
    """What `verify` came to."""

    statement: Document
    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def say(self, what: str, where: str, expected: object, found: object) -> None:
        self.findings.append(Finding(what, where, _short(expected), _short(found)))


def verify(
    store: RunFolder | Path, key: Ed25519PublicKey, *, models: Mapping[str, Path] | None = None
) -> Seen:
    """Check a run's folder against what was signed of it (`evidence/` in it). `models`: folders of
    the audited models, by name, for whoever has them.

    Raises UsageError where there is nothing signed, or the folder is of an earlier release.
    """
    place = store if isinstance(store, Path) else store.path
    signed = dsse.read(place / attest.RESULT_FILE)
    seen = Seen(signed.statement)
    if not signed.signed_by(key):
        seen.say("signature", str(attest.RESULT_FILE), "this key's signature", "none of it")
    _shape(seen.statement, place / attest.RESULT_FILE)
    criteria = _plan(place, key, seen)
    try:
        run = RunFolder.load(store) if isinstance(store, Path) else store
        if run.unchecked:
            raise UsageError(f"{run.unchecked} Nothing of it can be verified.")
        _run(run, seen)
        _cells(run, seen)
        made, read = _computed("table", lambda: attest.reading_of(run), seen) or ({}, {})
        _tables(run, made, seen)
        _verdicts(run, criteria, read, seen)
        _report(run, criteria, seen)
    except Damaged as damage:
        seen.say("damaged", str(place), "a file as it was written", str(damage))
    _models(models or {}, place, seen)
    return seen


#: Of a result's predicate.
_PARTS: Mapping[str, type | tuple[type, ...]] = {
    "audit": str,
    "config": str,
    "fingerprints": dict,
    "judge_cards": dict,
    "criteria": dict,
    "cells": dict,
    "tables": dict,
    "verdicts": list,
}


def _shape(statement: Document, where: Path) -> None:
    """Raises UsageError for a Statement that is no result of an audit."""
    predicate = statement["predicate"]
    is_result = statement["predicateType"] == attest.RESULT
    if not is_result or not all(isinstance(predicate.get(k), t) for k, t in _PARTS.items()):
        raise UsageError(
            f"{where} states no result of an audit. Give what `auditgap attest` wrote."
        )
    try:
        Criteria(**predicate["criteria"])
    except ValueError:
        raise UsageError(f"{where} has criteria that are none: {predicate['criteria']}.") from None


def _plan(place: Path, key: Ed25519PublicKey, seen: Seen) -> Document:
    """The criteria that count: those of the statement, once the plan agrees."""
    predicate = seen.statement["predicate"]
    criteria = dict(predicate["criteria"])
    if predicate.get("plan") is None:
        seen.not_checked.append("a plan: none was signed before this run")
        return criteria
    try:
        plan = dsse.read(place / attest.PLAN_FILE)
        planned = plan.statement
    except UsageError:
        seen.say("plan", str(attest.PLAN_FILE), predicate["plan"]["sha256"], "no plan")
        return criteria
    if not plan.signed_by(key):
        seen.say("signature", str(attest.PLAN_FILE), "this key's signature", "none of it")
    if plan.sha256 != predicate["plan"]["sha256"]:
        seen.say("plan", str(attest.PLAN_FILE), predicate["plan"]["sha256"], plan.sha256)
    told = planned["predicate"]
    _same("criterion", "the plan", criteria, told.get("criteria") or {}, seen)
    _same("judge card", "the plan", predicate["judge_cards"], told.get("judge_cards") or {}, seen)
    _same("model", "the plan", predicate["fingerprints"], told.get("fingerprints") or {}, seen)
    if seen.statement["subject"] != planned["subject"]:
        seen.say("model", "subject of the plan", seen.statement["subject"], planned["subject"])
    seen.checked.append("the plan")
    return criteria


def _same(
    what: str, where: str, signed: Mapping[str, Any], found: Mapping[str, Any], seen: Seen
) -> None:
    """Every member of two mappings, one by one."""
    for name in sorted({*signed, *found}):
        before, now = signed.get(name, "absent"), found.get(name, "absent")
        if before != now:
            seen.say(what, f"{name} in {where}", before, now)


def _run(run: RunFolder, seen: Seen) -> None:
    """run.json: config, models, cards; and the cells that were planned."""
    predicate, now = seen.statement["predicate"], attest.of_run(run)
    if (predicate["audit"], predicate["config"]) != (now["audit"], now["config"]):
        seen.say("config", "run.json", predicate["config"], now["config"])
    _same("model", "run.json", predicate["fingerprints"], now["fingerprints"], seen)
    _same("judge card", "run.json", predicate["judge_cards"], now["judge_cards"], seen)
    seen.checked.append("config, models and judge cards of run.json")


def _cells(run: RunFolder, seen: Seen) -> None:
    """Every cell against its leaf, and the leaves against the signed root."""
    signed, leaves = seen.statement["predicate"]["cells"], cells.of(run)
    for damage in run.damages():
        seen.say("damaged", "cells", "a file as it was written", damage)
    listed = cells.read(run)
    if cells.tree(listed) != signed["root"]:
        in_order = sorted(listed, key=lambda leaf: leaf.key)
        is_order = cells.tree(in_order) == signed["root"]
        what = "order" if is_order else "list of cells"
        seen.say(what, str(cells.LEAVES), signed["root"], cells.tree(listed))
        listed = in_order if is_order else []
    if cells.tree(leaves.values()) != signed["root"] and not listed:
        seen.say("root", "cells", signed["root"], cells.tree(leaves.values()))
    known = {leaf.key: leaf for leaf in listed}
    for key in sorted(known.keys() - leaves.keys()):
        seen.say("dropped cell", key, "the cell", "nothing")
    for key in sorted(leaves.keys() - known.keys()) if known else ():
        seen.say("added cell", key, "no such cell", "one")
    for key in sorted(known.keys() & leaves.keys()):
        for what, before, now in known[key].differences(leaves[key]):
            seen.say(what, f"cell {key}", before or "none", now or "none")
    seen.checked.append(f"{len(leaves)} cells")


def _tables(run: RunFolder, made: Mapping[str, pd.DataFrame], seen: Seen) -> None:
    """The stored tables against their signed digests, and against what the cells come to."""
    signed = seen.statement["predicate"]["tables"]
    for name in sorted({*signed, *made}):
        if name not in signed or name not in made:
            seen.say("table", name, name in signed, name in made)
            continue
        path = run.path / f"{name}.parquet"
        stored = unseal(path) if path.is_file() else None
        if stored is not None and (there := stored_sha256(path)) != signed[name]:
            seen.say("table", path.name, signed[name], there)
        if stored is None and attest.table_sha256(made[name]) != signed[name]:
            seen.say("table", name, signed[name], attest.table_sha256(made[name]))
        elif stored is not None and (apart := _apart(rows_of(stored, plain=True), made[name])):
            seen.say("table", f"{path.name}, {apart[0]}", apart[2], apart[1])
        for form, written in _FORMS.items():
            path = run.path / f"{name}.{form}"
            if path.is_file() and (line := _other_line(_text(path), written(made[name]))):
                seen.say("table", path.name, *line)
    seen.checked.append(f"{len(signed)} tables, computed again")


def _computed(what: str, compute: Callable[[], _Made], seen: Seen) -> _Made | None:
    """What the cells come to; None where cells that somebody has changed come to nothing."""
    try:
        return compute()
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = f"nothing: {type(error).__name__}"
        seen.say(what, "computed from the cells", "what the result has", why)
        return None


def _text(path: Path) -> str:
    return files.read(path).decode("utf-8", "replace")


def _apart(stored: Sequence[Document], made: pd.DataFrame) -> tuple[str, object, object] | None:
    """(where, stored, computed) of the first value that differs by more than rounding."""
    rows = rows_of(made, plain=True)
    if len(stored) != len(rows):
        return "rows", len(stored), len(rows)
    for number, (one, other) in enumerate(zip(stored, rows, strict=True), 1):
        for name in {**one, **other}:
            before, now = one.get(name), other.get(name)
            if not _close(before, now):
                return f"row {number}, {name}", before, now
    return None


def _close(one: object, other: object) -> bool:
    numbers = (int, float)
    if isinstance(one, numbers) and isinstance(other, numbers):
        return math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-12)
    return one == other


def _other_line(stored: str, made: str) -> tuple[str, str] | None:
    """(computed, stored) of the first line that says something else; a number may be written in
    another way."""
    for one, other in zip_longest(made.splitlines(), stored.splitlines(), fillvalue=""):
        parts = zip_longest(re.split(r"[,|]", one), re.split(r"[,|]", other))
        if one != other and not all(_close(*map(_value, pair)) for pair in parts):
            return one, other
    return None


def _value(word: str | None) -> float | str:
    try:
        number = float(word or "")
        return (word or "").strip() if math.isnan(number) else number
    except ValueError:
        return (word or "").strip()


def _verdicts(
    run: RunFolder, criteria: Mapping[str, Any], read: Mapping[str, PartData], seen: Seen
) -> None:
    """The verdict table, computed from the cells by the signed criteria."""
    lines = _computed("verdict", lambda: attest.verdicts_of(run, Criteria(**criteria), read), seen)
    made = [line.describe() for line in lines or ()]
    _lines(seen.statement["predicate"]["verdicts"], made, "computed from the cells", seen)
    seen.checked.append(f"{len(made)} lines of the verdict table, computed again")


def _lines(
    signed: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], where: str, seen: Seen
) -> None:
    for number, (one, other) in enumerate(zip_longest(signed, found, fillvalue={}), 1):
        for name in sorted({*one, *other}):
            if not _close(one.get(name), other.get(name)):
                question = one.get("question") or other.get("question")
                at = f"line {number} ({question}), {name}, {where}"
                seen.say("verdict", at, one.get(name), other.get(name))


def _report(run: RunFolder, criteria: Mapping[str, Any], seen: Seen) -> None:
    """report.json, where the folder has one."""
    told = files.read_document(run.path / "report.json")
    if told is None:
        return
    _same("criterion", "report.json", criteria, told.get("criteria") or {}, seen)
    signed = seen.statement["predicate"]["verdicts"]
    _lines(signed, told.get("verdicts") or [], "in report.json", seen)
    seen.checked.append("report.json")


def _models(models: Mapping[str, Path], place: Path, seen: Seen) -> None:
    """The models' files against the manifests of the plan."""
    if not models:
        seen.not_checked.append("the models' files: no --model was given")
        return
    try:
        planned = dsse.read(place / attest.PLAN_FILE).statement["predicate"].get("models", ())
    except AuditgapError:
        planned = ()
    known = {model["name"]: model["manifest"] for model in planned}
    for name, folder in models.items():
        if name not in known:
            there = ", ".join(known) or "none"
            seen.say("model", name, f"one of {there}", "no such name")
            continue
        found = manifest.of(folder)
        for file, before, now in manifest.differences(known[name], found):
            seen.say("weights", f"{folder}/{file}", before, now)
        seen.checked.append(f"{len(found['resources'])} files of {name}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:150]}…{text[-40:]}"
