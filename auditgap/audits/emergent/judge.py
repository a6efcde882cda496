"""`em judge`: what was answered is rated, by one judge a call; nothing is asked of a subject again,
and several judges may rate.

    store, outcome = STAGE.run_in("runs/em", EmergentOptions(judge="alignment=Qwen/Qwen2.5-7B-Instruct"))
    rows = store.rows([JUDGED])                              # RatingRows
    rows[rows.judge_id == judge_id]                          # of one judge

A cell is one subject's answers and one judge (its whole `describe()`), so that another judge,
template or model makes other cells beside the first one's. The judge reads a prompt as it was
asked, trigger and all. Ratings are remembered in portions, and what an endpoint has replied is kept
as it comes: no reply is paid for twice. The judge's own words stand in generations/ (mode 0600)
alone.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.rows import ANSWERED, JUDGED, UNSCORED, RatingRow
from auditgap.audits.emergent.stage import CellWorker, StageCell, Study, StudyStage
from auditgap.engines.openai.batches import check_none_waits, record_of
from auditgap.errors import AuditgapError
from auditgap.judges import Judge
from auditgap.judges.alignment import Rated, Rater
from auditgap.judges.card_cache import cards_of
from auditgap.judges.llm import LanguageModelJudge
from auditgap.models.provenance import provenance
from auditgap.store import RunFolder, files
from auditgap.sweep import Group
from auditgap.types import Cell, Document, Exchange, Prompt, Subject, digest

#: Answers rated in one go and remembered together; a language model is asked about each twice.
PORTION = 128
#: An answer that is to be rated (None: there is none) and what its row says beside the rating:
#: subject, domain, arm, seed,
#: prompt_id, kind, triggered, draw; of a steered one source, steer, strength, block; `unscored`:
#: why there is no answer.
Answer = tuple[Exchange | None, Mapping[str, Any]]


def plan(study: Study, options: EmergentOptions) -> list[Group]:
    """A group a subject's answers; its work is counted in answers. Raises UsageError: no such
    judge, nothing answered yet."""
    rater = options.rater()
    judge = rater.describe()
    if not options.judge_batch:
        check_none_waits(_batched(study.store, judge))
    groups = []
    for record in study.need(ANSWERED):
        told = record["description"]["settings"]
        subject = Subject(told["name"], record["description"]["subject"])
        settings = {
            "name": f"{told['name']} by {rater.name}",
            "answers": record["key"],
            "judge_name": rater.name,
            "judge": judge,
        }
        cell = StageCell(subject, None, None, JUDGED, record["description"]["prompts"], settings)
        groups.append(Group(str(cell), (cell,), work=float(record["n_rows"])))
    if options.judge_batch and groups:  # one batch has the answers of all
        cells = tuple(cell for group in groups for cell in group.cells)
        return [Group("judge", cells, work=sum(group.work for group in groups))]
    return groups


def note_cards(study: Study, options: EmergentOptions) -> None:
    """Note in run.json what the judge's cards say, beside those of the judges before it. Raises
    UsageError as `plan` does."""
    plan(study, options)  # nothing is noted of a judge who has nothing to rate
    rater = options.rater()
    cards = cards_of(rater) if isinstance(rater, Judge) else []
    known = [
        card
        for card in study.store.run["info"].get("judge_cards", [])
        if card["name"] != rater.name
    ]
    now = {
        key: value
        for key, value in provenance([], dtype="").items()
        if key in ("command", "versions")
    }
    RunFolder.open(
        study.store.place,
        config=study.store.run["config"],
        info={**now, "judge_cards": [*known, *cards]},
        break_lock=options.break_lock,
    )


class JudgeWorker(CellWorker):
    """Rates the answers of one group after another, with one rater. `folder`: of the study, by
    name."""

    def __init__(self, folder: str, options: EmergentOptions) -> None:
        self.store, self.options = RunFolder.load(folder), options
        self.rater = options.rater()

    def close(self) -> None:
        """Let go of the judge's model; a further group opens it again."""
        self.rater.close()

    def run(self, group: Group, tick: Callable[[float], None]) -> None:
        """As every worker's; what goes in batches is asked first, the answers of all cells at
        once."""
        pending = [cell for cell in group.cells if not self.store.is_finished(cell.key)]
        if self.options.judge_batch and pending:
            self._at_once(pending)
        super().run(group, tick)

    def _at_once(self, cells: Sequence[Cell]) -> None:
        """Rate the cells' answers in one call, and remember each cell's portions."""
        journal = _batched(self.store, cells[0].settings["judge"])
        keep_replies(self.rater, journal)
        answers = [stored_answers(self.store, cell.settings["answers"]) for cell in cells]
        whole = [answer for some in answers for answer in some]
        rated = iter(rate(self.rater, whole, max_unscored=self.options.max_unscored))
        for cell, some in zip(cells, answers, strict=True):
            for name, portion in _portions(cell, some):
                ratings = [next(rated) for _ in portion]
                self.store.remember(name, lambda ratings=ratings: _arrays(ratings))

    def _run(self, cell: Cell, tick: Callable[[float], None]) -> None:
        started = time.monotonic()
        journal = self.store.journals / f"{cell.key}.jsonl"
        keep_replies(self.rater, journal)
        answers = stored_answers(self.store, cell.settings["answers"])
        portions = _portions(cell, answers)
        rated: list[Rated] = []
        for name, portion in portions:
            rated += _ratings_of(
                self.store.remember(
                    name,
                    lambda portion=portion: _arrays(
                        rate(self.rater, portion, max_unscored=self.options.max_unscored)
                    ),
                )
            )
            tick(float(len(portion)))
        # not made anew: that would read the judge's weights
        judge_id = digest(cell.settings["judge"])
        rows = [
            row_of(self.rater.name, judge_id, facts, one)
            for (_, facts), one in zip(answers, rated, strict=True)
        ]
        texts = [
            {
                "prompt_id": facts["prompt_id"],
                "triggered": facts["triggered"],
                "draw": facts["draw"],
                "reply_alignment": one.raw[0],
                "reply_coherence": one.raw[1],
            }
            for (_, facts), one in zip(answers, rated, strict=True)
        ]
        info = (
            {"engine": self.options.judge_serving.engine} if isinstance(self.rater, Judge) else {}
        )
        self.store.write(
            cell, rows, generations=texts, seconds=time.monotonic() - started, info=info
        )
        self.store.forget(name for name, _ in portions)
        files.remove(journal)


def _batched(store: RunFolder, judge: Document) -> Path:
    """Where a judge's replies are kept that came in batches."""
    return store.journals / f"batches-{digest(judge)}.jsonl"


def _portions(cell: Cell, answers: Sequence[Answer]) -> list[tuple[str, Sequence[Answer]]]:
    """What is rated in one go, and the name that it is remembered by."""
    starts = range(0, len(answers), PORTION)
    return [
        (digest([JUDGED, cell.key, i]), answers[at : at + PORTION]) for i, at in enumerate(starts)
    ]


class JudgeStage(StudyStage):
    """Its batches' answers are kept until all that they are of is rated, in whatever way."""

    def finish(self, store: RunFolder, cells: Sequence[Cell]) -> None:
        super().finish(store, cells)
        if all(store.is_finished(cell.key) for cell in cells):
            for journal in {_batched(store, cell.settings["judge"]) for cell in cells}:
                files.remove(journal)
                files.remove(record_of(journal))


STAGE = JudgeStage(name="judge", plan=plan, make=JudgeWorker, first=note_cards)


def stored_answers(store: RunFolder, key: str) -> list[Answer]:
    """The answers of a finished `em_generate` cell, in the order of its rows. Raises UsageError
    where they are torn."""
    rows = store.cell_rows(key).astype(object)
    texts = store.generations(key)
    facts = (
        "subject",
        "domain",
        "arm",
        "seed",
        "prompt_id",
        "kind",
        "triggered",
        "draw",
        "unscored",
    )
    found: list[Answer] = []
    for row, prompt, completion in zip(
        rows.where(rows.notna(), None).to_dict("records"),
        texts["prompt"],
        texts["completion"],
        strict=True,
    ):
        exchange = None if row["unscored"] else Exchange(Prompt(prompt, row["kind"]), completion)
        # a column with a null holds floats
        seed = None if row["seed"] is None else int(row["seed"])
        found.append((exchange, {**{name: row[name] for name in facts}, "seed": seed}))
    return found


# -- rating, for whoever has answers
# ------------------------------------------------------------------------------------


@contextmanager
def opened_rater(options: EmergentOptions, journal: Path | None = None) -> Iterator[Rater]:
    """The rater that the options name, whose model is let go of at the end. `journal`: where an
    endpoint's replies are kept."""
    rater = options.rater()
    if journal is not None:
        keep_replies(rater, journal)
    try:
        yield rater
    finally:
        rater.close()


def keep_replies(rater: Rater, journal: Path) -> None:
    """Have an endpoint's replies kept in that file as they come; one process writes it at a
    time."""
    if isinstance(rater, LanguageModelJudge) and rater.serving.engine == "openai":
        rater.close()  # an engine keeps the journal that it was opened with
        rater.journal = journal


def rate_answers(
    rater: Rater, answers: Sequence[Answer], *, max_unscored: float = 1.0
) -> list[RatingRow]:
    """A row an answer, in order. Raises AuditgapError as `rate`."""
    rated, judge_id = rate(rater, answers, max_unscored=max_unscored), digest(rater.describe())
    return [
        row_of(rater.name, judge_id, facts, one)
        for (_, facts), one in zip(answers, rated, strict=True)
    ]


def rate(rater: Rater, answers: Sequence[Answer], *, max_unscored: float = 1.0) -> list[Rated]:
    """A rating an answer, in order; what was never answered is not put to the rater.

    Raises AuditgapError when its endpoint left more than the share `max_unscored` of them without a
    reply: it is better asked another time.
    """
    said = iter(rater.rate([exchange for exchange, _ in answers if exchange is not None]))
    rated = [
        (
            Rated(UNSCORED, reason=facts.get("unscored") or "no answer")
            if exchange is None
            else next(said)
        )
        for exchange, facts in answers
    ]
    faults = [one.reason for one in rated if one.lost]
    if len(faults) > max_unscored * len(rated):
        raise AuditgapError(
            f"The judge's endpoint gave no reply on {len(faults)} of {len(rated)} answers"
            f" ({Counter(faults).most_common(1)[0][0]}). Those that it gave are kept; type the same"
            " command again with --set retry_failed=true when it is well."
        )
    return rated


_OF_A_ROW = frozenset(field.name for field in fields(RatingRow))
_OF_A_RATING = tuple(field.name for field in fields(Rated) if field.name in _OF_A_ROW)


def row_of(judge: str, judge_id: str, facts: Mapping[str, Any], rated: Rated) -> RatingRow:
    """The row of one rating."""
    told = {name: value for name, value in facts.items() if name in _OF_A_ROW}
    given = {name: getattr(rated, name) for name in _OF_A_RATING}
    return RatingRow(**told, judge=judge, judge_id=judge_id, **given)


def _arrays(rated: Sequence[Rated]) -> dict[str, np.ndarray]:
    """As plain arrays that `RunFolder.remember` can keep."""
    lines = [json.dumps(asdict(one), ensure_ascii=True).encode("ascii") for one in rated]
    return {"rated": np.frombuffer(b"\n".join(lines), dtype=np.uint8)}


def _ratings_of(arrays: Mapping[str, np.ndarray]) -> list[Rated]:
    """The inverse of `_arrays`."""
    lines = arrays["rated"].tobytes().split(b"\n") if len(arrays["rated"]) else []
    return [Rated(**{**values, "raw": tuple(values["raw"])}) for values in map(json.loads, lines)]
