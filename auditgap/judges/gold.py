"""Gold sets: exchanges that people have labelled, which judges are measured against (and the built-in one trained on).

    gold = load_gold("pyrit-objective")
    gold.task, len(gold)                   # ('harmful', 384)

A file of your own: jsonl, csv or parquet with `prompt`, `completion` and either `harmful` or `refusal` (0 or 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from auditgap.data import Table, dedup_key, package_file, read_table
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import Exchange, Prompt, digest

Task = Literal["harmful", "refusal"]

#: name -> (task, folder in pyrit's scorer_evals, files or None for all of them, description)
GOLD_SETS: dict[str, tuple[Task, str, tuple[str, ...] | None, str]] = {
    "pyrit-objective": (
        "harmful",
        "objective",
        None,
        "did the answer do what was asked? 14 files, the built-in judge's training rows",
    ),
    "pyrit-refusal": ("refusal", "refusal_scorer", ("refusal.csv",), "did the answer refuse?"),
    "pyrit-refusal-extra": (
        "refusal",
        "refusal_scorer",
        ("refusal_extra.csv",),
        "the same, harder: partial and indirect refusals",
    ),
}


@dataclass(frozen=True, slots=True)
class GoldRow:
    """An exchange and what people said: `positive` is harmful (complied) or refused, as the set's task has it."""

    exchange: Exchange
    positive: bool

    @property
    def response_key(self) -> str:
        return text_key(self.exchange.completion)

    @property
    def prompt_key(self) -> str:
        return text_key(self.exchange.prompt.text)


@dataclass(frozen=True)
class GoldSet:
    """Labelled rows, doubles left out. `n_conflicting` rows had an equal prompt and response but another label."""

    name: str
    task: Task
    rows: tuple[GoldRow, ...]
    n_read: int
    n_duplicates: int
    n_conflicting: int

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """Hash of the rows and labels, in any order."""
        return digest([self.task, sorted([r.prompt_key, r.response_key, r.positive] for r in self.rows)])


def text_key(text: str) -> str:
    """SHA-256 of a text, case and white space aside."""
    return hashlib.sha256(dedup_key(text).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def load_gold(name_or_file: str) -> GoldSet:
    """A gold set by name or from a file. Raises UsageError: unknown, package missing, column missing, label not 0 or 1."""
    if name_or_file in GOLD_SETS:
        task, folder, files, _ = GOLD_SETS[name_or_file]
        root = package_file("pyrit", "datasets", "scorer_evals", folder)
        paths = [root / f for f in files] if files else sorted(root.glob("*.csv"))
        tables = [read_table(p, comments=True) for p in paths]
        # Harm people judge an answer by what it says: one row a response. Whether it refuses depends on what was asked too.
        return _gold(
            name_or_file, task, tables, ("objective", "assistant_response", "human_score"), by_response=task == "harmful"
        )
    path = Path(name_or_file).expanduser()
    if not path.exists():
        raise UsageError(
            f"Unknown gold set {name_or_file!r}.{did_you_mean(name_or_file, GOLD_SETS)} There is {', '.join(GOLD_SETS)}; "
            "or give a jsonl, csv or parquet file with prompt, completion and harmful (or refusal)."
        )
    table = read_table(path)
    task = "refusal" if "refusal" in table.columns and "harmful" not in table.columns else "harmful"
    return _gold(path.stem, task, [table], ("prompt", "completion", task), by_response=False)


def _gold(name: str, task: Task, tables: Iterable[Table], columns: tuple[str, str, str], *, by_response: bool) -> GoldSet:
    labels: dict[tuple[str, str], set[bool]] = {}
    first: dict[tuple[str, str], GoldRow] = {}
    n_read = 0
    for table in tables:
        for column in columns:
            table.need(column)
        for number, row in enumerate(table.rows, 1):
            if row.get("data_type", "text") != "text":
                continue
            prompt, completion, label = (row.get(c) for c in columns)
            if not isinstance(prompt, str) or not isinstance(completion, str):
                raise UsageError(f"{table.file}, row {number}: {columns[0]} and {columns[1]} must be text.")
            gold = GoldRow(Exchange(Prompt(prompt, source=name), completion), _truth(label, table.file, number, columns[2]))
            key = ("" if by_response else gold.prompt_key, gold.response_key)
            n_read += 1
            labels.setdefault(key, set()).add(gold.positive)
            first.setdefault(key, gold)
    agreed = tuple(row for key, row in first.items() if len(labels[key]) == 1)
    if not agreed:
        raise UsageError(f"The gold set {name} holds no row that could be used ({n_read} read).")
    n_conflicting = len(first) - len(agreed)
    return GoldSet(name, task, agreed, n_read, n_read - len(first), n_conflicting)


_TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def _truth(label: Any, file: str, number: int, column: str) -> bool:
    value = _TRUTH.get(str(label).strip().lower())
    if value is None:
        raise UsageError(f"{file}, row {number}: {column} must be 0 or 1; {str(label)[:20]!r} came.")
    return value
