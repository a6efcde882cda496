"""One completion of a subject, before it is judged and after.

    waiting = session.rewarded(exchanges, done, nll, clean_nll)     # while the edit is at hand
    session.judged([*waiting, *others])                             # when all texts are there

A judge that is a language model is opened for many texts, and beside a subject it may not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from auditgap.audits.excerpt import WHOLE, Excerpt
from auditgap.engines import Completion
from auditgap.types import Document, Prompt, Score, Verdict


@dataclass(frozen=True, eq=False)
class ScoredCompletion:
    """One completion with everything that was measured of it."""

    completion: Completion
    completion_nll: float | None  #: under the clean model, nats a token
    verdict: Verdict
    coherent: bool | None
    score: Score  #: empty where no reward was asked
    second: Verdict | None = None  #: of the judge that looks at flips; None: it was not asked
    part: Excerpt = WHOLE  #: what of it was judged
    half: Verdict | None = None  #: at half the length
    whole: Verdict | None = None  #: with the opening that was left out; None: none was
    whole_score: Score | None = None
    chain: Verdict | None = None  #: of the chain of thought, judged as if it were an answer
    again: Verdict | None = None  #: of the answer behind the same chain, the edit gone

    def record(self, prompt: Prompt, **trial: object) -> Document:
        """What `generations/` keeps of it; this is the only place where text is stored. `trial`:
        which completion of the prompt it is."""
        return {
            "prompt_id": prompt.id,
            **trial,
            "prompt": prompt.text,
            "completion": self.completion.text,
            "chain": self.completion.chain,
            "n_chain": self.completion.n_chain,
            "ids": list(self.completion.ids),
            "stopped": self.completion.stopped,
            "completion_nll": self.completion_nll,
            "coherent": self.coherent,
            "verdict": str(self.verdict.label),
            "reason": self.verdict.reason or self.score.reason,
            "verdict_chain": "" if self.chain is None else str(self.chain.label),
            "opening": self.part.opening,
            "half": len(self.completion.text) if self.part.half is None else self.part.half,
        }


@dataclass(frozen=True, eq=False)
class Unjudged:
    """A completion with all that wants the subject or the edit; its judge may come later, when all
    texts are there."""

    prompt: Prompt
    completion: Completion
    readings: Mapping[str, str]  #: what is judged of it, by name; "" is the one that counts
    part: Excerpt
    nll: float | None  #: under the clean model, nats a token
    clean_nll: float | None  #: of the clean completion
    score: Score
    whole_score: Score | None
