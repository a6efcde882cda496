"""From the question to cells: one a (subject, seed), each the whole of a training run with its
evaluations.

    plan = prepare(config, options)
    # one group a cell: a model is trained once from its own weights, and then is another model
    plan.groups
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from auditgap import models
from auditgap.audits.audit import Plan
from auditgap.audits.behaviour.plan import prompt_sets
from auditgap.audits.behaviour.rows import Split
from auditgap.audits.planning import (
    check_subject,
    outlines_of,
    scorers_of,
    settings_of,
    with_dtype,
)
from auditgap.audits.sft_curve.audit import CurveCell
from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions
from auditgap.data import PromptSet
from auditgap.data.ledger import LeakageLedger
from auditgap.errors import UsageError
from auditgap.sweep import Group
from auditgap.types import Cell

#: What stands in a cell's `attack`.
ATTACK = "sft_curve"
#: Of the config: what the training run is made of, and so part of each cell's key.
_RECIPE = (
    "data",
    "rows_limit",
    "refusal_filter",
    "method",
    "lr",
    "weight_decay",
    "warmup",
    "batch",
    "max_tokens",
    "steps",
    "eval_every",
    "eval_at",
)
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets")


@dataclass(frozen=True)
class CurvePlan(Plan):
    """The grid. `facts`: what else identifies the training (a digest of its rows, say); part of
    every cell's key."""

    config: SFTCurveConfig
    sets: dict[Split, PromptSet]
    outlines: tuple[models.Outline, ...]
    groups: tuple[Group, ...]
    scorers: dict[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    #: what is trained on and what is asked
    ledger: LeakageLedger = field(default_factory=LeakageLedger)

    def outline(self, cell: Cell) -> models.Outline:
        return next(o for o in self.outlines if o.subject.fingerprint == cell.subject.fingerprint)


def prepare(
    config: SFTCurveConfig, options: SFTCurveOptions, *, facts: Mapping[str, Any] | None = None
) -> CurvePlan:
    """The plan of the config, with `auto` resolved for this machine. Loads no weights.

    Raises UsageError or Refused for a model, prompt set or judge that cannot serve, and UsageError
    when two of the models have the same weights: a subject that is its own base would show a
    difference of 0 that nobody measured.
    """
    config = with_dtype(config, options.device)
    sets, outlines = prompt_sets(config), outlines_of(config.models, config.chat_template)
    if len(outlines) < len(config.models):
        raise UsageError(
            f"Two of the models {', '.join(config.models)} have the same weights. Name the base and"
            " subjects that differ from it."
        )
    scorers = scorers_of(config.judge, device=options.device)
    recipe = config.model_dump(
        mode="json", include={*_RECIPE, *(_LORA if config.method == "lora" else ())}
    )
    facts = dict(facts or {})
    groups = []
    for outline in outlines:
        check_subject(outline, chain.from_iterable(sets.values()))
        settings = {
            **settings_of(config, outline, scorers),
            "recipe": recipe,
            **({"training": facts} if facts else {}),
            **({"benign": sets["benign"].digest} if "benign" in sets else {}),
        }
        for seed in config.seeds:
            cell = CurveCell(
                outline.subject,
                None,
                None,
                ATTACK,
                sets["harmful"].digest,
                {**settings, "seed": seed},
            )
            groups.append(Group(str(cell), (cell,), work=float(len(config.evaluations))))
    return CurvePlan(config, sets, outlines, tuple(groups), scorers, facts)
