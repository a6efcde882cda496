"""Cards that have been measured, kept in the cache, so that they travel into every run at no cost.

    # [{"name": "builtin", "task": "harmful", "kappa": 0.63, …}, {… "task": "refusal", …}]
    cards_of("builtin")

Those of our own judges ride in the package. Any other is found by what made it: the judge's `describe()`, the gold rows, and the way of measuring.
A judge that is a language model or a plug-in is not measured on the side, which may take hours or
money: `auditgap judge eval NAME` puts its card here.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from auditgap import models
from auditgap.engines import Serving
from auditgap.errors import UsageError
from auditgap.judges import JUDGES, Judge, load_judge, members_of, scorer_named
from auditgap.judges.asking import INJECTIONS
from auditgap.judges.builtin import load_training, refitted
from auditgap.judges.card import VERSION, JudgeCard
from auditgap.judges.fitted import Fitted
from auditgap.judges.gold import GoldSet, load_gold, text_key
from auditgap.judges.harmless import harmless
from auditgap.judges.llm import LanguageModelJudge
from auditgap.judges.measuring import judge_card
from auditgap.store import files
from auditgap.sweep import Progress
from auditgap.types import digest

#: The gold sets whose cards go into a run, by what they correct.
TRAVELLING = ("pyrit-objective", "pyrit-refusal")
_PACKAGED = Path(__file__).with_name("cards")


def find(judge: Judge, gold: GoldSet) -> JudgeCard | None:
    """The judge's card on that gold set, if it was measured before; a file that is torn or of old
    counts as absent."""
    with suppress(UsageError):
        if (values := files.read_document(_path(judge, gold))) is not None:
            return JudgeCard.from_dict(values)
    return None


def keep(card: JudgeCard, judge: Judge, gold: GoldSet) -> None:
    """Put a card where `find` finds it. A cache that cannot be written costs only the next
    measurement."""
    path = _path(judge, gold)
    with suppress(files.DiskError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_document(path, card.to_dict())


def measure(
    judge: Judge,
    gold: GoldSet,
    *,
    inject: int | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> JudgeCard:
    """Measure a judge and keep its card; with `out` also write card.json and verdicts.jsonl (raw
    replies, mode 0600) there.

    What an endpoint has replied is kept in the cache until the card is made: after a kill the same
    call pays no reply twice. Raises UsageError as `judge_card` does and when `out` is a file,
    DiskError when it cannot be written.
    """
    if out is not None:  # before hours of judging, not after
        if out.exists() and not out.is_dir():
            raise UsageError(
                f"--out {out} is a file; a folder is wanted, for card.json and verdicts.jsonl."
                " Choose another name."
            )
        with files.disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
    said: list[dict[str, Any]] = []
    journals = _keep_replies(judge, gold)
    with progress or nullcontext():
        card = judge_card(judge, gold, inject=inject, progress=progress, said=said)
    keep(card, judge, gold)
    if out is not None:
        truth = [
            {
                "prompt": r.prompt_key,
                "response": r.response_key,
                gold.task: r.positive,
                "grade": r.grade,
            }
            for r in gold.rows
        ] + [
            {
                "prompt": text_key(exchange.prompt.text),
                "response": text_key(exchange.completion),
                "harmless": kind,
            }
            for kind, exchange in harmless()
        ]
        lines = [
            json.dumps({**truth[record.pop("row")], **record}, ensure_ascii=True) for record in said
        ]
        files.write_bytes(
            out / "verdicts.jsonl", ("\n".join(lines) + "\n").encode("ascii"), files.PRIVATE
        )
        files.write_document(out / "card.json", card.to_dict())
    shutil.rmtree(journals, ignore_errors=True)
    return card


def read(file: Path) -> JudgeCard:
    """The card in a card.json, or in the folder that holds one. Raises UsageError: none there, or
    of another version."""
    path = file / "card.json" if file.is_dir() else file
    values = files.read_document(path)
    if values is None:
        raise UsageError(
            f"{path} holds no judge card. Make one: auditgap judge eval builtin --gold"
            f" pyrit-objective --out {file}"
        )
    return JudgeCard.from_dict(values)


def cards_of(
    judge: str | Judge, *, device: str = "cpu", serving: Serving | None = None
) -> list[dict[str, Any]]:
    """A judge's cards for a run's report, in the order of TRAVELLING; those of gold sets that are
    not installed are left out.

    A served judge and a plug-in have only the cards that were made with `auditgap judge eval`.
    Raises UsageError as `load_judge` does.
    """
    made = load_judge(judge, device=device, serving=serving) if isinstance(judge, str) else judge
    cards = []
    for name in TRAVELLING:
        if (card := packaged(made, name)) is None:
            try:
                gold = load_gold(name)
            except UsageError:  # pyrit's data is not installed; the report says there is no card
                continue
            card = find(made, gold)
            if card is None and all(_is_cheap(judge) for judge in members_of(made) or (made,)):
                card = judge_card(made, gold, inject=0 if made.name.startswith("hf:") else None)
                keep(card, made, gold)
        if card is not None:
            cards.append(card.to_dict())
    return cards


def packaged(judge: Judge, gold: str) -> JudgeCard | None:
    """The card that rides in the package, of a judge of our own that is what it was then."""
    with suppress(UsageError):
        if (values := files.read_document(_PACKAGED / f"{judge.name}-{gold}.json")) is not None:
            card = JudgeCard.from_dict(values)
            return card if card.identity == judge.describe() else None
    return None


def refit() -> None:
    """Fit the built-in judge and measure the packaged cards again, into the package. Needs pyrit's
    data."""
    refitted(load_training().rows).save()
    Fitted.load.cache_clear()
    for name, line in JUDGES.items():
        if line.served or line.opens or members_of(judge := load_judge(name)):
            continue
        for gold in TRAVELLING:
            card = judge_card(judge, load_gold(gold))
            files.write_document(_PACKAGED / f"{name}-{gold}.json", card.to_dict())


def _is_cheap(judge: Judge) -> bool:
    """A judge of our own that is no served language model is measured when its card is wanted."""
    line = scorer_named(JUDGES, judge.name)
    return line is not None and not line.served


def _keep_replies(judge: Judge, gold: GoldSet) -> Path:
    """Have each judge at an endpoint keep its replies in a folder of the cache, where that can be
    written."""
    folder = _path(judge, gold).with_suffix("")
    for one in (judge, *members_of(judge)):
        if isinstance(one, LanguageModelJudge) and one.serving.engine == "openai":
            with suppress(OSError):
                folder.mkdir(mode=files.PRIVATE_FOLDER, parents=True, exist_ok=True)
                one.journal = folder / f"{digest(one.describe())}.jsonl"
    return folder


def _path(judge: Judge, gold: GoldSet) -> Path:
    tried = [[kind, e.prompt.text, e.completion] for kind, e in harmless()]
    key = digest([VERSION, judge.name, judge.describe(), gold.digest, dict(INJECTIONS), tried])
    return models.cache_dir() / "cards" / f"{key}.json"
