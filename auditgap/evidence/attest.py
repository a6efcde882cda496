"""What is signed of an audit: before it the plan, after it what was found.

    plan = planned(LATENT, plan, options, Criteria(safe=0.95))      # a Statement, to be signed
    statement = found(store, cells.of(store), signed_plan)          # of a finished run

Both are in-toto Statements whose subjects are the models, named by the digest of their OpenSSF
manifest. A plan binds config, cells, judge cards and criteria; what was found binds the plan, every
cell (by the root of a Merkle tree), every table and every line of the verdict table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import auditgap
from auditgap.audits import pages
from auditgap.audits.table import audit_of
from auditgap.errors import UsageError
from auditgap.evidence import cells, dsse, manifest
from auditgap.report.correction import cards_in
from auditgap.report.gather import PartData
from auditgap.report.verdict_lines import Criteria, Line
from auditgap.report.verdicts import verdicts
from auditgap.store import RunFolder, files
from auditgap.store.tables import content_sha256, frame_to_table
from auditgap.sweep.progress import MEASURED_HERE
from auditgap.types import Document, digest

if TYPE_CHECKING:
    from auditgap.audits import Audit
    from auditgap.models import Outline

PLAN = "urn:auditgap:audit-plan:v1"
RESULT = "urn:auditgap:audit-result:v1"
#: Below a run's folder.
PLAN_FILE, RESULT_FILE = Path("evidence/plan.dsse.json"), Path("evidence/result.dsse.json")


def planned(audit: Audit[Any, Any, Any], plan: Any, options: Any, criteria: Criteria) -> Document:
    """The Statement of a plan, with every file of its models hashed."""
    question = _plain(audit.question(plan))
    cards = _plain(audit.facts(plan, options).get("judge_cards", []))
    predicate = {
        "auditgap": auditgap.__version__,
        **asked(question, cards),
        "settings": question,
        "cells": sorted(cell.key for cell in plan.cells),
        # an audit of several phases finds its next cells in what the last ones found
        "all_cells": len(audit.phases(plan)) == 1,
        "estimate": {
            k: v for k, v in audit.estimate(plan, options).items() if k not in MEASURED_HERE
        },
        "criteria": criteria.model_dump(),
        "models": [model_of(outline) for outline in plan.outlines],
    }
    return dsse.statement(subjects(predicate["models"], question), PLAN, predicate)


def asked(question: Mapping[str, Any], cards: Iterable[Mapping[str, Any]]) -> Document:
    """What a run is of, in digests: its config, its models' fingerprints, its judges' cards."""
    return {
        "audit": question.get("audit"),
        "config": digest(question, 64),
        "fingerprints": _fingerprints(question),
        "judge_cards": {_card_name(card): digest(card, 64) for card in cards},
    }


def _plain(value: Any) -> Any:
    """As a run's JSON gives it back."""
    return json.loads(files.to_json(value))


def _fingerprints(question: Mapping[str, Any]) -> Document:
    """Of a run's models, by name."""
    told = question.get("subject_fingerprints") or question.get("subjects")
    return dict(told) if isinstance(told, dict) else {}


def _card_name(card: Mapping[str, Any]) -> str:
    """Of one card among a run's: its judge and what that was measured on."""
    return " on ".join(str(card[k]) for k in ("name", "gold_set") if card.get(k))


def model_of(outline: Outline) -> Document:
    """A model as it lies on this disk; of an adapter its own files, as its fingerprint counts its
    base."""
    return {
        "name": outline.subject.name,
        "fingerprint": outline.subject.fingerprint,
        "manifest": {"predicateType": manifest.TYPE, **manifest.of(outline.folder)},
    }


def subjects(models: Sequence[Mapping[str, Any]], question: Mapping[str, Any]) -> list[Document]:
    """The subjects of a Statement: each model by the digest of its manifest; one that answered from
    elsewhere by the fingerprint of what is known of it."""
    known = {model["name"]: {"sha256": manifest.root(model["manifest"])} for model in models}
    for name, fingerprint in _fingerprints(question).items():
        known.setdefault(name, {"auditgapFingerprint": str(fingerprint)})
    return [{"name": name, "digest": found} for name, found in known.items()]


def found(
    store: RunFolder,
    leaves: Mapping[str, cells.Leaf],
    plan: dsse.Envelope | None,
    criteria: Criteria | None = None,
) -> Document:
    """The Statement of a finished run with these cells; `criteria`: where no plan says them.

    Raises UsageError: the run is not whole, is of an earlier release, or is not the plan's.
    """
    if store.unchecked:
        raise UsageError(f"{store.unchecked} It cannot be attested.")
    status = store.status()
    if status.finished < status.planned or status.corrupt or not status.planned:
        raise UsageError(
            f"{store.place} is not whole: {status.finished} of {status.planned} cells are done, and"
            f" {status.corrupt} files are damaged. Run the command that made it again."
        )
    signed = {} if plan is None else plan.statement["predicate"]
    what = of_run(store)
    if plan is not None and (other := [k for k in what if signed.get(k) != what[k]]):
        raise UsageError(
            f"{store.place} is not the run that was planned: {', '.join(other)} differ. Give the"
            " plan that was signed before this run."
        )
    lines = Criteria(**signed["criteria"]) if plan is not None else criteria or Criteria()
    made, read = reading_of(store)
    predicate = {
        "auditgap": auditgap.__version__,
        **what,
        "plan": None if plan is None else {"sha256": plan.sha256},
        "criteria": lines.model_dump(),
        "cells": {"n": len(leaves), "planned": status.planned, "root": cells.tree(leaves.values())},
        "tables": {name: table_sha256(frame) for name, frame in made.items()},
        "verdicts": [line.describe() for line in verdicts_of(store, lines, read)],
    }
    told = plan.statement["subject"] if plan is not None else subjects((), store.run["config"])
    return dsse.statement(told, RESULT, predicate)


def of_run(store: RunFolder) -> Document:
    """What a run folder says that it is of."""
    return asked(store.run["config"], cards_in(store.run.get("info", {})))


def reading_of(store: RunFolder) -> tuple[Mapping[str, Any], dict[str, PartData]]:
    """The run's own tables, computed from its cells, and what its verdicts read of them."""
    return audit_of(store).reading(store)


def table_sha256(frame: Any) -> str:
    """The checksum of what a table says, as its file carries it."""
    return content_sha256(frame_to_table(frame))


def verdicts_of(store: RunFolder, criteria: Criteria, read: Mapping[str, PartData]) -> list[Line]:
    """The verdict table, computed from the cells; `read`: as `reading_of` gives it."""
    return verdicts(pages.from_store([store], read=read), pages.by_table(), criteria)
