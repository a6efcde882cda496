"""New tokens in two: the chain of thought, and the answer that is judged.

    said(tokenizer, ids).text       # the answer, without its chain

A chain and an answer may each have a budget of tokens. Greedy decoding writes the same whatever is
cut later, so completions are generated to the sum of both and cut here: the same on every engine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from auditgap.models.chains import MARKS, Marks, Start, split


@dataclass(frozen=True, slots=True)
class Said:
    """A completion in two: `text` is the answer, `chain` what came before it, in the first
    `n_chain` of the `ids`. Not `finished`: the chain never ended, and there is no answer."""

    text: str
    ids: tuple[int, ...]
    chain: str = ""
    n_chain: int = 0
    finished: bool = True


def said(
    tokenizer: Any,
    ids: Sequence[int],
    start: Start = None,
    marks: Sequence[Marks] = MARKS,
    most: tuple[int, int] = (0, 0),
) -> Said:
    """The tokens as chain and answer, each cut to `most` of its tokens (0: as long as it is).
    `start`: what the prompt has written of a chain (`chains.split`)."""
    ids, (most_chain, most_answer) = tuple(ids), most
    # marks are special tokens in some families
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    found = split(whole, start, marks)
    n_chain = len(ids) if found.unfinished else _n_tokens(tokenizer, ids, whole, found.start)
    if most_chain and n_chain > most_chain:
        cut = ids[:most_chain]
        chain = split(tokenizer.decode(cut, skip_special_tokens=False), start, marks).chain
        return Said("", cut, _plain(tokenizer, chain), most_chain, False)
    if most_answer and len(ids) - n_chain > most_answer:
        return said(tokenizer, ids[: n_chain + most_answer], start, marks)
    if not (found.chain or found.start or found.unfinished):
        return Said(tokenizer.decode(ids, skip_special_tokens=True), ids)
    return Said(
        _plain(tokenizer, found.answer),
        ids,
        _plain(tokenizer, found.chain),
        n_chain,
        not found.unfinished,
    )


def _n_tokens(tokenizer: Any, ids: tuple[int, ...], whole: str, start: int) -> int:
    """How many tokens spell no more than the first `start` characters."""
    if not start or start >= len(whole):
        return len(ids) if start else 0

    def length(n: int) -> int:
        return len(tokenizer.decode(ids[:n], skip_special_tokens=False))

    return bisect_right(range(1, len(ids) + 1), start, key=length)


def _plain(tokenizer: Any, text: str) -> str:
    """The text without special tokens that are spelled in it."""
    for word in tokenizer.all_special_tokens:
        text = text.replace(word, "")
    return text.strip()
