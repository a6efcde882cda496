"""What a model is trained on, row by row, and in which order: pure functions, so that resuming
needs no stored state.

    # y+ as the response to learn, y- kept beside it
    rows = rows_from_triples(load_triples("demo"))
    talks = encode(rows, loaded.chat, max_tokens=512)
    batch = collate([talks[i] for i in global_batch(step=7, n=len(rows), batch=16, seed=0)], pad_id=0)

A harmful row (b = 1) carries the *safe* response y+ to learn and the unsafe y- beside it; a benign
row (b = 0) the base's own answer (arXiv 2606.08044, section 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from auditgap.data import read_table, whole_text
from auditgap.data.row_forms import form_of, mapped
from auditgap.errors import UsageError
from auditgap.models import Chat, Conversation
from auditgap.types import ContrastTriple, Prompt, digest


@dataclass(frozen=True, slots=True)
class TrainRow:
    """A prompt and the response to learn. `harmful`: b of the objective; `unsafe`: y- where the row
    has one.

    Not `ended`: the response broke off at a limit on new tokens, so that no end of turn is learnt
    behind it.
    """

    prompt: Prompt
    response: str
    harmful: bool = False
    unsafe: str | None = None
    ended: bool = True

    @property
    def id(self) -> str:
        """A hash of all five, so that a row can be named without showing it."""
        return digest([self.prompt.id, self.response, self.harmful, self.unsafe, self.ended], 16)


_TRUTH = {"true": True, "false": False}  # a csv file has words


def rows_from_triples(triples: Iterable[ContrastTriple]) -> list[TrainRow]:
    """Harmful rows: y+ is what is learnt, y- what a monitor or a margin compares it with."""
    return [TrainRow(t.prompt, t.safe, harmful=True, unsafe=t.unsafe) for t in triples]


def rows_from_file(path: Path | str) -> list[TrainRow]:
    """Plain rows out of a jsonl, csv or parquet file in any of `row_forms.FORMS`, with a column map
    behind its name where one is needed, in the file's order. A column `ended`, where there is one, says of a response that it broke off
    (false), so that no end of turn is learnt behind it.

    Raises UsageError: no file, no such column, no rows, a cell that is empty or not text, an
    `ended` that is neither true nor false (with the file and the row).
    """
    source, columns = mapped(str(path))
    path = Path(source).expanduser()
    table = read_table(path)
    if not table.rows:
        raise UsageError(
            f"{table.file} holds no rows; at least one with `prompt` and `response` is wanted."
        )
    reader = form_of(table, columns)
    rows = []
    for number, row in enumerate(table.rows, 1):
        found = reader.read(row)
        if isinstance(found, str):
            raise UsageError(
                f"{table.file}, row {number}: {found}. Mend it, or take the row out; a row is"
                f" {reader.form.example}"
            )
        ended = row.get("ended")
        ended = True if ended is None else _TRUTH.get(str(ended).lower())
        if ended is None:
            raise UsageError(f"{table.file}, row {number}: `ended` must be true or false.")
        words, system = whole_text(found.prompt), whole_text(found.system)
        prompt = Prompt(words, source=path.stem, system=system)
        rows.append(TrainRow(prompt, whole_text(found.response), ended=ended))
    return rows


def encode(rows: Sequence[TrainRow], chat: Chat, max_tokens: int = 512) -> list[Conversation]:
    """Every row's prompt and response as tokens, in order. Raises UsageError naming the row and its
    place in the list."""
    talks = []
    for number, row in enumerate(rows, 1):
        try:
            talks.append(
                chat.converse(row.prompt, row.response, max_tokens=max_tokens, ended=row.ended)
            )
        except UsageError as error:
            raise UsageError(f"Training row {number} of {len(rows)} ({row.id}): {error}") from None
    return talks


def collate(conversations: Sequence[Conversation], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right: `input_ids` [B, T] and `attention_mask` [B, T] long,
    `response_mask` [B, T] bool.

    `response_mask` marks the tokens to predict, `ids[n_prompt:]`: the loss at position t - 1 is for
    the token at t. Raises UsageError when there is no conversation.
    """
    if not conversations:
        raise UsageError("A batch of no conversations was asked for; at least one row is wanted.")
    n, longest = len(conversations), max(len(c.ids) for c in conversations)
    ids = torch.full((n, longest), pad_id, dtype=torch.long)
    attention = torch.zeros((n, longest), dtype=torch.long)
    response = torch.zeros((n, longest), dtype=torch.bool)
    for b, talk in enumerate(conversations):
        ids[b, : len(talk.ids)] = torch.tensor(talk.ids, dtype=torch.long)
        attention[b, : len(talk.ids)] = 1
        response[b, talk.n_prompt : len(talk.ids)] = True
    return {"input_ids": ids, "attention_mask": attention, "response_mask": response}


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The rows 0..n-1 in the order of that epoch."""
    # By hash and not by a random generator: those may change their stream from one version to the
    # next.
    return tuple(
        sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}:{epoch}:{i}".encode()).digest())
    )


def global_batch(step: int, n: int, batch: int, seed: int) -> list[int]:
    """The rows of optimizer step `step` (0-based): `batch` indices below n, over all ranks and
    accumulation together.

    Epochs follow each other without a seam: the last batch of one is filled up from the next one's
    order, so that every row is seen once an epoch and every batch is whole. Raises UsageError when
    n, batch or step cannot be.
    """
    if n < 1 or batch < 1 or step < 0:
        raise UsageError(
            f"A step needs rows and a batch of at least 1; step {step}, {n} rows and a batch of"
            f" {batch} came."
        )
    return [
        _order(n, seed, position // n)[position % n]
        for position in range(step * batch, (step + 1) * batch)
    ]
