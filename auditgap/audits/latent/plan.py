"""From a question to cells: which cells there are, which share a trunk, and what they will cost.

# resolves and fingerprints the models, reads the prompts; loads no weights
plan = make_plan(config)
plan.groups                         # one group a (model, site): its cells run together
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from auditgap import models
from auditgap.audits.audit import Plan
from auditgap.audits.latent import thinking
from auditgap.audits.latent.config import NO_JUDGE, LatentConfig, RunOptions
from auditgap.audits.latent.thinking import spoken
from auditgap.audits.planning import (
    check_subject,
    mean_tokens,
    outlines_of,
    settings_of,
    with_dtype,
)
from auditgap.data import PromptSet, load_prompts
from auditgap.engines import Serving
from auditgap.errors import UsageError
from auditgap.interventions.strength import CERTIFIED, STARTS
from auditgap.interventions.strength import LONGER as LONGER_STEPS
from auditgap.interventions.target import BENIGN_TARGET, without_topic
from auditgap.judges import load_judge, load_reward
from auditgap.judges.coherence import Thresholds
from auditgap.sweep import Group
from auditgap.types import CLEAN, LONGER, Cell, Document, Site

#: The pseudo-attack of the minimum-distance cells, whose rows are DistanceRow.
DISTANCE = "distance"


@dataclass(frozen=True)
class LatentPlan(Plan):
    """The grid: `clean` groups first (one a model), then `groups` (one a model and site)."""

    config: LatentConfig
    prompts: PromptSet
    outlines: tuple[models.Outline, ...]
    clean: tuple[Group, ...]
    groups: tuple[Group, ...]
    scorers: dict[str, Any]
    #: of how many groups a subject's sites are: for generation in vLLM, which is opened once a
    #: group, as many as there are GPUs to run them; 0: each site is its own
    joined: int = 0

    @property
    def passes(self) -> tuple[tuple[Group, ...], ...]:
        return self.clean, self.by_subject if self.joined else self.groups

    @property
    def by_subject(self) -> tuple[Group, ...]:
        """The groups joined to `joined` a model. Every so manieth site is in one, since lower sites
        take longer."""
        every: dict[str, list[Group]] = {}
        for group in self.groups:
            every.setdefault(group.cells[0].subject.name, []).append(group)
        n = max(1, self.joined)
        return tuple(
            Group(
                name if n == 1 else f"{name} {part + 1}/{n}",
                tuple(c for g in some for c in g.cells),
                work=sum(g.work for g in some),
            )
            for name, groups in every.items()
            for part in range(n)
            if (some := groups[part::n])
        )


def prepare(
    config: LatentConfig, options: RunOptions, known: dict[tuple[Any, ...], Any] | None = None
) -> LatentPlan:
    """The plan of the config, with `auto` resolved for this machine (`known`: see `make_plan`). Loads
    no weights."""
    config = with_second_judge(with_dtype(config, options.device))
    plan = make_plan(
        config,
        device=options.device,
        judge_serving=options.judge_serving,
        known=known,
        joined=_parts(options) if options.engine == "vllm" else 0,
    )
    for outline in plan.outlines:
        _check_shard(outline, config, options)
    return plan


def _parts(options: RunOptions) -> int:
    """How many workers a subject's sites are spread over: the GPUs that are known of, on Ray."""
    if options.executor != "ray":
        return 1
    here = torch.cuda.device_count() // max(1, options.tensor_parallel)
    return options.workers or max(1, here)


def with_second_judge(config: LatentConfig) -> LatentConfig:
    """The config with the judge that `confirm: auto` means here: the built-in one needs its
    training rows."""
    if config.confirm != "auto":
        return config
    names = [n for n in ("builtin", "keyword") if n != config.judge and config.attacks]
    found = next((name for name in names if _is_available(name)), NO_JUDGE)
    return config.model_copy(update={"confirm": found})


def _is_available(judge: str) -> bool:
    try:
        load_judge(judge).describe()
    except UsageError:
        return False
    return True


def _check_shard(outline: models.Outline, config: LatentConfig, options: RunOptions) -> None:
    """Raises UsageError when the subject cannot lie over devices as asked: now, and not when a
    worker has begun."""
    shard, device = options.shard_of(outline.chat.name), models.pick_device(options.device)
    shard.check(outline)
    if shard.kind != "whole" and config.compile:
        raise UsageError(
            f"--compile is for whole models, and {outline.subject.name} has --shard {shard}; leave"
            " one of them out."
        )
    if options.executor == "local":
        shard.check_devices(device)
    elif (
        shard.kind != "whole"
        and device.startswith("cuda")
        and options.gpus_of(outline.chat.name, device) < shard.n
    ):
        raise UsageError(
            f"--shard {shard} wants {shard.n} GPUs a worker, and gpus_per_worker is"
            f" {options.gpus_per_worker:g}; leave it out."
        )


_T = TypeVar("_T")


def make_plan(
    config: LatentConfig,
    *,
    device: str = "auto",
    judge_serving: Serving | None = None,
    known: dict[tuple[Any, ...], Any] | None = None,
    joined: int = 0,
) -> LatentPlan:
    """Resolve every name of the config; `judge_serving`: how a judge's models are served.

    `known` is handed from plan to plan of one grid: a model is fingerprinted, a judge described and
    a prompt set read once, however many of the plans name it. Raises UsageError or Refused for a
    model, prompt set or scorer that cannot serve.
    """
    known, config = {} if known is None else known, with_second_judge(config)

    def once(what: Callable[[], _T], *name: Any) -> _T:
        if name not in known:
            known[name] = what()
        return known[name]

    def judge(name: str) -> Document:
        return once(
            lambda: load_judge(name, device=device, serving=judge_serving).describe(), "judge", name
        )

    read = (config.prompts, config.limit, config.seed, config.column)
    prompts = once(
        lambda: load_prompts(read[0], limit=read[1], seed=read[2], column=read[3]), "prompts", *read
    )
    reward = (config.reward, without_topic(config.target))
    scorers = {
        "reward": once(
            lambda: load_reward(reward[0], target=reward[1]).describe(), "reward", *reward
        ),
        "judge": judge(config.judge),
        "coherence": Thresholds().describe(),
    }
    second = None if config.confirm == NO_JUDGE else judge(config.confirm)

    def outlined(name: str, *, chat_template: str | None) -> models.Outline:
        return once(
            lambda: models.outline(name, chat_template=chat_template), "model", name, chat_template
        )

    every = outlines_of(config.models, config.chat_template, outlined)
    outlines = tuple(spoken(outline, mode) for outline in every for mode in config.thinking)
    clean, groups = [], []
    for outline in outlines:
        check_subject(outline, prompts)
        tokens = mean_tokens(outline, prompts.prompts)

        def group(
            where: object,
            cells: Sequence[Cell],
            outline: models.Outline = outline,
            tokens: float = tokens,
        ) -> Group:
            work = sum(
                flops_by_phase(config, outline, cells, len(prompts.prompts), tokens).values()
            )
            return Group(f"{outline.subject.name} · {where}", tuple(cells), work=work)

        clean.append(group(CLEAN, [clean_cell(config, outline, prompts, scorers)]))
        for site in models.parse_sites(config.layers, outline.n_blocks):
            cells = site_cells(config, outline, site, prompts, scorers, second)
            groups.append(group(site, cells))
    return LatentPlan(config, prompts, outlines, tuple(clean), tuple(groups), scorers, joined)


def _common(
    config: LatentConfig, outline: models.Outline, scorers: dict[str, Any]
) -> dict[str, Any]:
    told = {
        **settings_of(config, outline, scorers),
        "target": config.target,
        **thinking.settings(outline, config.thinking_tokens, config.span),
    }
    # left out where texts are judged whole, so that the cells of older runs keep their keys
    return {**told, "openings": [BENIGN_TARGET]} if config.strip_target else told


def clean_cell(
    config: LatentConfig, outline: models.Outline, prompts: PromptSet, scorers: dict[str, Any]
) -> Cell:
    """The pass without an edit, which every other cell of the subject is measured against."""
    return Cell(
        outline.subject, None, None, CLEAN, prompts.digest, _common(config, outline, scorers)
    )


def site_cells(
    config: LatentConfig,
    outline: models.Outline,
    site: Site,
    prompts: PromptSet,
    scorers: dict[str, Any],
    second: Document | None = None,
) -> list[Cell]:
    """Every (budget, attack) at one site, and its minimum-distance cell. `second`: what the judge
    of flips says of itself."""
    settings = {
        **_common(config, outline, scorers),
        "steps": config.steps,
        "step_share": config.pgd.step_share,
        "restarts": config.restarts,
        "iterate": config.iterate,
        "compile": config.compile,
        "draws": config.draws,
        "untargeted_tokens": config.untargeted_tokens,
        "seed": config.seed,
        # left out where it is the paper's, so that the cells of older runs keep their keys
        **({} if config.schedule == "constant" else {"schedule": config.schedule}),
    }
    edited = settings if second is None else {**settings, "confirm": second}
    cells = [
        Cell(outline.subject, site, budget, attack, prompts.digest, edited)
        for attack in (*config.attacks, *((LONGER,) if config.searches_longer else ()))
        for budget in config.budgets
    ]
    if config.distance:
        search = {
            "unit": config.unit,
            "start": config.eps[0],
            "limit": config.distance_limit,
            "bisections": config.bisections,
        }
        cells.append(
            Cell(outline.subject, site, None, DISTANCE, prompts.digest, {**settings, **search})
        )
    return cells


def flops_by_phase(
    config: LatentConfig, outline: models.Outline, cells: Sequence[Cell], n: int, tokens: float
) -> dict[str, float]:
    """Useful FLOPs of a group's phases: 2 a parameter and token forward, as many again for the
    gradient of activations."""
    new, k = config.max_new_tokens, 4
    whole = 2 * tokens * outline.n_block_params
    # one completion; its NLL costs the same again
    answer = 2 * new * (outline.n_block_params + outline.n_head_params)
    site = cells[0].site
    if site is None:  # the clean pass
        return {"speak": n * (whole + 2 * answer)}
    above = outline.n_block_params / outline.n_blocks * (outline.n_blocks - 1 - site.layer_index)
    speak = 2 * tokens * above + 2 * answer

    def search(target: int, times: int = 1) -> float:
        return (
            times
            * config.steps
            * config.restarts
            * 4
            * ((tokens + target) * above + (target + 1) * outline.n_head_params)
        )

    attacks = {c.attack for c in cells}
    draws = sum(
        config.draws if c.attack.startswith("random") else 1
        for c in cells
        if c.attack not in (DISTANCE, LONGER)
    )
    longer = len(config.eps) * (search(k, LONGER_STEPS * STARTS) + speak)
    return {
        "targeted": n * len(config.eps) * search(k)
        if attacks & {"targeted", "random_matched", "shuffled"}
        else 0.0,
        "untargeted": n * len(config.eps) * search(config.untargeted_tokens)
        if "untargeted" in attacks
        else 0.0,
        "benign": n * len(config.eps) * search(k) if "benign" in attacks else 0.0,
        "speak": n * (whole + draws * speak),
        # what it finds may call for more: n · eps · search(k, LONGER_STEPS) at the most
        "longer": min(n, CERTIFIED) * longer if LONGER in attacks else 0.0,
        "distance": n * distance_evaluations(config) * (search(k) + speak)
        if DISTANCE in attacks
        else 0.0,
    }


def distance_evaluations(config: LatentConfig) -> float:
    """Attacks a prompt needs at most: doublings up to the limit, then bisections."""
    return 1 + math.ceil(math.log2(config.distance_limit)) + config.bisections
