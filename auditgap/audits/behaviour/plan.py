"""From the question to cells: one a (subject, source, kind), all of a subject's in one group, so
that it is loaded once.

    plan = prepare(config, options)
    plan.cells[0].settings["source"]        # 'harmbench'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auditgap import models
from auditgap.audits.audit import Plan
from auditgap.audits.behaviour.audit import AskCell
from auditgap.audits.behaviour.config import BehaviourConfig, BehaviourOptions
from auditgap.audits.behaviour.rows import Split
from auditgap.audits.planning import (
    check_subject,
    outlines_of,
    scorers_of,
    settings_of,
    thought,
    with_dtype,
)
from auditgap.data import PromptSet, load_prompts
from auditgap.data.ledger import FITTED, LeakageLedger, prompt_hash
from auditgap.data.suite import Suite, load_suite
from auditgap.engines import served_packed
from auditgap.errors import UsageError
from auditgap.sweep import Group
from auditgap.types import Cell, Prompt, Subject, digest

#: What stands in a cell's `attack`: nothing is attacked, the subject is only asked.
ATTACK = "behaviour"


@dataclass(frozen=True)
class BehaviourPlan(Plan):
    """The suite in portions by (source, kind), the subjects, and a group a subject with a cell a
    portion.

    `outlines` has the subjects whose weights are here; behind an endpoint there are none.
    """

    config: BehaviourConfig
    suite: Suite
    portions: Mapping[tuple[str, str], tuple[Prompt, ...]]
    subjects: tuple[Subject, ...]
    outlines: tuple[models.Outline, ...]
    groups: tuple[Group, ...]
    scorers: dict[str, Any]
    warnings: tuple[str, ...] = ()  #: overlaps of suite and training that were allowed

    def prompts(self, cell: Cell) -> tuple[Prompt, ...]:
        return self.portions[cell.settings["source"], cell.settings["kind"]]


def prepare(config: BehaviourConfig, options: BehaviourOptions) -> BehaviourPlan:
    """The plan of the config, with `auto` resolved for this machine. Loads no weights.

    Raises UsageError or Refused; also where a subject was trained on prompts of the suite, unless
    that is allowed.
    """
    if options.engine != "openai":  # this machine's dtype has no part in what an endpoint answers
        config = with_dtype(config, options.device)
    suite = load_suite(config.suite, limit_per_source=config.limit, seed=config.seed)
    portions = {key: tuple(some) for key, some in _portions(suite).items()}
    # a smaller window leaves long prompts unasked, and has judges read less of long answers
    window = {} if config.max_model_len is None else {"max_model_len": config.max_model_len}
    serving = options.judge_serving(config)
    scorers = {**scorers_of(config.judge, device=options.device, serving=serving), **window}
    outlines: tuple[models.Outline, ...] = ()
    if options.engine == "openai":
        if config.thinking != "auto":
            raise UsageError(
                "--thinking is told to a chat template, and an endpoint keeps its own; leave it out,"
                " and give --thinking-tokens for what its models think."
            )
        served = options.serving(config)
        subjects = [
            Subject(name, digest(served.describe(name))) for name in dict.fromkeys(config.models)
        ]
        chain = config.thinking_tokens
        thinks = {} if chain is None else {"thinking": {"tokens": chain}}
        of_each = [{"max_new_tokens": config.max_new_tokens, **thinks, **scorers}] * len(subjects)
    else:
        outlines = outlines_of(config.models, config.chat_template, thinking=config.thinking)
        for outline in outlines:
            check_subject(outline, suite, opens=options.engine == "hf")
        subjects = [o.subject for o in outlines]
        of_each = [
            {
                **settings_of(config, o, scorers),
                **thought(config, o),
                **(served_packed(o) if options.engine == "vllm" else {}),
            }
            for o in outlines
        ]
    overlaps = _overlaps(suite, outlines)
    if overlaps and not options.allow_overlap:
        raise UsageError(
            f"{' '.join(overlaps)} Leave those sources out of --suite, or go on with --set"
            " allow_overlap=true, which is recorded."
        )
    groups = []
    for subject, settings in zip(subjects, of_each, strict=True):
        cells = tuple(
            AskCell(
                subject,
                None,
                None,
                ATTACK,
                digest([p.id for p in prompts]),
                {**settings, "source": source, "kind": kind},
            )
            for (source, kind), prompts in portions.items()
        )
        # each is answered and judged
        groups.append(Group(subject.name, cells, work=2.0 * len(suite)))
    return BehaviourPlan(
        config, suite, portions, tuple(subjects), outlines, tuple(groups), scorers, overlaps
    )


def _overlaps(suite: Suite, outlines: Sequence[models.Outline]) -> tuple[str, ...]:
    """A sentence a subject whose training's ledger, which lies beside its weights, holds prompts of
    the suite."""
    said = []
    for outline in outlines:
        file = outline.folder / "ledger.json"
        if not file.is_file():
            continue
        roles = LeakageLedger.load(file).roles
        fitted = {p.id: roles.get(prompt_hash(p.text), set()) & set(FITTED) for p in suite}
        shared = [p for p in suite if fitted[p.id]]
        if shared:
            sources = ", ".join(
                f"{source}: {n}" for source, n in Counter(p.source for p in shared).items()
            )
            used = ", ".join(sorted(set().union(*fitted.values())))
            said.append(
                f"{len(shared)} of the suite's {len(suite)} prompts ({sources}) were used to train"
                f" {outline.subject.name} ({used})."
            )
    return tuple(said)


def _portions(suite: Suite) -> dict[tuple[str, str], list[Prompt]]:
    found: dict[tuple[str, str], list[Prompt]] = {}
    for prompt in suite:
        found.setdefault((prompt.source, suite.kind(prompt)), []).append(prompt)
    return found


def prompt_sets(config: Any) -> dict[Split, PromptSet]:
    """The prompt sets that an `Asking` names, by split."""
    sets: dict[Split, PromptSet] = {
        "harmful": load_prompts(
            config.prompts, limit=config.limit, seed=config.seed, column=config.column
        )
    }
    if config.benign is not None:
        sets["benign"] = load_prompts(
            config.benign, limit=config.benign_limit, seed=config.seed, column=config.column
        )
    return sets
