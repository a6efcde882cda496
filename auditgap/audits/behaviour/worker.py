"""Runs one subject: everything is asked first and judged afterwards, so that subject and judge
never share the memory.

Answers and verdicts are remembered in portions: a kill costs no more than the portion in flight,
and what a paid endpoint has answered is not asked again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auditgap import models
from auditgap.audits.behaviour.answers import Answers, joined
from auditgap.audits.behaviour.config import BehaviourOptions
from auditgap.audits.behaviour.measure import (
    grade,
    judged,
    opinion_arrays,
    opinions_of,
    speak,
)
from auditgap.audits.behaviour.plan import BehaviourPlan
from auditgap.audits.planning import chain_of
from auditgap.audits.session import check_weights, torn
from auditgap.engines import Engine, Journalled, Reply, Serving
from auditgap.engines.parity import Parity, greedy, parity, sample
from auditgap.errors import AuditgapError
from auditgap.judges import Judge, close_judge, keep_replies, load_judge
from auditgap.store import RunFolder, files
from auditgap.sweep import Group
from auditgap.types import Cell, Prompt, Subject, digest

#: Answers asked for in one go and remembered together; and portions judged in one go.
PORTION, JUDGED = 256, 16


class BehaviourWorker:
    """Asks and judges the cells of one group after another."""

    def __init__(self, plan: BehaviourPlan, options: BehaviourOptions, store: RunFolder) -> None:
        self.plan, self.options, self.store = plan, options, store
        self.serving = options.serving(plan.config)

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        """Compute and write every unfinished cell of the group."""
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        if not pending:
            return
        started = time.monotonic()
        compared = self._ask(group.cells[0].subject, pending, tick)
        info = {
            "engine": self.options.engine,
            **({} if compared is None else {"parity": compared.describe()}),
        }
        with closing_judge(
            self.plan.config.judge,
            self.options.judge_serving(self.plan.config),
            self.store.journals,
        ) as judge:
            self._have_judged(pending, judge, tick)
        seconds = (time.monotonic() - started) / len(pending)
        for cell in pending:
            self._write(cell, seconds, info)
        if all(self.store.is_finished(cell.key) for cell in self.plan.cells):
            # what was said stands in generations/ now
            files.remove(self.store.journals)

    # -- asking
    # --------------------------------------------------------------------------------------------------------

    def _ask(
        self, subject: Subject, pending: Sequence[Cell], tick: Callable[[float], None]
    ) -> Parity | None:
        """Have the subject answer all that is not remembered; then, for vLLM, compare with
        transformers."""
        todo = []
        for cell in pending:
            for some in self._parts(cell):
                if self.store.remembers(self._name(cell, some)):
                    tick(len(some))
                else:
                    todo.append((cell, some))
        sample = self._sample(pending)
        if not todo and not sample:
            return None
        replies: list[Reply] = []
        with self._open(subject) as engine:
            for cell, some in todo:
                self.store.remember(
                    self._name(cell, some),
                    lambda cell=cell, some=some: self._spoken(engine, cell, some).arrays(),
                )
                tick(len(some))
            if sample:
                replies = greedy(engine, sample, self._new_tokens(pending))
        if not sample:
            return None
        with self.serving.model_copy(update={"engine": "hf"}).open(subject.name) as plain:
            return parity(replies, greedy(plain, sample, self._new_tokens(pending)))

    def _new_tokens(self, cells: Sequence[Cell]) -> int:
        """Those of a chain and of an answer together."""
        return self.plan.config.max_new_tokens + chain_of(cells[0])

    def _spoken(self, engine: Engine, cell: Cell, some: Sequence[Prompt]) -> Answers:
        """The portion's answers. Raises AuditgapError when an endpoint is so poorly that it is
        better asked another time."""
        answers = speak(
            engine,
            some,
            max_new_tokens=self.plan.config.max_new_tokens,
            thinking_tokens=chain_of(cell),
        )
        faults = [problem for problem in answers.problems if problem.startswith("endpoint:")]
        if len(faults) > self.options.max_unscored * len(some):
            raise AuditgapError(
                f"{len(faults)} of {len(some)} questions got no answer"
                f" ({Counter(faults).most_common(1)[0][0]}). Those that were answered are kept; run"
                " the same command with --set retry_failed=true when the endpoint is well again."
            )
        return answers.halved(self.plan.config.max_new_tokens)

    def _sample(self, pending: Sequence[Cell]) -> list[Prompt]:
        """The prompts on which vLLM is compared with transformers."""
        if self.options.engine != "vllm":
            return []
        return sample([p for cell in pending for p in self.plan.prompts(cell)], self.options.parity)

    def _open(self, subject: Subject) -> Engine:
        if self.options.engine != "openai":
            outline = models.outline(subject.name, chat_template=self.plan.config.chat_template)
            check_weights(subject, outline)
        engine = self.serving.open(subject.name)
        if isinstance(engine, Journalled):
            engine.journal = self.store.journals / f"{subject.fingerprint}.jsonl"
        return engine

    # -- judging
    # -------------------------------------------------------------------------------------------------------

    def _have_judged(
        self, pending: Sequence[Cell], judge: Judge, tick: Callable[[float], None]
    ) -> None:
        """Remember the judge's opinions of all answers. An ensemble opens one judge after the other
        at every call, so what is put to it at once is much."""
        todo = [
            (cell, some)
            for cell in pending
            for some in self._parts(cell)
            if not self.store.remembers(self._name(cell, some, "opinions"))
        ]
        for start in range(0, len(todo), JUDGED):
            parts = todo[start : start + JUDGED]
            answers = [self._answers(cell, some) for cell, some in parts]
            prompts = [p for _, some in parts for p in some]
            given = iter(
                judged(joined(answers), prompts, judge, max_unscored=self.options.max_unscored)
            )
            for cell, some in parts:
                mine = [next(given) for _ in some]
                self.store.remember(
                    self._name(cell, some, "opinions"), lambda mine=mine: opinion_arrays(mine)
                )
                tick(len(some))

    def _write(self, cell: Cell, seconds: float, info: Mapping[str, Any]) -> None:
        rows, texts, names = [], [], []
        for some in self._parts(cell):
            names += [self._name(cell, some), self._name(cell, some, "opinions")]
            given = opinions_of(self.store.remember(names[-1], torn))
            measured = grade(
                self._answers(cell, some),
                some,
                given,
                subject=cell.subject.name,
                kind=cell.settings["kind"],
            )
            rows += measured.rows
            texts += measured.texts
        self.store.write(cell, rows, generations=texts, seconds=seconds, info=info)
        self.store.forget(names)

    def _answers(self, cell: Cell, some: Sequence[Prompt]) -> Answers:
        return Answers.of(self.store.remember(self._name(cell, some), torn))

    def _parts(self, cell: Cell) -> list[tuple[Prompt, ...]]:
        prompts = self.plan.prompts(cell)
        return [prompts[i : i + PORTION] for i in range(0, len(prompts), PORTION)]

    def _name(self, cell: Cell, some: Sequence[Prompt], what: str = "answers") -> str:
        """The name of a portion's answers or opinions: a hash of what they depend on."""
        return digest([what, cell.key, [p.id for p in some]])


@contextmanager
def closing_judge(
    name: str, serving: Serving | None, journals: Path | None = None
) -> Iterator[Judge]:
    """The judge of that name, whose models are let go of at the end; `journals`: where endpoints'
    replies are kept."""
    device = "auto" if serving is None else serving.device
    judge = load_judge(name, device=models.pick_device(device), serving=serving)
    if journals is not None:
        keep_replies(judge, journals)
    try:
        yield judge
    finally:
        close_judge(judge)
