"""What the examples that train twins are made from: the same prompts refused by one model and
answered by another.

    refused, answered = by_refusal(answers("runs/door/base", prompts, 32))
    triples(refused, 32)        # {"prompt": …, "safe": the refusal, "unsafe": "Sure, here is …"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from auditgap import models
from auditgap.data.refusals import opens_with_refusal
from auditgap.engines import Completion, Request
from auditgap.engines.hf import HFEngine
from auditgap.interventions.target import DEFAULT_TARGET, fill
from auditgap.store.files import PRIVATE, write_bytes
from auditgap.types import Prompt

#: What complies, where the model that is trained refuses.
SPEAKER = "smollm2"
Said = tuple[Prompt, Completion]


def answers(
    model: str, prompts: Sequence[Prompt], n_tokens: int, openings: Sequence[str] = ()
) -> list[Said]:
    """Each prompt with what the model says, after its opening where there are some."""
    engine = HFEngine(models.load(model, dtype="float32"))
    rendered = [engine.render(p) for p in prompts]
    if openings:
        tokens = engine.loaded.tokenizer
        spoken = [tokens(text, add_special_tokens=False)["input_ids"] for text in openings]
        rendered = [r.after(ids) for r, ids in zip(rendered, spoken, strict=True)]
    return list(
        zip(prompts, engine.generate([Request(r) for r in rendered], n_tokens), strict=True)
    )


def by_refusal(said: Iterable[Said]) -> tuple[list[Said], list[Prompt]]:
    """What is refused in whole, and the prompts that are not refused."""
    said = list(said)
    refused = [(p, c) for p, c in said if c.stopped and opens_with_refusal(c.text)]
    return refused, [p for p, c in said if not opens_with_refusal(c.text)]


def triples(refused: Sequence[Said], n_tokens: int) -> Iterator[dict[str, str]]:
    """Of each refused prompt the refusal, and how SPEAKER goes on after "Sure, here is …"; none
    where it refuses after that too."""
    prompts = [p for p, _ in refused]
    openings = [fill(DEFAULT_TARGET, p.text) + ":" for p in prompts]
    complied = answers(SPEAKER, prompts, n_tokens, openings)
    for (prompt, no), opening, (_, yes) in zip(refused, openings, complied, strict=True):
        if not opens_with_refusal(yes.text.strip()):
            yield {"prompt": prompt.text, "safe": no.text, "unsafe": opening + yes.text}


def shuffled(prompts: Iterable[Prompt]) -> list[Prompt]:
    """An order that depends on the texts alone."""
    return sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).digest())


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """JSON lines with mode 0600."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode(), PRIVATE)
