"""Which families can be audited: the answers as they were proven, with the versions that they hold
for.

    stored().proofs[0].row()      # {"type": "afmoe", "opened as": "causal LM", "answer": …}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from auditgap.types import Document

FILE = Path(__file__).with_name("families.json")
Answer = Literal["proven", "proven without the short way", "refused", "wrong"]
_LIBRARIES = ("transformers", "torch")

_PAGE = """# Model families

*Written by `make families`; `auditgap ls families` shows it in a terminal.*

Every causal and image-text-to-text model type of transformers {transformers} (torch {torch}) was
built as one tiny random model with four blocks in the family's own mixture, and audited beside an
unpatched copy: self-test at the embedding, the first, the middle and the last block; NLL of answers
under edits in a padded batch with a shared trunk and cache; clean logits alone and padded; rows that
end early; the attack's gradient against finite differences.

- **proven**: every short cut of the engine gives what the whole model gives.
- **proven without the short way**: the numbers are the same, and some forwards run more than they
  would have to: the last column says which.
- **refused**: an audit stops before anything is measured, with this cause.

The same self-test runs at the start of every audit, on the weights that are audited.

{counts}

| type | opened as | answer | what it needs, or why it is refused |
|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Proof:
    """One family's answer."""

    type: str
    wrapper: bool  #: opened as an image-text-to-text model, with text alone
    answer: Answer
    ways: tuple[str, ...] = ()  #: what it needs instead of a short cut
    streams: bool = False  #: several residual streams, edited as one of their joint width
    why: str = ""  #: of a refusal

    def row(self) -> Document:
        """For a table."""
        notes = [*self.ways, *(["several streams as one"] if self.streams else []), self.why]
        return {
            "type": self.type,
            "opened as": "image-text-to-text" if self.wrapper else "causal LM",
            "answer": self.answer,
            "note": "; ".join(note for note in notes if note),
        }


@dataclass(frozen=True)
class Table:
    """All proofs, and what they were proven with."""

    versions: dict[str, str]
    proofs: tuple[Proof, ...]

    def counts(self, *, wrapper: bool) -> dict[str, int]:
        """How many types got which answer."""
        return dict(Counter(p.answer for p in self.proofs if p.wrapper is wrapper))

    def page(self) -> str:
        """As a page of the documentation."""
        counts = [
            f"{what}: "
            + ", ".join(f"{n} {answer}" for answer, n in sorted(self.counts(wrapper=w).items()))
            + "."
            for what, w in (("Causal types", False), ("Image-text-to-text types besides", True))
        ]
        rows = ["| " + " | ".join(map(_cell, proof.row().values())) + " |" for proof in self.proofs]
        return _PAGE.format(counts="\n\n".join(counts), rows="\n".join(rows), **self.versions)


def named(versions: dict[str, str]) -> str:
    """As a sentence has them: transformers 5.19.0, torch 2.13.0."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def installed() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


def stored() -> Table:
    """The table that came with this version."""
    read = json.loads(FILE.read_text("utf-8"))
    proofs = (Proof(**{**p, "ways": tuple(p["ways"])}) for p in read["proofs"])
    return Table(read["versions"], tuple(proofs))


def store(proofs: Sequence[Proof]) -> Table:
    """Keep these proofs, of the installed versions, as the table."""
    table = Table(installed(), tuple(sorted(proofs, key=lambda p: (p.wrapper, p.type))))
    FILE.write_text(json.dumps(asdict(table), indent=1) + "\n", encoding="utf-8")
    return table


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
