"""What is sent to an endpoint, and the reply in what comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from auditgap.engines import UNFINISHED, Question, Reply, Sampling
from auditgap.engines.choosing import likeliest
from auditgap.models.chains import split
from auditgap.types import Document

_ENDED = ("stop", "eos_token", "stop_sequence")
_CUT = ("length", "max_tokens")


class NoAnswer(Exception):
    """It is known that this question gets no answer; `problem` is what its reply says."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


def options(question: Question, sampling: Sampling, official: bool) -> Document:
    """The request's fields, no more than needed: endpoints refuse what they do not know."""
    chat = question.text is None
    options: Document = {"temperature": sampling.temperature}
    options["max_completion_tokens" if chat and official else "max_tokens"] = sampling.new_tokens
    if sampling.temperature > 0:
        options["seed"] = question.seed(sampling.seed)
        if sampling.top_p < 1:
            options["top_p"] = sampling.top_p
    if sampling.top_logprobs:
        options |= (
            {"logprobs": True, "top_logprobs": sampling.top_logprobs}
            if chat
            else {"logprobs": sampling.top_logprobs}
        )
    return options


def is_sendable(text: str) -> bool:
    """Whether JSON on the wire can carry a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def read(body: bytes, plain: bool, top_logprobs: int) -> Reply:
    """The reply in a body; `plain` as the completions endpoint writes it. Raises NoAnswer for
    everything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise NoAnswer("endpoint: not JSON") from None
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        came = f"{len(choices)} answers" if isinstance(choices, list) else "no answer"
        raise NoAnswer(f"endpoint: {came} where one was wanted")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        raise NoAnswer("content_filter")
    if reason not in (*_ENDED, *_CUT):
        raise NoAnswer("endpoint: the answer did not end in a known way")
    message = choice if plain else choice.get("message")
    text = message.get("text" if plain else "content") if isinstance(message, dict) else None
    if text is None and isinstance(message, dict):
        text = message.get("refusal")  # where OpenAI puts a model's own refusal
    chain = _chain(message)
    if not isinstance(text, str) and not (chain and text is None):
        raise NoAnswer("endpoint: an answer without text")
    # a server that has no parser for its model leaves the chain in the text
    found = split(text or "", "closed" if chain else None)
    chain = "\n".join(part for part in (chain, found.chain) if part)
    if found.unfinished or (chain and not found.answer):
        return Reply("", stopped=False, problem=UNFINISHED, chain=chain)
    tops = _tops(choice.get("logprobs"), plain, top_logprobs) if top_logprobs else ()
    return Reply(found.answer, None, reason in _ENDED, tops, chain=chain)


def _chain(message: Any) -> str:
    """The chain of thought that an endpoint tells apart from the answer; servers name it in two
    ways."""
    told = message if isinstance(message, dict) else {}
    parts = (told.get("reasoning_content"), told.get("reasoning"))
    return next((part.strip() for part in parts if isinstance(part, str) and part.strip()), "")


def _tops(given: Any, plain: bool, k: int) -> tuple[Mapping[str, float], ...]:
    """For each new token its k likeliest, from either endpoint's form. Raises NoAnswer for what is
    no log-probability."""
    if given is None:
        return ()
    try:
        if plain:
            steps = [list((top or {}).items()) for top in given["top_logprobs"]]
        else:
            steps = [
                [(top["token"], top["logprob"]) for top in step["top_logprobs"]]
                for step in given["content"] or ()
            ]
        found = []
        for step in steps:
            if not all(isinstance(t, str) and isinstance(v, (int, float)) for t, v in step):
                raise TypeError
            if any(math.isnan(v) or v == math.inf for _, v in step):
                raise NoAnswer("nonfinite_logits")
            # an endpoint may add the token it chose; −∞ is a token that was forbidden
            best = sorted(
                ((t, float(v)) for t, v in step if v > -math.inf), key=lambda pair: -pair[1]
            )[:k]
            found.append(likeliest(([t for t, _ in best], [v for _, v in best]), "".join))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        raise NoAnswer("endpoint: log-probabilities in no known form") from None
    return tuple(found)
