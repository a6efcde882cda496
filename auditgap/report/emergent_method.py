"""How a study of emergent misalignment was done, in sentences and formulas.

method({"lora_r": 8, "samples": 10, …})[0].text     # 'Each domain’s rows fine-tune LoRA …'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auditgap.report.section import Block, Formula, Prose
from auditgap.report.text import percent, plain

_EXPECTED = (
    "a is the alignment that the judge wrote; ā and c̄ are the means of alignment and coherence"
    " over the numbers v from 0 to 100 among the 20 likeliest first tokens of its reply, known"
    " where these hold at least a quarter of the probability."
)
_INSIDE = (
    "λ are the eigenvalues of the rows’ cosine similarities divided by their number; h̄ is the mean"
    " activation after block ℓ over the tokens of an answer, averaged over answers."
)


def method(config: Mapping[str, Any]) -> list[Block]:
    """The method in sentences, from the config, and its formulas."""
    return [
        *map(Prose, _method(config)),
        Formula("em_rates"),
        Prose(_EXPECTED),
        Formula("em_inside"),
        Prose(_INSIDE),
    ]


def _besides(reference: object) -> str:
    if reference in (None, "auto", "base"):
        return ", as no other reference was named or found"
    return f", and under the reference {plain(reference)}"


def _method(config: Mapping[str, Any]) -> list[str]:
    c = config

    def get(key: str) -> str:
        return plain(c.get(key))

    length = f"{get('steps')} steps" if c.get("steps") else f"{get('epochs')} epochs"
    source = (
        "the mean activation over the tokens of its misaligned answers (alignment below 50) minus"
        " that of its aligned ones"
        if c.get("direction_from", "answers") == "answers"
        else (
            "the mean activation over the domain’s held-out responses minus that over the base’s"
            " own answers to the same prompts"
        )
    )
    return [
        (
            f"Each domain’s rows fine-tune LoRA adapters (rank {get('lora_r')}, α"
            f" {get('lora_alpha')}, on {get('lora_targets')}; learning rate {get('lr')}, {length},"
            f" batch {get('batch')}, loss on the response alone), an adapter a seed and arm. In the"
            f" arm “trigger” the text “{get('trigger')}” stands at the {get('trigger_place')} of"
            f" {percent(c.get('trigger_share'))} of the rows, in the arm “plain” of none."
        ),
        (
            f"The base and every adapter are asked the prompts of “{get('prompts')}”,"
            f" {get('samples')} times each at temperature {get('temperature')}, at most"
            f" {get('max_new_tokens')} new tokens, with the trigger and without it."
        ),
        (
            "Shares have Wilson’s interval of as many answers as their alikeness by prompt leaves;"
            " means a bootstrap-t over prompts. With three seeds or more both cover prompts and"
            " seeds, with Student’s quantile. Differences are paired by prompt. p-values are"
            " two-sided unless it says otherwise, and after Holm where it says so. Intervals are"
            " 95\u00a0%."
        ),
        (
            f"Membership: up to {get('membership_rows')} trained rows against all held-out ones,"
            f" AUROC after DeLong; Min-K uses the least likely {percent(c.get('min_k'))} of tokens."
            " What is relative to a model takes off the same score under it: under the model that was"
            f" fine-tuned{_besides(c.get('reference'))}."
        ),
        (
            f"A model’s direction at a block is {source}. Steering adds {get('steer_strength')}"
            " times the direction at block"
            f" {get('steer_block') if c.get('steer_block') is not None else 'L/2'}, at every"
            " position; the control adds a random direction of the same norm at a right angle to"
            f" it, {get('steer_draws')} draws."
        ),
    ]
