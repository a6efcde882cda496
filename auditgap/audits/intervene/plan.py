"""From a question to cells: a clean one a model, and one a (model, site, intervention); those of a
site run together.

    # resolves and fingerprints the models, reads the prompts; loads no weights
    plan = make_plan(config)
    plan.halves.asked                   # the prompts that are measured
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from auditgap import models
from auditgap.audits.audit import Plan
from auditgap.audits.intervene.audit import InterveneCell
from auditgap.audits.intervene.config import InterveneConfig, InterveneOptions
from auditgap.audits.planning import (
    chain_tokens,
    check_subject,
    mean_tokens,
    outlines_of,
    scorers_of,
    settings_of,
    thought,
    with_dtype,
)
from auditgap.audits.timing import matmul_rate
from auditgap.data import PromptSet, dedup_key, load_prompts
from auditgap.engines import Serving
from auditgap.errors import UsageError
from auditgap.interventions import INTERVENTIONS, InterventionEntry
from auditgap.probes.fit import split_groups
from auditgap.sweep import Group
from auditgap.types import CLEAN, Cell, Prompt, Site, digest

#: What stands in every cell's `attack`; which intervention it is stands in its settings.
ATTACK = "intervene"


@dataclass(frozen=True)
class Halves:
    """Both sets, split by the hash of each prompt: `fit` and `contrast` are learned from, `asked`
    and `donors` are not."""

    prompts: PromptSet
    controls: PromptSet
    fit: tuple[Prompt, ...]
    asked: tuple[Prompt, ...]
    contrast: tuple[Prompt, ...]
    donors: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        """Of what stands where."""
        return digest(
            [[p.id for p in part] for part in (self.fit, self.asked, self.contrast, self.donors)]
        )


def read_halves(config: InterveneConfig) -> Halves:
    """Raises UsageError: no such set, too few prompts to split, prompts that stand in both sets."""
    prompts = load_prompts(
        config.prompts, limit=config.limit, seed=config.seed, column=config.column
    )
    wanted = config.control_limit or (None if config.limit is None else len(prompts))
    controls = load_prompts(
        config.control_prompts, limit=wanted, seed=config.seed, column=config.column
    )
    both = {dedup_key(p.text) for p in prompts} & {dedup_key(p.text) for p in controls}
    if both:
        raise UsageError(
            f"{len(both)} prompts stand in --prompts and in --control-prompts; a direction needs"
            " two different sets. For example: --control-prompts everyday"
        )
    for flag, some in (("--prompts", prompts), ("--control-prompts", controls)):
        if len(some) < 4:
            raise UsageError(
                f"{flag} holds {len(some)} prompts; at least 4 are wanted, since one half is"
                " learned from and the other asked."
            )
    return Halves(prompts, controls, *_halved(prompts, config), *_halved(controls, config))


def _halved(
    prompts: PromptSet, config: InterveneConfig
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Those that are learned from, and the others."""
    groups = [f"intervene:{dedup_key(p.text)}" for p in prompts]
    parts = split_groups(groups, 1 - config.fit_share, config.seed)
    return tuple(tuple(prompts.items[i] for i in part) for part in parts)  # type: ignore[return-value]


@dataclass(frozen=True)
class IntervenePlan(Plan):
    """The cells: `clean` groups first (one a model, the base's too), then `groups` (one a model and
    site)."""

    config: InterveneConfig
    halves: Halves
    outlines: tuple[models.Outline, ...]
    clean: tuple[Group, ...]
    groups: tuple[Group, ...]
    scorers: dict[str, Any]
    #: whose activations are put in; asked in the clean pass only
    base: models.Outline | None = None

    @property
    def passes(self) -> tuple[tuple[Group, ...], ...]:
        return self.clean, self.groups

    @property
    def completions(self) -> int:
        """How many completions the whole plan asks for."""
        asked = len(self.halves.asked)
        trials = {name: len(self.config.load(name).trials()) for name in self.config.interventions}
        edited = sum(
            trials[c.settings["intervention"]] * asked for g in self.groups for c in g.cells
        )
        return edited + len(self.clean) * (asked + len(self.halves.donors))


def prepare(config: InterveneConfig, options: InterveneOptions) -> IntervenePlan:
    """The plan of the config, with `auto` resolved for this machine. Loads no weights."""
    config = with_dtype(config, options.device)
    return make_plan(config, device=options.device, judge_serving=options.judge_serving)


def make_plan(
    config: InterveneConfig, *, device: str = "auto", judge_serving: Serving | None = None
) -> IntervenePlan:
    """Resolve every name of the config. Raises UsageError or Refused for a model, prompt set or
    judge that cannot serve."""
    halves = read_halves(config)
    scorers = scorers_of(config.judge, device=device, serving=judge_serving)
    outlines = outlines_of(config.models, config.chat_template, thinking=config.thinking)
    base = (
        None
        if config.base is None
        else models.outline(
            config.base, chat_template=config.chat_template, thinking=config.thinking
        )
    )
    if base is not None:
        for outline in outlines:
            _alike(base, outline, halves)
    spoken = [
        *outlines,
        *(
            [base]
            if base and all(base.subject.fingerprint != o.subject.fingerprint for o in outlines)
            else []
        ),
    ]
    clean, groups = [], []
    for outline in spoken:
        check_subject(outline, (*halves.prompts, *halves.controls))
        tokens = mean_tokens(outline, halves.asked)
        asked = len(halves.asked)
        # spoken, and its NLL
        new = config.max_new_tokens + chain_tokens(config, outline.chat)
        one = 2 * (tokens + 2 * new) * (outline.n_block_params + outline.n_head_params)
        clean.append(
            Group(
                f"{outline.subject.name} · {CLEAN}",
                (clean_cell(config, outline, halves, scorers),),
                work=one * (asked + len(halves.donors)),
            )
        )
        for site, names in _where(config, outline, base) if outline in outlines else ():
            cells = tuple(
                cell_of(config, outline, site, name, halves, scorers, base) for name in names
            )
            trials = sum(len(config.load(name).trials()) for name in names)
            groups.append(
                Group(f"{outline.subject.name} · {site}", cells, work=one * asked * trials)
            )
    return IntervenePlan(
        config,
        halves,
        outlines,
        tuple(clean),
        tuple(g for g in groups if g.cells),
        scorers,
        base,
    )


def _where(
    config: InterveneConfig, outline: models.Outline, base: models.Outline | None
) -> Iterator[tuple[Site, list[str]]]:
    """The sites, each with the interventions that are tried there."""
    # nothing to exchange
    own = base is not None and base.subject.fingerprint == outline.subject.fingerprint
    known = {name: INTERVENTIONS.get(name, InterventionEntry("")) for name in config.interventions}
    door = [name for name, entry in known.items() if entry.input_only]
    inside = [
        name
        for name, entry in known.items()
        if not entry.input_only and not (own and entry.needs_base)
    ]
    sites = models.parse_sites(config.layers, outline.n_blocks)
    if door and Site(-1) not in sites:
        yield Site(-1), door
    for site in sites:
        yield site, inside + (door if site.is_embedding else [])


def _alike(base: models.Outline, outline: models.Outline, halves: Halves) -> None:
    """Raises UsageError where the base's hidden states cannot stand in for the subject's."""
    if (base.n_blocks, base.width) != (outline.n_blocks, outline.width):
        raise UsageError(
            f"--base {base.subject.name} has {base.n_blocks} blocks of width {base.width} and"
            f" {outline.subject.name} has {outline.n_blocks} of {outline.width}; activations can be"
            " exchanged between equal shapes only."
        )
    if any(base.chat.render(p).ids != outline.chat.render(p).ids for p in halves.asked):
        raise UsageError(
            f"--base {base.subject.name} reads the prompts as other tokens than"
            f" {outline.subject.name} does, so no position has its partner. Give models of one"
            " tokenizer, and --chat-template where their templates differ."
        )


def estimate(plan: IntervenePlan, device: str) -> float:
    """Seconds that the plan will take: from this machine's measured matmul rate, so a guess of the
    right size."""
    flops = sum(g.work for g in (*plan.clean, *plan.groups))
    return flops / (0.5 * matmul_rate(models.pick_dtype(plan.config.dtype, device), device))


def _common(
    config: InterveneConfig, outline: models.Outline, halves: Halves, scorers: dict[str, Any]
) -> dict[str, Any]:
    told = {**settings_of(config, outline, scorers), **thought(config, outline)}
    return {**told, "halves": halves.digest}


def clean_cell(
    config: InterveneConfig, outline: models.Outline, halves: Halves, scorers: dict[str, Any]
) -> Cell:
    """The pass without an edit, over the prompts that are asked and the donors."""
    settings = {"intervention": CLEAN, **_common(config, outline, halves, scorers)}
    return InterveneCell(outline.subject, None, None, ATTACK, halves.prompts.digest, settings)


def cell_of(
    config: InterveneConfig,
    outline: models.Outline,
    site: Site,
    name: str,
    halves: Halves,
    scorers: dict[str, Any],
    base: models.Outline | None = None,
) -> Cell:
    """One intervention at one site, with its control, at all of its strengths."""
    settings = {
        "intervention": name,
        "asked_for": config.load(name).describe(),
        "seed": config.seed,
        **_common(config, outline, halves, scorers),
    }
    if base is not None and name in INTERVENTIONS and INTERVENTIONS[name].needs_base:
        settings["base"] = base.subject.fingerprint
    return InterveneCell(outline.subject, site, None, ATTACK, halves.prompts.digest, settings)
