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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from auditgap.audits.behaviour.answers import Answers, packed, unpacked
from auditgap.audits.behaviour.rows import BehaviourRow, row_of
from auditgap.audits.excerpt import EMPTY
from auditgap.engines import Engine, Question, Sampling, Speaker
from auditgap.errors import AuditgapError
from auditgap.judges import Judge
from auditgap.judges.coherence import Thresholds, is_coherent
from auditgap.judges.ensemble import Majority, decide
from auditgap.judges.llm import Judged
from auditgap.types import Exchange, Label, Prompt, Verdict

if TYPE_CHECKING:
    from auditgap.audits.grading import Given, Stored

#: About a token, where the engine does not tell which they were.
_PIECE = re.compile(r"\w{1,4}|[^\w\s]")


@dataclass(frozen=True)
class Opinion:
    """A verdict with what it rests on: the judge's reply as it came, and an ensemble's labels by
    judge."""

    verdict: Verdict
    reply: str = ""
    ballot: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()  #: why members of an ensemble gave no vote; not stored
    #: on the text at half its length; None: that is the same text, or nobody was asked
    half: Verdict | None = None


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
    """The judge's opinion on each answer, and on what half its length leaves of it; what was never
    said is not put to it."""
    said = [i for i, problem in enumerate(answers.problems) if not problem]
    halves = {
        i: other["half"]
        for i in said
        if "half" in (other := answers.excerpt(i).others(answers.texts[i]))
    }
    read = [i for i, text in halves.items() if text]
    asked = [(i, answers.texts[i]) for i in said] + [(i, halves[i]) for i in read]
    given = _opinions([Exchange(prompts[i], text) for i, text in asked], judge)
    at_half = dict.fromkeys(halves, Verdict(Label.UNSCORED, EMPTY))
    at_half |= {i: o.verdict for i, o in zip(read, given[len(said) :], strict=True)}
    found = [Opinion(Verdict(Label.UNSCORED, problem)) for problem in answers.problems]
    for i, opinion in zip(said, given, strict=False):
        found[i] = replace(opinion, half=at_half.get(i))
    return found


def _opinions(exchanges: Sequence[Exchange], judge: Judge) -> list[Opinion]:
    if isinstance(judge, Majority):
        return [_of_members(each) for each in judge.asked(exchanges)]
    if isinstance(judge, _Quoting):
        return [Opinion(one.verdict, one.raw) for one in judge.ask(exchanges)]
    return [Opinion(verdict) for verdict in judge.judge(exchanges)]


def _of_members(each: Mapping[str, Judged]) -> Opinion:
    """An ensemble's opinion, from its members' by name."""
    verdicts = {name: one.verdict for name, one in each.items()}
    labels = {name: str(verdict.label) for name, verdict in verdicts.items()}
    replies = {name: one.raw for name, one in each.items() if one.raw}
    faults = tuple(v.reason for v in verdicts.values() if v.label == Label.UNSCORED)
    reply = json.dumps(replies, sort_keys=True) if replies else ""
    return Opinion(decide(verdicts), reply, labels, faults)


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
                half=None if coherent is False else opinion.half,
                half_text=text[: answers.excerpt(i).half],
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
    at_half = {i: at for (i, name), at in given.others.items() if name == "half"}
    for (kind, seed, step), some in groupby(
        range(len(texts)), lambda i: (texts[i]["kind"], texts[i]["seed"], texts[i]["step"])
    ):
        of_one = list(some)
        measured = grade(
            answers.at(of_one),
            [prompts[i] for i in of_one],
            [
                replace(opinions[i], half=opinions[at_half[i]].verdict if i in at_half else None)
                for i in of_one
            ],
            subject=stored.cell.subject.name,
            kind=kind,
            seed=None if seed is None else int(seed),
            step=None if step is None else int(step),
        )
        rows += measured.rows
    return rows


def opinion_arrays(given: Sequence[Opinion]) -> dict[str, np.ndarray]:
    """Opinions as plain arrays that `RunFolder.remember` can keep."""
    return packed(
        "opinion",
        [
            json.dumps(
                [
                    str(o.verdict.label),
                    o.verdict.reason,
                    o.reply,
                    dict(o.ballot),
                    None if o.half is None else [str(o.half.label), o.half.reason],
                ]
            )
            for o in given
        ],
    )


def opinions_of(arrays: Mapping[str, np.ndarray]) -> list[Opinion]:
    """The inverse of `opinion_arrays`."""
    return [_opinion_of(*json.loads(told)) for told in unpacked("opinion", arrays)]


def _opinion_of(
    label: str,
    reason: str,
    reply: str,
    ballot: Mapping[str, str],
    half: tuple[str, str] | None = None,  # older ones have none
) -> Opinion:
    at_half = None if half is None else Verdict(Label(half[0]), half[1])
    return Opinion(Verdict(Label(label), reason), reply, ballot, half=at_half)
