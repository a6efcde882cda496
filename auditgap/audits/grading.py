"""Judge again what a run has stored: its texts go to a judge, and new rows into a folder of their
own, without a model being asked.

    new = grade_again(BEHAVIOUR, "runs/behaviour", Grading(judge="keyword"))
    new.path                        # runs/behaviour/grades/keyword

The audit says which cells have text and what a verdict makes of a row (`Audit.graded`); everything
else is the same for all of them. The same call again resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from auditgap import models
from auditgap.audits.behaviour.answers import Answers, joined
from auditgap.audits.behaviour.measure import Opinion, judged
from auditgap.audits.behaviour.worker import closing_judge
from auditgap.audits.excerpt import EMPTY, Excerpt, Other, scores
from auditgap.errors import UsageError
from auditgap.judges import Judge, Reward, load_reward, members_of
from auditgap.judges.card_cache import cards_of
from auditgap.models.provenance import command
from auditgap.store import RunFolder, files
from auditgap.store.remote import Place, local
from auditgap.store.tables import rows_of
from auditgap.types import Budget, Cell, Document, Exchange, Prompt, Score, Site, Subject

if TYPE_CHECKING:
    from auditgap.audits.audit import Audit, Grading


@dataclass(frozen=True)
class Stored:
    """A finished cell of the old run, and the same cell with the new judge."""

    old: RunFolder
    record: Document
    cell: Cell
    names: Mapping[str, str]  #: of the run's models, by fingerprint

    @cached_property
    def rows(self) -> list[Document]:
        return rows_of(self.old.cell_rows(self.record["key"]), plain=True)

    @cached_property
    def texts(self) -> list[Document]:
        return rows_of(self.old.generations(self.record["key"]), plain=True)

    @cached_property
    def others(self) -> dict[tuple[int, Other], str]:
        """The texts' other readings, by number and name: see `Excerpt`."""
        return {
            (i, name): other
            for i, text in enumerate(self.texts)
            for name, other in Excerpt.stored(text).others(text["completion"]).items()
        }

    @property
    def readings(self) -> list[Document]:
        """The texts as they are judged, and after them `others`."""
        judged = [
            {**text, "completion": Excerpt.stored(text).judged(text["completion"])}
            for text in self.texts
        ]
        return judged + [{**self.texts[i], "completion": o} for (i, _), o in self.others.items()]

    @property
    def prompts(self) -> list[Prompt]:
        """One a reading."""
        return [Prompt(text["prompt"], text.get("source") or "") for text in self.readings]

    @property
    def answers(self) -> Answers:
        """What was said to them; where nothing is left of a text, nobody is asked. Half a text is a
        reading of its own here."""
        return Answers.told(
            {"problem": "" if text["completion"].strip() else EMPTY, **text, "half": None}
            for text in self.readings
        )


@dataclass(frozen=True)
class Given:
    """What judge and reward say of a cell's texts, one a reading of `Stored`: the texts first; None:
    that was not asked. `others`: which of them is another reading, by text and name."""

    opinions: Sequence[Opinion] | None
    scores: Sequence[Score] | None
    others: Mapping[tuple[int, Other], int] = field(default_factory=dict)


def grade_again(audit: Audit[Any, Any, Any], folder: Place, grading: Grading) -> RunFolder:
    """The new folder, in DIR/grades/.

    Raises UsageError: nobody to grade it, no such judge, no texts; AuditgapError when the judge's
    endpoint left more than `grading.max_unscored` of the answers at hand without a reply.
    """
    audit.check_grading(folder, grading)
    old = RunFolder.load(folder)
    name = "+".join(safe_name(who) for who in (grading.judge, grading.reward) if who)
    place = old.at("grades", name)
    journals = local(place) / "scratch" / "journals"
    with _opened(grading, journals) as (judge, reward):
        new = _folder(audit, old, place, grading, judge, reward)
        scorers = new.run["config"]["scorers"]
        with new.lock():
            stored = _cells(audit, old, scorers)
            new.plan([one.cell for one in stored])
            left = [one for one in stored if not new.is_finished(one.cell.key)]
            # an ensemble opens one judge after the other at every call, so all is put to it at once
            at_once = judge is not None and members_of(judge)
            for some in filter(None, [left] if at_once else [[one] for one in left]):
                for one, given in _given(some, judge, reward, grading):
                    info = {**one.record.get("info", {}), "graded_from": one.record["key"]}
                    new.write(one.cell, audit.graded(one, given, new), seconds=0.0, info=info)
            files.remove(journals)
            audit.reduce(new)
    return new


@contextmanager
def _opened(grading: Grading, journals: Any) -> Iterator[tuple[Judge | None, Reward | None]]:
    device = models.pick_device(grading.device)
    reward = None if grading.reward is None else load_reward(grading.reward, device=device)
    if grading.judge is None:
        yield None, reward
        return
    with closing_judge(grading.judge, grading.serving, journals) as judge:
        yield judge, reward


def _folder(
    audit: Audit[Any, Any, Any],
    old: RunFolder,
    place: Place,
    grading: Grading,
    judge: Judge | None,
    reward: Reward | None,
) -> RunFolder:
    config, info, serving = old.run["config"], old.run["info"], grading.serving
    made = {"judge": judge, "reward": reward}
    scorers = {
        **config["scorers"],
        **{what: who.describe() for what, who in made.items() if who is not None},
    }
    named: Document = {
        what: getattr(grading, what) for what, who in made.items() if who is not None
    }
    if "judge_endpoint" in config:
        by_endpoint = serving is not None and serving.engine == "openai"
        named["judge_endpoint"] = serving.base_url if serving and by_endpoint else None
    cards = info.get("judge_cards", []) if judge is None else cards_of(judge)
    return RunFolder.open(
        place,
        config={**config, "scorers": scorers, **named, **audit.not_graded},
        info={**info, "judge_cards": cards, "command": command()},
    )


def _cells(audit: Audit[Any, Any, Any], old: RunFolder, scorers: Mapping[str, Any]) -> list[Stored]:
    """The cells that are judged, in the order in which they are written."""
    names: dict[str, str] = {}
    for subject in old.run["info"]["subjects"]:
        names.setdefault(subject["fingerprint"], subject["name"])
    found = []
    for record in old.records():
        told = record["description"]
        order = audit.grading_order(told)
        if order is None or not record.get("generations"):
            continue
        cell = audit.cell(
            Subject(names[told["subject"]], told["subject"]),
            None if told["site"] is None else Site(told["site"]),
            None if told["eps"] is None else Budget(told["eps"], told["unit"]),
            told["attack"],
            told["prompts"],
            {**told["settings"], **scorers},
        )
        found.append((order, Stored(old, record, cell, names)))
    if not found:
        raise UsageError(f"{old.place} has no finished cell with text; there is nothing to judge.")
    return [stored for _, stored in sorted(found, key=lambda pair: pair[0])]


def _given(
    some: Sequence[Stored], judge: Judge | None, reward: Reward | None, grading: Grading
) -> Iterator[tuple[Stored, Given]]:
    """What is said of each cell; all of them are put to the judge in one call."""
    answers, prompts = [one.answers for one in some], [one.prompts for one in some]
    flat = [prompt for of_one in prompts for prompt in of_one]
    opinions = None
    if judge is not None:
        opinions = iter(judged(joined(answers), flat, judge, max_unscored=grading.max_unscored))
    for one, said, asked in zip(some, answers, prompts, strict=True):
        mine = None if opinions is None else [next(opinions) for _ in asked]
        exchanges = [Exchange(p, text) for p, text in zip(asked, said.texts, strict=True)]
        places = {key: len(one.texts) + i for i, key in enumerate(one.others)}
        yield one, Given(mine, None if reward is None else scores(reward, exchanges), places)


def safe_name(name: str) -> str:
    """A judge's name as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name).strip(".")[:80] or "judge"
