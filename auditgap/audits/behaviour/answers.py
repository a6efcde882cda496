"""What was said to prompts, as it is kept: texts, their tokens, why there is none, and where half of
the length ends.

    answers = Answers.of_replies(engine.ask(questions, sampling)).halved(128)
    Answers.of(answers.arrays()) == answers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from auditgap.audits.excerpt import WHOLE, Excerpt
from auditgap.engines import Reply
from auditgap.types import Document


@dataclass(frozen=True)
class Answers:
    """What was said to N prompts, in their order.

    `ids`: the new tokens, None where an endpoint does not tell. `problems`: why there is no answer
    (`too_long`, `nonfinite_logits`, `endpoint: …`), else empty. `nll`: mean NLL of each answer,
    nats a token; nan: not measured.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...] | None, ...]
    stopped: np.ndarray  #: [N] bool: ended of itself
    problems: tuple[str, ...]
    nll: np.ndarray  #: [N]
    chains: tuple[str, ...] = ()  #: what was thought before each answer; empty: nothing by anyone
    #: characters within half the tokens that an answer may have; None: it has no more, or its tokens
    #: are not known. Empty: nobody asked
    halves: tuple[int | None, ...] = ()

    @classmethod
    def of_replies(cls, replies: Sequence[Reply], nll: np.ndarray | None = None) -> Answers:
        """What an engine said; `nll`: None where it was not measured."""
        return cls(
            tuple(r.text for r in replies),
            tuple(r.ids for r in replies),
            np.array([r.stopped for r in replies], dtype=bool),
            tuple(r.problem for r in replies),
            np.full(len(replies), np.nan) if nll is None else nll,
            tuple(r.chain for r in replies),
        )

    def chain(self, i: int) -> str:
        """What was thought before answer number i."""
        return self.chains[i] if self.chains else ""

    def excerpt(self, i: int) -> Excerpt:
        """Which parts of answer i are judged."""
        return Excerpt(half=self.halves[i]) if self.halves else WHOLE

    def halved(self, max_new_tokens: int) -> Answers:
        """With `halves`: of a text of n tokens, the share of its characters that max_new_tokens // 2
        is of n. Where an endpoint does not tell its tokens, half of a text that was cut off."""
        halves: list[int | None] = []
        for i, (text, ids) in enumerate(zip(self.texts, self.ids, strict=True)):
            n = len(ids) if ids is not None and not self.chain(i) else None
            if n is None and not self.stopped[i]:
                n = max_new_tokens
            most = max_new_tokens // 2
            halves.append(None if n is None or n <= most else len(text) * most // n)
        return replace(self, halves=tuple(halves))

    def arrays(self) -> dict[str, np.ndarray]:
        """As plain arrays that `RunFolder.remember` can keep: flat bytes and token ids with their
        counts (−1: not known)."""
        return {
            **packed("text", self.texts),
            **packed("problem", self.problems),
            **packed("chain", [self.chain(i) for i in range(len(self.texts))]),
            "ids": np.array([i for ids in self.ids for i in ids or ()], dtype=np.int64),
            "counts": np.array(
                [-1 if ids is None else len(ids) for ids in self.ids], dtype=np.int64
            ),
            "stopped": self.stopped,
            "nll": self.nll,
            "halves": np.array([-1 if h is None else h for h in self.halves], dtype=np.int64),
        }

    def at(self, which: Sequence[int]) -> Answers:
        """Those of these positions."""
        return Answers(
            tuple(self.texts[i] for i in which),
            tuple(self.ids[i] for i in which),
            self.stopped[list(which)],
            tuple(self.problems[i] for i in which),
            self.nll[list(which)],
            tuple(self.chain(i) for i in which),
            tuple(self.excerpt(i).half for i in which),
        )

    def nll_of(self, i: int) -> float | None:
        """Of answer i; None: not measured."""
        return None if np.isnan(self.nll[i]) else float(self.nll[i])

    def record(self, i: int) -> Document:
        """What `generations/` keeps of answer i, besides its NLL."""
        ids = self.ids[i]
        return {
            "completion": self.texts[i],
            "chain": self.chain(i),
            "ids": None if ids is None else list(ids),
            "stopped": bool(self.stopped[i]),
            "problem": self.problems[i],
            "half": self.excerpt(i).half,
        }

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Answers:
        """The inverse of `arrays`."""
        counts = arrays["counts"]
        parts = _parts(arrays["ids"], counts.clip(min=0))
        ids = tuple(
            None if n < 0 else tuple(part.tolist()) for n, part in zip(counts, parts, strict=True)
        )
        return cls(
            unpacked("text", arrays),
            ids,
            arrays["stopped"],
            unpacked("problem", arrays),
            arrays["nll"],
            unpacked("chain", arrays) if "chain" in arrays else (),
            tuple(None if h < 0 else int(h) for h in arrays.get("halves", ())),
        )

    @classmethod
    def told(cls, texts: Iterable[Mapping[str, Any]]) -> Answers:
        """The answers in stored `texts` (see `Measured`)."""
        rows = list(texts)
        nll = [np.nan if row["completion_nll"] is None else row["completion_nll"] for row in rows]
        return cls(
            tuple(row["completion"] for row in rows),
            tuple(
                None if row["ids"] is None else tuple(int(i) for i in row["ids"]) for row in rows
            ),
            np.array([row["stopped"] for row in rows], dtype=bool),
            tuple(row["problem"] for row in rows),
            np.array(nll, dtype=np.float64),
            tuple(row.get("chain") or "" for row in rows),
            tuple(Excerpt.stored(row).half for row in rows),
        )


def joined(parts: Sequence[Answers]) -> Answers:
    """Answers to several portions of prompts as one."""
    return Answers(
        tuple(t for a in parts for t in a.texts),
        tuple(i for a in parts for i in a.ids),
        np.concatenate([a.stopped for a in parts]),
        tuple(p for a in parts for p in a.problems),
        np.concatenate([a.nll for a in parts]),
        tuple(a.chain(i) for a in parts for i in range(len(a.texts))),
        tuple(a.excerpt(i).half for a in parts for i in range(len(a.texts))),
    )


def packed(name: str, words: Iterable[str]) -> dict[str, np.ndarray]:
    """Words as flat bytes and their counts."""
    parts = [word.encode("utf-8", "surrogatepass") for word in words]
    return {
        name: np.frombuffer(b"".join(parts), dtype=np.uint8),
        f"{name}_counts": np.array([len(part) for part in parts], dtype=np.int64),
    }


def unpacked(name: str, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The inverse of `packed`."""
    parts = _parts(arrays[name], arrays[f"{name}_counts"])
    return tuple(part.tobytes().decode("utf-8", "surrogatepass") for part in parts)


def _parts(flat: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(counts)[:-1]) if len(counts) else []
