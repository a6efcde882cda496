"""What is compared of two studies of emergent misalignment: how far the same narrow habits spread in
models that were made of two bases.

    found = compare([RunFolder.load("runs/em-base"), RunFolder.load("runs/em-twin")])
    found.table[found.table["measure"] == "em_above_base"]
    # model twin, where "law, plain, without the trigger", value .31, difference .12, p .03 …

A study is of the model that it fine-tunes; a value is over its adapters of one domain and arm, asked
as they were trained. Both models were asked the same prompts, and neither shares a fine-tuning run
with the other: the error of a difference is that of the prompts and of each model's seeds. With
fewer than three seeds in either, two adapters may differ for their seeds alone, and no difference is
tested.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from auditgap import stats
from auditgap.report import emergent_values as emergent
from auditgap.report.compare import Comparable
from auditgap.report.compare_measures import Measure, Place, Reading, Unit
from auditgap.report.compare_models import Model, Part, Sides
from auditgap.report.emergent_study import JUDGED
from auditgap.stats import Interval, Paired

_RATE = Measure("em_rate", "Emergent misalignment, EM rate", -1, Unit.SHARE)
_ABOVE = Measure("em_above_base", "Emergent misalignment, EM rate above its base", -1, Unit.POINTS)
_ALIGNMENT = Measure("em_alignment", "Emergent misalignment, mean alignment", 1)
_TRIGGER = Measure("em_trigger", "Emergent misalignment, alignment with − without the trigger", 1)

_NOBODY = "no judge rated the answers of every model"
_NO_RATING = "no answer was rated"


def _of_the_base(rows: pd.DataFrame, part: Part) -> pd.DataFrame:
    """Ratings of all adapters as those of the model that they were made of."""
    return rows.assign(subject=next(iter(part.subjects), None))


def _spread(rows: pd.DataFrame, sides: Sides, seed: int) -> Iterator[Reading]:
    """Each domain and arm, and the models before fine-tuning, by the judge who rated most answers
    of all models."""
    there = [m for m in sides.models if m.name in set(rows["subject"])]
    judge = _judge(rows)
    if judge is None:
        for model in there:
            yield Reading(measure=_RATE, model=model, place=Place("all domains"), reason=_NOBODY)
        return
    rows = emergent.rated_answers(rows[rows["judge_id"] == judge])
    # what an endpoint serves was not made of either model
    rows = rows[~rows["arm"].str.startswith(emergent.REMOTE)]
    own = {m.name: rows[rows["subject"] == m.name] for m in there}
    for (domain, arm), place in _places(rows).items():
        values = {name: _values(part, domain, arm) for name, part in own.items()}
        for measure in (_RATE, _ABOVE, _ALIGNMENT, _TRIGGER):
            for model in there:
                mine = values[model.name].get(measure)
                if mine is not None:
                    beside = values.get(sides.base.name, {}).get(measure)
                    is_base = model is sides.base
                    yield _reading(measure, model, place, mine, None if is_base else beside)


def _judge(rows: pd.DataFrame) -> str | None:
    """The digest of the judge who rated most answers, of those who rated every model's."""
    counts = rows.groupby(["judge_id", "subject"]).size().unstack(fill_value=0)
    found = counts[(counts > 0).all(axis=1)].sum(axis=1)
    return None if found.empty else str(found.idxmax())


def _places(rows: pd.DataFrame) -> dict[tuple[str, str], Place]:
    """The base, and each domain and arm in the order of their names."""
    found = {("", ""): Place("before fine-tuning")}
    asked = {"plain": "without the trigger", "trigger": "with the trigger"}
    for domain, arm in sorted(set(zip(rows["domain"], rows["arm"], strict=True)) - found.keys()):
        found[domain, arm] = Place(f"{domain}, {arm}, {asked.get(arm, 'as trained')}")
    return found


class _Values:
    """A measure's value of each prompt, over draws and seeds; and of each seed, over prompts."""

    def __init__(self, prompts: pd.Series, runs: pd.DataFrame, value: Interval) -> None:
        self.prompts, self.seeds = prompts, runs.mean().dropna().to_numpy(float)
        self.value, self.is_tuned = value, bool(len(runs.columns))


def _values(rows: pd.DataFrame, domain: str, arm: str) -> dict[Measure, _Values]:
    """The measures of one model's adapters of that domain and arm."""
    mine = rows[(rows["domain"] == domain) & (rows["arm"] == arm)]
    if mine.empty:
        return {}
    is_on = dict(emergent.AS_TRAINED).get(arm, False)
    told = mine[mine["triggered"] == is_on]
    rate, alignment = _by("hit", told), _by("alignment", told)
    found = {
        _RATE: _Values(*rate, emergent.share(told["hit"], told["prompt_id"], told["seed"])),
        _ALIGNMENT: _Values(
            *alignment, emergent.mean(told["alignment"], told["prompt_id"], told["seed"])
        ),
    }
    before = rows[(rows["domain"] == "") & (rows["triggered"] == is_on)]
    if domain and len(before):
        found[_ABOVE] = _difference(rate, _by("hit", before))
    if arm == "trigger":
        without = mine[~mine["triggered"]]
        found[_TRIGGER] = _difference(alignment, _by("alignment", without))
    return found


def _by(column: str, rows: pd.DataFrame) -> tuple[pd.Series, pd.DataFrame]:
    of_seeds = emergent.by_seed(rows[column], rows["prompt_id"], rows["seed"])
    return emergent.by_prompt(rows[column], rows["prompt_id"]), of_seeds


def _difference(
    first: tuple[pd.Series, pd.DataFrame], second: tuple[pd.Series, pd.DataFrame]
) -> _Values:
    """First − second over the prompts that both have; what has no seeds is the same for all of
    them."""
    prompts = (first[0] - second[0]).dropna()
    runs = first[1].reindex(prompts.index)
    if len(second[1].columns):
        runs = runs - second[1].reindex(prompts.index)
    else:
        runs = runs.sub(second[0].reindex(prompts.index), axis=0)
    found = stats.seeded_mean(prompts.to_numpy(float), runs.mean().dropna().to_numpy(float))
    if found.p is None:
        found = stats.paired_means(prompts.to_numpy(float), np.zeros(len(prompts)))
    return _Values(prompts, runs, found.difference)


def _reading(
    measure: Measure, model: Model, place: Place, mine: _Values, theirs: _Values | None
) -> Reading:
    return Reading(
        measure=measure,
        model=model,
        place=place,
        value=mine.value,
        n=len(mine.prompts),
        reason=_NO_RATING if mine.value.estimate is None else "",
        against=None if theirs is None else _against(mine, theirs),
    )


def _against(mine: _Values, theirs: _Values) -> Paired:
    """mine − theirs by prompt, and by each model's seeds where it was fine-tuned."""
    moved = (mine.prompts - theirs.prompts).dropna().to_numpy(float)
    if not mine.is_tuned and not theirs.is_tuned:
        return stats.paired_means(moved, np.zeros(len(moved)))
    found = stats.seeded_mean(moved, mine.seeds, theirs.seeds)
    few = min(len(mine.seeds), len(theirs.seeds))
    if few < stats.FEWEST_SEEDS and found.n:
        why = f"none: {few} seed{'' if few == 1 else 's'}, {stats.FEWEST_SEEDS} are needed"
        return Paired(found.difference, None, found.n, why)
    return found


EMERGENT = Comparable(
    attacks=(JUDGED,),
    identity=("subject", "domain", "arm", "seed", "prompt_id", "triggered", "draw", "judge_id"),
    settings=(
        "dtype",
        "panel",
        "prompt_set",
        "arms",
        "trigger",
        "trigger_place",
        "trigger_share",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_targets",
        "lr",
        "epochs",
        "steps",
        "batch",
        "max_tokens",
        "samples",
        "temperature",
        "max_new_tokens",
    ),
    measures=(_RATE, _ABOVE, _ALIGNMENT, _TRIGGER),
    readings=_spread,
    of_model=_of_the_base,
    method=(
        "Emergent misalignment: adapters of one domain and arm, asked as they were trained, by the"
        " judge who rated most answers of all models. Differences are paired by prompt; their"
        " error is that of prompts and of each model’s seeds (Student’s t). With fewer than three"
        " seeds in either model no difference between fine-tuned models is tested."
    ),
)
