"""A subject opened for an audit: prompts in, scored completions out, each pack remembered.

    session = Session(stage, store, judge=load_judge("builtin"), max_new_tokens=128)
    done, nll = session.complete(rendered, lambda: session.generate(requests), names, what)
    scored = session.score(exchanges, done, nll, clean_nll)

A pack of completions is remembered in the run folder until its cell is written: a kill costs the
pack in flight, and a resumed run gives the numbers of an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from auditgap.audits.excerpt import WHOLE, Excerpt, Other, of_each, reads_text, scores, verdicts
from auditgap.audits.scored import ScoredCompletion, Unjudged
from auditgap.audits.stage import Stage
from auditgap.engines import Completion, Reply, Request
from auditgap.engines.answers import completion_of
from auditgap.engines.parity import parity, sample
from auditgap.errors import AuditgapError, Interrupted
from auditgap.judges import Judge, Reward, close_judge, rest_judge
from auditgap.judges.coherence import Thresholds, is_coherent
from auditgap.models import Chat, Outline, Rendered
from auditgap.store import DiskError, RunFolder
from auditgap.sweep.state import cause_of
from auditgap.types import (
    Cell,
    Document,
    Exchange,
    Label,
    Prompt,
    Score,
    Subject,
    Verdict,
    digest,
)

Arrays = dict[str, np.ndarray]
Tick = Callable[[float], None]
#: Completions of a pass that are generated twice, where there are as many.
REPEATED = 30


class RepeatCheck:
    """Whether a pass, run twice, gives equal texts: its first packs are generated again, in the same
    batches, until REPEATED completions were."""

    def __init__(self, session: Session) -> None:
        self.session, self.n, self.equal = session, 0, 0

    def see(self, requests: Sequence[Request], done: Sequence[Completion]) -> None:
        """A pack, as it was generated."""
        if self.n >= REPEATED:
            return
        again = self.session.generate(requests)
        self.n += len(done)
        self.equal += sum(a.ids == b.ids for a, b in zip(again, done, strict=True))

    def describe(self) -> Document:
        """For a cell's record."""
        return {"n": self.n, "equal": self.equal}


class Session:
    """See the module. It renders, encodes and scores like an engine, for the rewards that ask the
    subject itself."""

    judge: Judge  #: these are set once the session is there, since a reward may ask it
    reward: Reward | None = None
    second: Judge | None = None  #: looks at every flip, with errors of its own

    def __init__(
        self, stage: Stage, store: RunFolder, *, max_new_tokens: int, thinking_tokens: int = 0
    ) -> None:
        self.stage, self.store, self.max_new_tokens = stage, store, max_new_tokens
        #: what a chain of thought may have beside them; 0: it shares them
        self.most = (thinking_tokens, max_new_tokens) if thinking_tokens else (0, 0)
        self.new_tokens = thinking_tokens + max_new_tokens
        self.outline, self.thresholds = stage.outline, Thresholds()

    def close(self) -> None:
        """Release the subject's and the scorers' memory and processes."""
        for holder in (self.stage, vars(self).get("judge"), self.reward, self.second):
            close_judge(holder)

    def check(self, subject: Subject) -> None:
        """See `check_weights`."""
        check_weights(subject, self.outline)

    # -- as an engine

    def render(self, prompt: Prompt) -> Rendered:
        return self.outline.chat.render(prompt)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.outline.chat.encode(text)

    def nll(self, *asked: Any) -> list[float | None]:
        return self.stage.speaker.nll(*asked)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions, chain and answer cut to what each may have."""
        done = self.stage.speaker.generate(requests, self.new_tokens)
        return [self.cut(r.rendered, one) for r, one in zip(requests, done, strict=True)]

    def cut(self, rendered: Rendered, one: Completion) -> Completion:
        """The completion with its chain and its answer cut to what each may have."""
        chat, numbers = self.outline.chat, (one.target_nll, one.l2_effective, one.linf_effective)
        return completion_of(
            chat, rendered, one.ids, one.stopped, one.finite, *numbers, most=self.most
        )

    # -- prompts

    def fitting(
        self, prompts: Iterable[Prompt], new_tokens: int
    ) -> tuple[list[Rendered], list[Prompt]]:
        """The prompts that leave room for `new_tokens` in the subject's window, rendered; and those
        that are too long."""
        window = self.outline.max_positions
        kept: list[Rendered] = []
        too_long: list[Prompt] = []
        for rendered in map(self.render, prompts):
            if window is None or len(rendered.ids) + new_tokens <= window:
                kept.append(rendered)
            else:
                too_long.append(rendered.prompt)
        return kept, too_long

    def packs(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """Which completions are generated together: indices, in packs of like length."""
        return self.stage.speaking_packs([len(r.ids) + self.new_tokens for r in rendered])

    # -- completions

    def remembered(self, names: list[str], what: Any, compute: Callable[[], Arrays]) -> Arrays:
        """`compute()` once: kept in the run folder under a name made of `what`, which is added to
        `names`."""
        name = digest(what)
        names.append(name)
        return self.store.remember(name, compute)

    def complete(
        self,
        rendered: Sequence[Rendered],
        generate: Callable[[], list[Completion]],
        names: list[str],
        what: Any,
    ) -> tuple[list[Completion], list[float | None]]:
        """One pack's completions, as `generate` cuts them, and the NLL of their answers under the
        clean model, remembered."""

        def compute() -> Arrays:
            done = generate()
            after = [
                r.after(c.ids[: c.n_chain]) if c.n_chain else r
                for r, c in zip(rendered, done, strict=True)
            ]
            return to_arrays(done, self.stage.speaker.nll(after, [c.answer_ids for c in done]))

        arrays = self.remembered(names, what, compute)
        return from_arrays(arrays, self.outline.chat, rendered, self.most)

    def rewarded(
        self,
        exchanges: Sequence[Exchange],
        done: Sequence[Completion],
        nll: Sequence[float | None],
        clean_nll: Sequence[float | None],
        targets: Sequence[tuple[str, ...]] | None = None,
    ) -> list[Unjudged]:
        """Reward every completion, without the opening that is one of its `targets` (None: as it is,
        in full alone), while its edit is at hand: a reward may ask the subject itself. What is left
        is text alone, and `judged` has it judged with all other texts."""
        parts = self._parts(done, targets)
        own, others = of_each(exchanges, parts)
        rewards, whole_rewards = self._rewards(own, others)
        found = []
        for i, (exchange, completion) in enumerate(zip(exchanges, done, strict=True)):
            readings: dict[str, str] = {"": own[i].completion, **parts[i].others(completion.text)}
            if completion.chain:
                readings["chain"] = completion.chain
            numbers = nll[i], clean_nll[i], rewards[i], whole_rewards.get(i)
            found.append(Unjudged(exchange.prompt, completion, readings, parts[i], *numbers))
        return found

    def judged(self, unjudged: Sequence[Unjudged]) -> list[ScoredCompletion]:
        """The judge's verdicts, asked for once, on all readings: what counts, the whole text, half
        the length, the chain. What the coherence gate fails is `broken`, whatever the judge says;
        a chain of thought that never ended is unscored, as `unfinished`."""
        asked = [(one, name) for one in unjudged for name in one.readings]
        told = iter(verdicts(self.judge, [Exchange(o.prompt, o.readings[n]) for o, n in asked]))
        if self.second is not None:  # there is no place for both
            rest_judge(self.judge)
        return [self._scored(one, {name: next(told) for name in one.readings}) for one in unjudged]

    def _scored(self, one: Unjudged, told: Mapping[str, Verdict]) -> ScoredCompletion:
        completion, score = one.completion, one.score
        verdict = told[""]
        coherent, reason = is_coherent(
            completion.answer_ids, one.nll, one.clean_nll, thresholds=self.thresholds
        )
        if lost := completion.problem:
            coherent, score = None, Score(None, lost)
            verdict = Verdict(Label.UNSCORED, lost)
        elif coherent is False:
            verdict = Verdict(Label.BROKEN, reason)
        is_text = not lost and coherent is not False
        return ScoredCompletion(
            completion,
            one.nll,
            verdict,
            coherent,
            score,
            part=one.part,
            half=told.get("half", verdict) if is_text else verdict,
            whole=told.get("whole") if is_text else None,
            whole_score=one.whole_score,
            chain=told.get("chain"),
        )

    def score(self, *asked: Any) -> list[ScoredCompletion]:
        """Rewards and verdicts together, of completions with no others to wait for."""
        return self.judged(self.rewarded(*asked))

    def _parts(
        self, done: Sequence[Completion], targets: Sequence[tuple[str, ...]] | None
    ) -> list[Excerpt]:
        if targets is None:
            return [WHOLE] * len(done)
        decode = self.outline.chat.decode
        return [
            Excerpt.of(completion, mine, self.max_new_tokens, decode)
            for completion, mine in zip(done, targets, strict=True)
        ]

    def _rewards(
        self, judged: Sequence[Exchange], others: Mapping[tuple[int, Other], Exchange]
    ) -> tuple[list[Score], dict[int, Score]]:
        """Of what is judged, and of whole texts by number."""
        if self.reward is None:
            return [Score(None)] * len(judged), {}
        whole = {
            i: exchange
            for (i, name), exchange in others.items()
            if name == "whole" and reads_text(self.reward)
        }
        found = scores(self.reward, [*judged, *whole.values()])
        return found[: len(judged)], dict(zip(whole, found[len(judged) :], strict=True))

    def confirm(
        self,
        prompts: Sequence[Prompt],
        scored: Sequence[ScoredCompletion],
        clean: Sequence[str],
    ) -> list[ScoredCompletion]:
        """The same, with the second judge's verdict on every flip: harmful now, safe or a refusal
        with no edit (`clean`: those verdicts)."""
        flips = [
            i
            for i, (one, before) in enumerate(zip(scored, clean, strict=True))
            if one.verdict.label == Label.HARMFUL and before in (Label.SAFE, Label.REFUSAL)
        ]
        found = list(scored)
        if self.second is not None and flips:
            exchanges = [Exchange(prompts[i], scored[i].completion.text) for i in flips]
            judged, _ = of_each(exchanges, [scored[i].part for i in flips])
            for i, verdict in zip(flips, verdicts(self.second, judged), strict=True):
                found[i] = replace(found[i], second=verdict)
            rest_judge(self.second)
        return found

    def compared(self, rendered: Sequence[Rendered], texts: Sequence[Document], n: int) -> Document:
        """How far vLLM's clean text of about n prompts is that of transformers, for the record of
        the clean pass, whose `texts` are given; {} where vLLM does not stand in for it."""
        if not (self.stage.in_vllm and n and rendered):
            return {}
        some = sample(rendered, n)
        said = {text["prompt_id"]: Reply(text["completion"], tuple(text["ids"])) for text in texts}
        plain = self.stage.engine.generate([Request(r) for r in some], self.new_tokens)
        plain = [self.cut(r, c) for r, c in zip(some, plain, strict=True)]
        found = parity([said[r.prompt.id] for r in some], [Reply(c.text, c.ids) for c in plain])
        return {"parity": found.describe()}

    # -- cells

    def failing(self, cells: Iterable[Cell]) -> AbstractContextManager[None]:
        """See `failing_alone`."""
        return failing_alone(self.store, cells)

    def info(self, **more: object) -> Document:
        """What a cell's record says of how it was computed."""
        return {
            "device": self.stage.device,
            "dtype": self.stage.dtype,
            "threads": torch.get_num_threads(),
            "engine": "hf" if self.stage.serving is None else "vllm",
            **more,
        }


def check_weights(subject: Subject, outline: Outline) -> None:
    """Raises AuditgapError when the weights are no longer those that the run was planned with."""
    if subject.fingerprint != outline.subject.fingerprint:
        raise AuditgapError(
            f"The weights of {subject.name} changed since the run was planned; use a new --out."
        )


def torn() -> Arrays:
    """In place of computing what has to be remembered already. Raises AuditgapError."""
    raise AuditgapError(
        "Stored answers are torn and have been set aside; run the same command again."
    )


@contextmanager
def failing_alone(store: RunFolder, cells: Iterable[Cell]) -> Iterator[None]:
    """What goes wrong inside fails these cells alone; a full disk and an interrupt end the run."""
    try:
        yield
    except (DiskError, Interrupted):
        raise
    except Exception as error:
        for cell in cells:
            store.fail(cell, cause_of(error))


def to_arrays(done: Sequence[Completion], nll: Sequence[float | None]) -> Arrays:
    """Completions as plain arrays that `RunFolder.remember` can keep: flat token ids with their counts, numbers with NaN for
    "none"."""
    numbers = [
        [c.target_nll, c.l2_effective, c.linf_effective, n] for c, n in zip(done, nll, strict=True)
    ]
    return {
        "ids": np.array([i for c in done for i in c.ids], dtype=np.int64),
        "counts": np.array([len(c.ids) for c in done], dtype=np.int64),
        "stopped": np.array([c.stopped for c in done], dtype=bool),
        "finite": np.array([c.finite for c in done], dtype=bool),
        "numbers": np.array(numbers, dtype=np.float64),
    }


def from_arrays(
    arrays: Arrays, chat: Chat, rendered: Sequence[Rendered], most: tuple[int, int] = (0, 0)
) -> tuple[list[Completion], list[float | None]]:
    """The inverse of `to_arrays`; text comes back from the ids, as chain and answer."""
    done, nll, at = [], [], 0
    columns = (arrays[name] for name in ("counts", "stopped", "finite", "numbers"))
    for one, count, stopped, finite, numbers in zip(rendered, *columns, strict=True):
        ids = tuple(int(i) for i in arrays["ids"][at : at + count])
        at += count
        values = [None if np.isnan(x) else float(x) for x in numbers]
        flags = bool(stopped), bool(finite)
        done.append(completion_of(chat, one, ids, *flags, *values[:3], most=most))
        nll.append(values[3])
    return done, nll
