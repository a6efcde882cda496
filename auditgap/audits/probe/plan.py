"""From a probe audit's question to cells: one a model, the base's first.

plan = make_plan(config)
plan.fit_rows                       # of plan.examples: what the probe is fitted on
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from auditgap import models
from auditgap.audits.audit import Plan
from auditgap.audits.probe.audit import ProbeCell
from auditgap.audits.probe.config import FitConfig, ProbeConfig
from auditgap.audits.probe.rows import (
    ProbeExample,
    examples,
    set_aside,
)
from auditgap.data.ledger import LeakageLedger
from auditgap.data.triples import TripleSet, load_triples
from auditgap.errors import UsageError
from auditgap.models.provenance import provenance
from auditgap.report import probe
from auditgap.sweep import Group
from auditgap.types import Document, digest

#: Fewer prompts than this cannot be split three ways.
FEWEST = 5
#: The leakage ledger's name, in a run folder and beside a trained model's weights.
LEDGER = "ledger.json"


@dataclass(frozen=True, eq=False)
class ProbePlan(Plan):
    """The base and its subjects, and the answers that they are read on."""

    config: ProbeConfig
    triples: TripleSet
    outlines: tuple[models.Outline, ...]  #: the base's first
    examples: tuple[ProbeExample, ...]  #: as the base writes them
    fit_rows: np.ndarray  #: of the examples: for the probe, its epoch and its calibration
    evaluation_rows: np.ndarray
    groups: tuple[Group, ...]  #: one cell each, the base's first
    #: which prompts the probe was fitted to and which it is read on, with what the subjects' own
    #: ledgers say
    ledger: LeakageLedger

    @property
    def base(self) -> models.Outline:
        return self.outlines[0]

    @property
    def subjects(self) -> tuple[models.Outline, ...]:
        return self.outlines[1:]

    @property
    def passes(self) -> tuple[tuple[Group, ...], ...]:
        """The probe is fitted on the base before it is read on the subjects."""
        return self.groups[:1], self.groups[1:]


def make_plan(config: ProbeConfig, *, allow_overlap: bool = False) -> ProbePlan:
    """Resolve every name of the config. Loads no weights.

    Raises UsageError for models that cannot be compared, triples that are too few, and (unless
    `allow_overlap`) evaluation prompts that a subject was trained on, as far as a `ledger.json` in
    its folder says.
    """
    triples = load_triples(config.triples, limit=config.limit, seed=config.seed)
    base = models.outline(config.base, chat_template=config.chat_template)
    found = examples(triples.triples, base.chat, window(config, base))
    check_enough(found, config.triples, FEWEST)
    subjects: list[models.Outline] = []
    for name in dict.fromkeys(config.subjects):
        outline = models.outline(name, chat_template=config.chat_template)
        if outline.subject.fingerprint == base.subject.fingerprint:
            raise UsageError(
                f"{name} has the weights of the base {config.base}, so the probe would be read on"
                " what it was fitted to. Name the model that it was made from as the base, or another"
                " subject."
            )
        # the same weights count once
        if all(outline.subject.fingerprint != o.subject.fingerprint for o in subjects):
            comparable(
                base, outline, found, examples(triples.triples, outline.chat, window(config, base))
            )
            subjects.append(outline)
    fit_rows, evaluation_rows = set_aside([e.group for e in found], config.evaluate, config.seed)
    ledger = LeakageLedger()
    for outline in (base, *subjects):
        outline.check_opens()
        if (outline.folder / LEDGER).is_file():
            ledger.merge(LeakageLedger.load(outline.folder / LEDGER))
    for role, rows in (("probe-train", fit_rows), ("evaluation", evaluation_rows)):
        ledger.use(role, {triples.triples[i // 2].prompt for i in rows})
    ledger.check(allow_overlap=allow_overlap)
    tokens = [0 if e.talk is None else len(e.talk.ids) for e in found]
    settings = {
        "base": base.subject.fingerprint,
        "max_tokens": window(config, base),
        "dtype": config.dtype,
        "features": config.features,
        "evaluate": config.evaluate,
        "chat_template": digest(base.chat.template) if base.chat.template else None,
        **config.fitting(),
    }
    groups = []
    for outline in (base, *subjects):
        rows = range(len(found)) if outline is base else evaluation_rows
        work = 2.0 * outline.n_block_params * sum(tokens[i] for i in rows)
        cell = ProbeCell(outline.subject, None, None, probe.PROBE, triples.digest, settings)
        groups.append(Group(f"{outline.subject.name} · probe", (cell,), work=work))
    return ProbePlan(
        config,
        triples,
        (base, *subjects),
        tuple(found),
        fit_rows,
        evaluation_rows,
        tuple(groups),
        ledger,
    )


def window(config: FitConfig, outline: models.Outline) -> int:
    """Tokens of a conversation: what was asked for, or what the model can read where that is
    less."""
    limit = getattr(outline.chat.tokenizer, "model_max_length", None)
    return (
        min(config.max_tokens, limit) if isinstance(limit, int) and limit > 0 else config.max_tokens
    )


def check_enough(found: list[ProbeExample], name: str, fewest: int) -> None:
    usable = {e.group for e in found if e.talk is not None}
    if len(usable) < fewest:
        raise UsageError(
            f"Triples {name!r} have {len(usable)} different prompts with an answer that fits; at"
            f" least {fewest} are needed to fit a probe and to test it on others. Give more"
            " triples, or a larger --max-tokens."
        )


def comparable(
    base: models.Outline,
    other: models.Outline,
    ours: list[ProbeExample],
    theirs: list[ProbeExample],
) -> None:
    """Raises UsageError when the base's probe cannot be read on the other model: another shape, or
    other tokens."""
    if (base.n_blocks, base.width) != (other.n_blocks, other.width):
        raise UsageError(
            f"{other.subject.name} has {other.n_blocks} blocks of width {other.width}, the base"
            f" {base.subject.name} {base.n_blocks} of width {base.width}: a probe of one cannot be"
            " read on the other. Compare a subject with the base it was made from."
        )
    for one, two in zip(ours, theirs, strict=True):
        if (None if one.talk is None else one.talk.ids) != (
            None if two.talk is None else two.talk.ids
        ):
            raise UsageError(
                f"{other.subject.name} writes the same conversation in other tokens than the base"
                f" {base.subject.name} (another tokenizer or chat template), so their activations"
                " cannot be set side by side. Compare a subject with the base it was made from, or"
                " give both one --chat-template FILE."
            )


def facts(plan: ProbePlan) -> Document:
    """What a reader wants to know besides: versions, the triples, what could not be read."""
    unread = sum(e.talk is None for e in plan.examples)
    cut = sum(e.talk is not None and e.talk.n_cut > 0 for e in plan.examples)
    return {
        **provenance(plan.outlines, dtype=plan.config.dtype),
        "triples": {
            "name": plan.triples.name,
            "n": len(plan.triples.triples),
            "digest": plan.triples.digest,
            "answers_cut": cut,
            **plan.triples.provenance,
        },
        "refused": (
            {"answer that does not fit the token limit, or is empty": unread} if unread else {}
        ),
        "warnings": [],
    }
