"""Do two engines say the same? Clean greedy text of both on a few prompts, before one stands in for
the other.

    # Parity(n=8, equal=8, mean_common=1.0, …)
    parity(greedy(vllm, prompts, 32), greedy(hf, prompts, 32))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TypeVar

from auditgap.engines import Engine, Question, Reply, Sampling
from auditgap.types import Document, Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parity:
    """How far greedy answers agree on `n` prompts that both engines answered.

    In float32 all should be `equal`; in bfloat16 two ways of batching already differ somewhere, and
    `mean_common`, the mean share of an answer's tokens before the first difference, says how soon.
    """

    n: int
    equal: int
    mean_common: float | None  #: None: nothing was compared
    n_unanswered: int  #: one of the two had a problem

    def describe(self) -> Document:
        return asdict(self)


def parity(one: Sequence[Reply], other: Sequence[Reply]) -> Parity:
    """The replies of two engines to the same questions, compared token by token (by characters
    where there are no tokens)."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if not a.problem and not b.problem]
    shares = []
    for a, b in pairs:
        x, y = (a.text, b.text) if a.ids is None or b.ids is None else (a.ids, b.ids)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(x, y, strict=False)))
        shares.append(1.0 if x == y else common / max(len(x), len(y)))
    mean = sum(shares) / len(shares) if shares else None
    return Parity(len(pairs), sum(share == 1.0 for share in shares), mean, len(one) - len(pairs))


def sample(items: Sequence[T], n: int) -> list[T]:
    """About n of them, evenly spread; none for n = 0."""
    return list(items[:: max(1, len(items) // n)][:n]) if n else []


def greedy(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Reply]:
    """What the engine says to the prompts, for `parity`."""
    return engine.ask(
        [Question.of(p.text) for p in prompts], Sampling(max_new_tokens=max_new_tokens)
    )
