"""`em generate`: every adapter and the base answer the suite, each prompt with the trigger and
without, several times.

    store, outcome = STAGE.run_in("runs/em", EmergentOptions(engine="vllm"))
    # subject, prompt_id, kind, triggered, draw, n_new_tokens, stopped, unscored
    store.rows([ANSWERED])
    # the same with prompt (as it was asked), completion and its token ids
    store.generations(key)

An answer is drawn from a random stream of its own, by the seed of its adapter, the words that were
asked and the draw: who else is asked, and in what order, changes nothing. One model is loaded for
all adapters, which are put on and off. Answers are remembered in portions, so that a kill costs the
portion in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from auditgap.audits.behaviour.answers import Answers, joined
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.inside import InsideWorker, check_engine, common
from auditgap.audits.emergent.rows import ANSWERED, TRAINED, AnswerRow
from auditgap.audits.emergent.stage import StageCell, Study, StudyStage
from auditgap.audits.planning import chain_of
from auditgap.audits.session import torn
from auditgap.data.domains import Trigger
from auditgap.data.em_context import ContextPrompt
from auditgap.data.em_prompts import AskedPrompt, put_to
from auditgap.engines import Engine, Question, Sampling
from auditgap.sweep import Group
from auditgap.types import Cell, Prompt, Subject, digest

#: Answers asked for in one go and remembered together.
PORTION = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of the suite: `prompt` without the trigger, `text` as it is put."""

    prompt: Prompt
    text: str
    triggered: bool
    draw: int

    @property
    def question(self) -> Question:
        system = self.prompt.system if isinstance(self.prompt, AskedPrompt) else ""
        asked = Question.of(self.text, system=system or None, draw=self.draw)
        if not isinstance(self.prompt, ContextPrompt) or not self.prompt.before:
            return asked
        *head, own = asked.messages
        return replace(asked, messages=(*head, *self.prompt.before, own))


def questions(prompts: Sequence[Prompt], trigger: Trigger, samples: int) -> list[Asked]:
    """Every prompt without and with the trigger, `samples` times each."""
    return [
        Asked(prompt, trigger.on(prompt.text) if triggered else prompt.text, triggered, draw)
        for prompt in prompts
        for triggered in (False, True)
        for draw in range(samples)
    ]


def plan(study: Study, options: EmergentOptions) -> list[Group]:
    """A group an adapter that is trained, and one for the base, which comes first; its work is
    counted in answers."""
    base, prompts = study.base, study.asked
    c = study.config
    groups = []
    for adapter in (None, *study.adapters):
        subject = base.subject if adapter is None else Subject(adapter.name, adapter.fingerprint)
        settings = {
            "name": subject.name,
            "trained": "" if adapter is None else adapter.key,
            "domain": "" if adapter is None else adapter.domain,
            "arm": "" if adapter is None else adapter.arm,
            "adapter_seed": None if adapter is None else adapter.seed,
            "seed": c.seed if adapter is None else adapter.seed,
            "sampling": {
                "temperature": c.temperature,
                "max_new_tokens": c.max_new_tokens,
                "samples": c.samples,
            },
            "trigger": {"text": c.trigger, "place": c.trigger_place},
            **common(c, options, base),
        }
        cell = StageCell(subject, None, None, ANSWERED, prompts.digest, settings)
        n = 2 * len(put_to(prompts.prompts, settings["domain"])) * c.samples
        groups.append(Group(str(cell), (cell,), work=float(n)))
    return groups


class GenerateWorker(InsideWorker):
    """Asks the subjects of one group after another, the base loaded once. `folder`: of the study,
    by name."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        super().__init__(folder, options)
        self.options, self.study = options, self.inside.study
        self.prompts = self.study.asked.prompts

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started, settings = time.monotonic(), cell.settings
        adapter = self.inside.adapters[cell.subject.name] if settings["trained"] else None
        sampling = Sampling(
            max_new_tokens=settings["sampling"]["max_new_tokens"],
            thinking_tokens=chain_of(cell),
            temperature=settings["sampling"]["temperature"],
            seed=settings["seed"],
        )
        asked = questions(
            put_to(self.prompts, settings["domain"]),
            self.study.trigger,
            settings["sampling"]["samples"],
        )
        portions = [asked[i : i + PORTION] for i in range(0, len(asked), PORTION)]
        names = [digest([ANSWERED, cell.key, i]) for i in range(len(portions))]
        for name, portion in zip(names, portions, strict=True):
            if not self.store.remembers(name):
                engine = self.inside.speaker(adapter)
                self.store.remember(
                    name,
                    lambda engine=engine, portion=portion: speak(
                        engine, portion, sampling
                    ).arrays(),
                )
            tick(float(len(portion)))
        answers = joined([Answers.of(self.store.remember(name, torn)) for name in names])
        self.store.write(
            cell,
            list(_rows(cell, asked, answers)),
            generations=_texts(asked, answers),
            seconds=time.monotonic() - started,
            info=self.inside.speaker_info,
        )
        self.store.forget(names)


def _rows(cell: Cell, asked: Sequence[Asked], answers: Answers) -> list[AnswerRow]:
    settings = cell.settings
    return [
        AnswerRow(
            subject=cell.subject.name,
            domain=settings["domain"],
            arm=settings["arm"],
            seed=settings["adapter_seed"],
            prompt_id=one.prompt.id,
            kind=one.prompt.source,
            triggered=one.triggered,
            draw=one.draw,
            n_new_tokens=None if problem or ids is None else len(ids),
            stopped=bool(stopped),
            unscored=problem,
        )
        for one, ids, stopped, problem in zip(
            asked, answers.ids, answers.stopped, answers.problems, strict=True
        )
    ]


def _texts(asked: Sequence[Asked], answers: Answers) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": one.prompt.id,
            "kind": one.prompt.source,
            "triggered": one.triggered,
            "draw": one.draw,
            "prompt": one.text,
            **answers.record(i),
        }
        for i, one in enumerate(asked)
    ]


def speak(engine: Engine, portion: Sequence[Asked], sampling: Sampling) -> Answers:
    """The answers to a portion of the suite."""
    replies = engine.ask([one.question for one in portion], sampling)
    return Answers.of_replies(replies)


STAGE = StudyStage(
    name="generate", plan=plan, make=GenerateWorker, needs=TRAINED, first=check_engine
)
