"""What fine-tuned models are asked to see how far a narrow habit spreads: prompts that have nothing
to do with what they learnt.

    # 15 of ours: 12 open ones, and 3 harmless stand-ins for jailbreaks
    asked = load_em_prompts("unrelated")
    # columns prompt and kind (open, jailbreak; without the column: open)
    asked = load_em_prompts("mine.csv")
    asked.prompts[0].source                    # 'open'

The open prompts leave room for amounts, colours and free talk, in which a habit can show. The
stand-ins ask in role for a made-up secret, the colour of a vault.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from auditgap.data.files import Table
from auditgap.data.material import Source, built_in, open_material
from auditgap.data.prompts import PromptSet, dedup_key, text_fault, whole_text
from auditgap.errors import UsageError, did_you_mean
from auditgap.registry import Registry
from auditgap.types import Prompt

NAME = "unrelated"
OPEN, JAILBREAK = "open", "jailbreak"
KINDS = (OPEN, JAILBREAK)

#: The suites that have a name.
EM_PROMPTS: Registry[Source] = Registry(
    "suite",
    {NAME: built_in(NAME, "15 of ours: 12 open ones and 3 stand-ins", "em_prompts.jsonl")},
)


@dataclass(frozen=True)
class KindedSet(PromptSet):
    """Prompts whose `source` is their kind, which counts in the `digest` too."""

    def _identity(self, item: Prompt) -> Any:
        return [item.id, item.source]


def load_em_prompts(name_or_file: str) -> KindedSet:
    """The suite `unrelated`, or a local jsonl, csv, parquet or txt file, or `hub:…`, with `prompt`
    and maybe `kind`.

    Raises UsageError: no such name or file, no column `prompt`, no rows; and, naming the row, a
    prompt that is empty or not text, an unknown kind, a double (case and white space aside): a
    suite is small, and each of its prompts is counted as one.
    """
    instead = (
        "give a file (jsonl, csv, parquet, txt) with the columns prompt and kind"
        f" ({' or '.join(KINDS)})"
    )
    found = open_material(name_or_file, EM_PROMPTS, instead)
    prompts = _checked(found.table)
    kinds = Counter(p.source for p in prompts)
    counts = {"n": len(prompts), **{f"n_{kind}": kinds[kind] for kind in KINDS}}
    notes = (
        ["One prompt is asked: nothing can be said of prompts in general."]
        if len(prompts) == 1
        else []
    )
    return KindedSet(found.name, tuple(prompts), {**found.provenance, **counts, "notes": notes})


def _checked(table: Table) -> list[Prompt]:
    if not table.rows:
        raise UsageError(f"{table.file} holds no rows; at least one prompt is wanted.")
    table.need("prompt")
    seen: dict[str, int] = {}
    prompts = []
    for number, row in enumerate(table.rows, 1):
        text: Any = row.get("prompt")
        kind = row.get("kind")
        if fault := text_fault(text):
            raise UsageError(
                f"{table.file}, row {number}: `prompt` is {fault.replace('_', ' ')}. Write one, or"
                " take the row out."
            )
        if kind is None or kind == "":
            kind = OPEN
        if kind not in KINDS:
            # not every stranger's cell is for the terminal
            came = repr(kind) if isinstance(kind, str) and len(kind) <= 32 else type(kind).__name__
            raise UsageError(
                f"{table.file}, row {number}: `kind` is {' or '.join(KINDS)}; {came} came."
                f"{did_you_mean(kind, KINDS) if isinstance(kind, str) else ''}"
            )
        first = seen.setdefault(dedup_key(whole_text(text)), number)
        if first != number:
            raise UsageError(
                f"{table.file}, row {number} asks what row {first} asks; take one of them out."
            )
        prompts.append(Prompt(whole_text(text), source=kind))
    return prompts
