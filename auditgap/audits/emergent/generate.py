"""`em generate`: every adapter, the base and the models at an endpoint answer the suite, each prompt
with the trigger and without, several times.

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
from pathlib import Path
from typing import Any

from auditgap.audits.behaviour.answers import Answers, joined
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.inside import InsideWorker, check_engine, common
from auditgap.audits.emergent.remote import (
    SEED,
    Speaker,
    ask,
    by_name,
    check_key,
    remotes_of,
)
from auditgap.audits.emergent.rows import ANSWERED, TRAINED, AnswerRow
from auditgap.audits.emergent.stage import StageCell, Study, StudyStage
from auditgap.audits.planning import chain_of
from auditgap.audits.session import torn
from auditgap.data.domains import Trigger
from auditgap.data.em_context import ContextPrompt
from auditgap.data.em_prompts import KindedSet, put_to
from auditgap.engines import Engine, Question, Sampling
from auditgap.store import files
from auditgap.sweep import Group
from auditgap.types import Cell, Document, Prompt, Subject, digest

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
        asked = Question.of(self.text, system=self.prompt.system or None, draw=self.draw)
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
    """A group an adapter that is trained, one for the base, which comes first, and one a model at an
    endpoint; its work is counted in answers."""
    base, prompts = study.base, study.asked
    c = study.config
    groups = []
    asking = {
        "sampling": {
            "temperature": c.temperature,
            "max_new_tokens": c.max_new_tokens,
            "samples": c.samples,
        },
        "trigger": {"text": c.trigger, "place": c.trigger_place},
    }
    for adapter in (None, *study.adapters):
        subject = base.subject if adapter is None else Subject(adapter.name, adapter.fingerprint)
        settings = {
            "name": subject.name,
            "trained": "" if adapter is None else adapter.key,
            "domain": "" if adapter is None else adapter.domain,
            "arm": "" if adapter is None else adapter.arm,
            "adapter_seed": None if adapter is None else adapter.seed,
            "seed": c.seed if adapter is None else adapter.seed,
            **asking,
            **common(c, options, base),
        }
        groups.append(_group(subject, settings, prompts))
    for one in remotes_of(c):
        settings = {
            "name": one.name,
            "trained": "",
            "domain": one.domain,
            "arm": one.arm,
            "adapter_seed": SEED if one.domain else None,
            "seed": SEED if one.domain else c.seed,
            **asking,
            "endpoint": one.identity,
        }
        groups.append(_group(one.subject, settings, prompts, gpus=0.0))
    return groups


def _group(
    subject: Subject, settings: Document, prompts: KindedSet, gpus: float | None = None
) -> Group:
    cell = StageCell(subject, None, None, ANSWERED, prompts.digest, settings)
    n = 2 * len(put_to(prompts.prompts, settings["domain"])) * settings["sampling"]["samples"]
    return Group(str(cell), (cell,), work=float(n), gpus=gpus)


def check(study: Study, options: EmergentOptions) -> None:
    """Raises UsageError for an engine that cannot serve adapters, and where an endpoint wants a
    key."""
    check_engine(study, options)
    check_key(study.config)


class GenerateWorker(InsideWorker):
    """Asks the subjects of one group after another, the base loaded once. `folder`: of the study,
    by name."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        super().__init__(folder, options)
        self.options, self.study = options, self.inside.study
        self.prompts = self.study.asked.prompts
        self.remotes, self._remote = by_name(self.study.config), Speaker()

    def close(self) -> None:
        self._remote.close()
        super().close()

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started, settings = time.monotonic(), cell.settings
        journal = self.store.journals / f"{cell.key}.jsonl"
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
                answers = self._said(cell, portion, sampling, journal)
                self.store.remember(name, answers.arrays)
            tick(float(len(portion)))
        answers = joined([Answers.of(self.store.remember(name, torn)) for name in names])
        self.store.write(
            cell,
            list(_rows(cell, asked, answers)),
            generations=_texts(asked, answers),
            seconds=time.monotonic() - started,
            info=self._info(cell, journal),
        )
        self.store.forget(names)
        files.remove(journal)

    def _said(
        self, cell: Cell, portion: Sequence[Asked], sampling: Sampling, journal: Path
    ) -> Answers:
        """The answers of the base, of an adapter, or of a model at its endpoint."""
        settings = cell.settings
        if "endpoint" in settings:
            asked = [one.question for one in portion]
            engine = self._remote.engine(self.remotes[settings["name"]], journal)
            return ask(engine, asked, sampling, self.options.max_unscored)
        adapter = self.inside.adapters[cell.subject.name] if settings["trained"] else None
        return speak(self.inside.speaker(adapter), portion, sampling)

    def _info(self, cell: Cell, journal: Path) -> Document:
        """Where the answers were given; of an endpoint also what it says of its model."""
        if "endpoint" not in cell.settings:
            return self.inside.speaker_info
        engine = self._remote.engine(self.remotes[cell.settings["name"]], journal)
        return {"engine": engine.name, "reported": engine.reported()}


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


STAGE = StudyStage(name="generate", plan=plan, make=GenerateWorker, needs=TRAINED, first=check)
