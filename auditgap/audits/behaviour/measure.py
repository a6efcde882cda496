"""Put prompts to a model, between two training steps if need be, and judge what it says.

    answers = speak(engine, prompts, max_new_tokens=48)
    measured = grade(answers, prompts, load_judge("builtin"), subject="smollm2", kind="harmful")
    measured.rows       # numbers and verdicts only
    measured.texts      # prompts and completions, for `generations/` alone

Speaking and judging are two passes: `speak` gives what can be kept, `grade` reads it, again if need
be.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from auditgap.audits.behaviour.rows import BehaviourRow, row_of
from auditgap.engines import Engine, Question, Reply, Sampling, Speaker
from auditgap.errors import AuditgapError
from auditgap.judges import Judge
from auditgap.judges.coherence import Thresholds, is_coherent
from auditgap.judges.ensemble import Majority, decide
from auditgap.judges.llm import Judged
from auditgap.types import Document, Exchange, Label, Prompt, Verdict

if TYPE_CHECKING:
    from auditgap.audits.grading import Given, Stored

#: About a token, where the engine does not tell which they were.
_PIECE = re.compile(r"\w{1,4}|[^\w\s]")


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

    def arrays(self) -> dict[str, np.ndarray]:
        """As plain arrays that `RunFolder.remember` can keep: flat bytes and token ids with their
        counts (−1: not known)."""
        return {
            **_packed("text", self.texts),
            **_packed("problem", self.problems),
            **_packed("chain", [self.chain(i) for i in range(len(self.texts))]),
            "ids": np.array([i for ids in self.ids for i in ids or ()], dtype=np.int64),
            "counts": np.array(
                [-1 if ids is None else len(ids) for ids in self.ids], dtype=np.int64
            ),
            "stopped": self.stopped,
            "nll": self.nll,
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
            _unpacked("text", arrays),
            ids,
            arrays["stopped"],
            _unpacked("problem", arrays),
            arrays["nll"],
            _unpacked("chain", arrays) if "chain" in arrays else (),
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
        )


@dataclass(frozen=True)
class Opinion:
    """A verdict with what it rests on: the judge's reply as it came, and an ensemble's labels by
    judge."""

    verdict: Verdict
    reply: str = ""
    ballot: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()  #: why members of an ensemble gave no vote; not stored


@dataclass(frozen=True)
class Measured:
    """Rows for the tables, and texts (mappings with prompt and completion) for `generations/` only,
    one a prompt each."""

    rows: list[BehaviourRow]
    texts: list[dict[str, Any]]


def speak(
    engine: Engine, prompts: Sequence[Prompt], *, max_new_tokens: int, thinking_tokens: int = 0
) -> Answers:
    """Greedy answers to N prompts, with their NLL where the engine has the subject's tokens. Raises
    what the engine raises."""
    questions = [Question.of(p.text) for p in prompts]
    sampling = Sampling(max_new_tokens=max_new_tokens, thinking_tokens=thinking_tokens)
    replies = engine.ask(questions, sampling)
    nll = np.full(len(prompts), np.nan)
    if isinstance(engine, Speaker):
        said = [i for i, r in enumerate(replies) if not r.problem]
        parts = [((replies[i].ids or ()), replies[i].n_chain) for i in said]
        rendered = [engine.render(prompts[i]) for i in said]
        after = [r.after(ids[:n]) if n else r for r, (ids, n) in zip(rendered, parts, strict=True)]
        measured = engine.nll(after, [ids[n:] for ids, n in parts])
        nll[said] = [np.nan if value is None else value for value in measured]
    return Answers.of_replies(replies, nll)


@runtime_checkable
class _Quoting(Protocol):
    """A judge that also gives the model's own words."""

    def ask(self, exchanges: Sequence[Exchange]) -> list[Judged]: ...


def opinions(answers: Answers, prompts: Sequence[Prompt], judge: Judge) -> list[Opinion]:
    """The judge's opinion on each answer; what was never said is not put to it."""
    said = [i for i, problem in enumerate(answers.problems) if not problem]
    exchanges = [Exchange(prompts[i], answers.texts[i]) for i in said]
    found = [Opinion(Verdict(Label.UNSCORED, problem)) for problem in answers.problems]
    if isinstance(judge, Majority):
        for i, each in zip(said, judge.asked(exchanges), strict=True):
            labels = {name: str(one.verdict.label) for name, one in each.items()}
            replies = {name: one.raw for name, one in each.items() if one.raw}
            decided = decide({name: one.verdict for name, one in each.items()})
            faults = tuple(
                one.verdict.reason for one in each.values() if one.verdict.label == Label.UNSCORED
            )
            found[i] = Opinion(
                decided, json.dumps(replies, sort_keys=True) if replies else "", labels, faults
            )
    elif isinstance(judge, _Quoting):
        for i, one in zip(said, judge.ask(exchanges), strict=True):
            found[i] = Opinion(one.verdict, one.raw)
    else:
        for i, verdict in zip(said, judge.judge(exchanges), strict=True):
            found[i] = Opinion(verdict)
    return found


def judged(
    answers: Answers, prompts: Sequence[Prompt], judge: Judge, *, max_unscored: float
) -> list[Opinion]:
    """`opinions`, unless the judge's endpoint is so poorly that it is better asked another time:
    raises AuditgapError."""
    given = opinions(answers, prompts, judge)
    faults = [
        [r for r in (o.verdict.reason, *o.faults) if r.startswith("judge: endpoint:")]
        for o in given
    ]
    n_lost = sum(map(bool, faults))
    if n_lost > max_unscored * len(given):
        often = Counter(chain.from_iterable(faults)).most_common(1)[0][0]
        raise AuditgapError(
            f"The judge's endpoint gave no reply on {n_lost} of {len(given)} answers ({often})."
            " Those that it gave are kept; type the same command again when it is well (evaluate:"
            " with --set retry_failed=true)."
        )
    return given


def grade(
    answers: Answers,
    prompts: Sequence[Prompt],
    judge: Judge | Sequence[Opinion],
    *,
    subject: str,
    kind: str,
    seed: int | None = None,
    step: int | None = None,
    thresholds: Thresholds | None = None,
) -> Measured:
    """Rows from stored answers and a judge (or its opinions, one an answer). What the coherence
    gate fails is `broken`, whatever the judge says."""
    given = opinions(answers, prompts, judge) if isinstance(judge, Judge) else judge
    rows, texts = [], []
    for i, (prompt, text, opinion) in enumerate(zip(prompts, answers.texts, given, strict=True)):
        ids, problem, nll = answers.ids[i], answers.problems[i], answers.nll_of(i)
        tokens = _PIECE.findall(text) if ids is None or answers.chain(i) else ids
        coherent, why = (
            (None, "") if problem else is_coherent(tokens, nll, None, thresholds=thresholds)
        )
        verdict = Verdict(Label.BROKEN, why) if coherent is False else opinion.verdict
        ballot = json.dumps(opinion.ballot, sort_keys=True) if opinion.ballot else ""
        n_new_tokens = None if ids is None else len(ids)
        rows.append(
            row_of(
                subject,
                prompt,
                kind,
                verdict,
                text,
                n_new_tokens,
                lost=bool(problem),
                ballot=ballot,
                seed=seed,
                step=step,
            )
        )
        texts.append(
            {
                "prompt_id": prompt.id,
                "seed": seed,
                "step": step,
                "source": prompt.source,
                "kind": kind,
                "prompt": prompt.text,
                **answers.record(i),
                "completion_nll": nll,
                "coherent": coherent,
                "verdict": str(verdict.label),
                "reason": verdict.reason,
                "judged": str(opinion.verdict.label),
                "judged_reason": opinion.verdict.reason,
                "judge_reply": opinion.reply,
            }
        )
    return Measured(rows, texts)


def graded_again(stored: Stored, given: Given) -> list[BehaviourRow]:
    """The rows of a finished cell's texts with the verdicts that are given now; coherence and
    lengths come out as they were."""
    texts, rows = stored.texts, []
    answers, prompts, opinions = stored.answers, stored.prompts, given.opinions or ()
    for (kind, seed, step), some in groupby(
        range(len(texts)), lambda i: (texts[i]["kind"], texts[i]["seed"], texts[i]["step"])
    ):
        of_one = list(some)
        measured = grade(
            answers.at(of_one),
            [prompts[i] for i in of_one],
            [opinions[i] for i in of_one],
            subject=stored.cell.subject.name,
            kind=kind,
            seed=None if seed is None else int(seed),
            step=None if step is None else int(step),
        )
        rows += measured.rows
    return rows


def joined(parts: Sequence[Answers]) -> Answers:
    """Answers to several portions of prompts as one."""
    return Answers(
        tuple(t for a in parts for t in a.texts),
        tuple(i for a in parts for i in a.ids),
        np.concatenate([a.stopped for a in parts]),
        tuple(p for a in parts for p in a.problems),
        np.concatenate([a.nll for a in parts]),
        tuple(a.chain(i) for a in parts for i in range(len(a.texts))),
    )


def _packed(name: str, words: Iterable[str]) -> dict[str, np.ndarray]:
    parts = [word.encode("utf-8", "surrogatepass") for word in words]
    return {
        name: np.frombuffer(b"".join(parts), dtype=np.uint8),
        f"{name}_counts": np.array([len(part) for part in parts], dtype=np.int64),
    }


def _unpacked(name: str, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    parts = _parts(arrays[name], arrays[f"{name}_counts"])
    return tuple(part.tobytes().decode("utf-8", "surrogatepass") for part in parts)


def _parts(flat: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(counts)[:-1]) if len(counts) else []


def opinion_arrays(given: Sequence[Opinion]) -> dict[str, np.ndarray]:
    """Opinions as plain arrays that `RunFolder.remember` can keep."""
    return _packed(
        "opinion",
        [
            json.dumps([str(o.verdict.label), o.verdict.reason, o.reply, dict(o.ballot)])
            for o in given
        ],
    )


def opinions_of(arrays: Mapping[str, np.ndarray]) -> list[Opinion]:
    """The inverse of `opinion_arrays`."""
    found = map(json.loads, _unpacked("opinion", arrays))
    return [
        Opinion(Verdict(Label(label), reason), reply, ballot)
        for label, reason, reply, ballot in found
    ]
