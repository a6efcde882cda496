"""What a study comes to before any of it has run: adapters, steps, answers, and the time they take.

expected = of_plan(plan, options)
expected["answers"], expected["seconds"]
"""

from __future__ import annotations

from pathlib import Path

from auditgap import models
from auditgap.audits.emergent.build import EmergentPlan
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.planning import mean_tokens
from auditgap.audits.timing import Time, judging, speaking, starting, training
from auditgap.data.em_prompts import put_to
from auditgap.judges import Judge
from auditgap.training.config import n_steps
from auditgap.types import Document, Prompt

#: Rows of which the mean length is taken.
_SAMPLE = 16


def of_plan(plan: EmergentPlan, options: EmergentOptions) -> Document:
    """Counts, and `seconds` as of every estimate: of training, answering and judging; what is
    analysed follows from the answers."""
    asked, panel, (base,) = plan.config, plan.panel, plan.outlines
    prompts, device = plan.asked.prompts, models.pick_device(options.device)
    each = len(asked.arms) * len(asked.seeds)
    adapters = len(asked.domains) * each
    own = sum(len(put_to(prompts, domain)) for domain in asked.domains)
    answers = (len(prompts) + each * own) * 2 * asked.samples
    recipe = asked.sft(Path("rows.jsonl"), 0)
    steps, tokens = 0, 0.0
    for domain in asked.domains:
        for arm in asked.arms:
            rows = panel.examples(domain, arm)
            here = len(asked.seeds) * n_steps(recipe, len(rows))
            some = rows[:: max(1, len(rows) // _SAMPLE)]
            long = [len(_talk(base, row.prompt, row.response, asked.max_tokens)) for row in some]
            steps += here
            tokens += here * asked.batch * sum(long) / max(1, len(long))
    elsewhere = sum(map(plan.requests, plan.remotes))
    time = Time(
        # the base is opened for each adapter that is trained, and once to answer
        starting(plan.outlines, adapters + 1),
        training(base, tokens, asked.dtype, device)
        + speaking(
            base, answers, mean_tokens(base, prompts), asked.max_new_tokens, asked.dtype, device
        ),
        judging(rater, answers + elsewhere, device)
        if isinstance(rater := options.rater(), Judge)
        else 0.0,
    )
    asks = adapters + 1 + len(plan.remotes)
    return {
        # those of `analyse` depend on the answers
        "cells": {"train": adapters, "generate": asks, "judge": asks},
        "steps": steps,
        "prompts": len(prompts),
        "answers": answers,
        **time.document(),
    }


def _talk(base: models.Outline, prompt: str, response: str, most: int) -> list[int]:
    return list(base.chat.converse(Prompt(prompt), response, max_tokens=most).ids)
