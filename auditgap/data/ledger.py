"""The leakage ledger: which prompt was used for what, so that nothing is measured on what it was
fitted to.

    ledger = LeakageLedger()
    ledger.use("sft", train_prompts)
    ledger.use("evaluation", test_prompts)
    # UsageError: "3 prompts of evaluation were also used for sft. …"
    ledger.check()

Prompts are known by a hash of their folded text, so that doubles in another case or spacing are
found; the file on disk holds hashes only, never text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from auditgap.data.prompts import dedup_key
from auditgap.errors import UsageError, did_you_mean
from auditgap.store import files
from auditgap.types import Document, Prompt

#: What something is fitted to or chosen by, and what something is measured on. The same prompt in
#: both is leakage.
FITTED = ("probe-train", "direction", "selection", "sft", "anchor")
MEASURED = ("evaluation", "pgd")
ROLES = (*FITTED, *MEASURED)
#: Largest ledger that is read: some millions of prompts.
_MAX_BYTES = 500_000_000
_SCHEMA = 1


def prompt_hash(text: str) -> str:
    """24 hex digits of the SHA-256 of the folded text (`dedup_key`)."""
    return hashlib.sha256(dedup_key(text).encode("utf-8", "surrogatepass")).hexdigest()[:24]


class LeakageLedger:
    """Prompt hash -> the roles that it had; and the overlaps that were allowed, pair -> count."""

    def __init__(self) -> None:
        self.roles: dict[str, set[str]] = {}
        self.allowed: dict[str, int] = {}

    def use(self, role: str, prompts: Iterable[Prompt]) -> None:
        """Note that these prompts had that role. Raises UsageError for a role that is not one of
        ROLES."""
        if role not in ROLES:
            raise UsageError(
                f"There is no role {role!r} in the leakage ledger.{did_you_mean(role, ROLES)}"
                f" Roles: {', '.join(ROLES)}."
            )
        for prompt in prompts:
            self.roles.setdefault(prompt_hash(prompt.text), set()).add(role)

    def count(self, role: str) -> int:
        """Different prompts that had this role."""
        return sum(role in had for had in self.roles.values())

    def overlaps(self) -> dict[str, int]:
        """Forbidden pairs that occur, `"evaluation & sft"` -> the number of prompts, in the order
        of the tables above."""
        counts = {
            f"{m} & {f}": sum(m in had and f in had for had in self.roles.values())
            for m in MEASURED
            for f in FITTED
        }
        return {pair: n for pair, n in counts.items() if n}

    def check(self, *, allow_overlap: bool = False) -> dict[str, int]:
        """The overlaps found: {} when there is none, else only with `allow_overlap`, which records
        them in the ledger.

        Raises UsageError with the count of every forbidden pair.
        """
        found = self.overlaps()
        if found and not allow_overlap:
            told = "; ".join(
                f"{n} of {self.count(measured)} {measured} prompts were also used for {fitted}"
                for pair, n in found.items()
                for measured, fitted in [pair.split(" & ")]
            )
            raise UsageError(
                f"Leakage (case and white space aside): {told}. Take them out of one side, or set"
                " allow_overlap: true to go on and have it recorded."
            )
        self.allowed.update(found)
        return found

    def merge(self, other: LeakageLedger) -> None:
        """Take over what another ledger knows: an audit reads the ledger of the training that made
        its subject."""
        for key, had in other.roles.items():
            self.roles.setdefault(key, set()).update(had)
        self.allowed.update(other.allowed)

    def to_json(self) -> Document:
        return {
            "schema": _SCHEMA,
            "allowed_overlap": dict(sorted(self.allowed.items())),
            "prompts": {key: sorted(had) for key, had in sorted(self.roles.items())},
        }

    @classmethod
    def from_json(cls, value: Any, file: str = "ledger") -> LeakageLedger:
        """Raises UsageError when the value is no ledger: an unknown role would hide an overlap."""
        ledger = cls()
        try:
            if value["schema"] != _SCHEMA:
                raise ValueError
            for key, had in value["prompts"].items():
                if (
                    not re.fullmatch("[0-9a-f]{24}", key)
                    or not isinstance(had, list)
                    or not set(had) <= set(ROLES)
                ):
                    raise ValueError
                ledger.roles[key] = set(had)
            ledger.allowed = {str(pair): int(n) for pair, n in value["allowed_overlap"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(
                f"{file} is no leakage ledger of this version (schema {_SCHEMA}). Run again what"
                " wrote it, or take it away."
            ) from None
        return ledger

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all. Raises DiskError."""
        files.write_document(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path) -> LeakageLedger:
        """The ledger in a file. Raises UsageError: no file, too large, no ledger."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"There is no leakage ledger {path}.")
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(
                f"{path} is larger than {_MAX_BYTES:,} bytes; that is no leakage ledger."
            )
        advice = "It is no leakage ledger any more: restore it, or run what wrote it again."
        value = files.unseal(path, required=False, advice=advice)
        return cls.from_json(value, path.name)
