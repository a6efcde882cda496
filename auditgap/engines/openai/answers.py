"""The reply in what an endpoint sends back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from auditgap.engines import UNFINISHED, Question, Reply
from auditgap.engines.choosing import likeliest
from auditgap.engines.openai.dialects import Ending, ending, text_of
from auditgap.models.chains import split
from auditgap.types import Document


class NoAnswer(Exception):
    """It is known that this question gets no answer; `problem` is what its reply says."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


def is_sendable(text: str) -> bool:
    """Whether JSON on the wire can carry a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def unfit(question: Question) -> str:
    """Why a question cannot be put; "" where it can."""
    plain = question.text is not None
    words = [question.text or ""] if plain else [m.content for m in question.messages]
    if not any(words):
        return "empty"
    if any(not is_sendable(w) for w in words):
        return "endpoint: the question is not valid Unicode"
    return ""


def path_of(question: Question) -> str:
    """Behind the endpoint's address."""
    return "chat/completions" if question.text is None else "completions"


def turns_of(question: Question) -> Document:
    """What is asked, as a request has it."""
    if question.text is not None:
        return {"prompt": question.text}
    return {"messages": [{"role": m.role, "content": m.content} for m in question.messages]}


def read(value: object, plain: bool, top_logprobs: int) -> Reply:
    """The reply in a body's JSON; `plain` as the completions endpoint writes it. Raises NoAnswer
    for everything else."""
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        came = f"{len(choices)} answers" if isinstance(choices, list) else "no answer"
        raise NoAnswer(f"endpoint: {came} where one was wanted")
    choice = choices[0]
    reason = choice.get("finish_reason")
    how = ending(reason)
    if how is Ending.FILTERED:
        raise NoAnswer("content_filter")
    if how not in (Ending.ENDED, Ending.CUT):
        raise NoAnswer(
            f"endpoint: finish reason {plain_word(reason)!r} is not known"
            if reason
            else "endpoint: no finish reason, so nobody knows whether the answer is whole"
        )
    message = choice if plain else choice.get("message")
    text = (
        text_of(message.get("text" if plain else "content")) if isinstance(message, dict) else None
    )
    if text is None and isinstance(message, dict):
        text = text_of(message.get("refusal"))  # where OpenAI puts a model's own refusal
    chain = _chain(message)
    if text is None and not chain:
        raise NoAnswer("endpoint: an answer without text")
    # a server that has no parser for its model leaves the chain in the text
    found = split(text or "", "closed" if chain else None)
    chain = "\n".join(part for part in (chain, found.chain) if part)
    if found.unfinished or (chain and not found.answer):
        return Reply("", stopped=False, problem=UNFINISHED, chain=chain)
    tops = _tops(choice.get("logprobs"), plain, top_logprobs) if top_logprobs else ()
    return Reply(found.answer, None, how is Ending.ENDED, tops, chain=chain)


def plain_word(value: object, key: str = "", length: int = 60) -> str:
    """A word of the endpoint's that may be shown: printable, short, and not the key, which some
    endpoints echo."""
    text = value if isinstance(value, str) else ""
    text = text.replace(key, "…") if key else text
    return "".join(c for c in text if c.isprintable())[:length]


def _chain(message: Any) -> str:
    """The chain of thought that an endpoint tells apart from the answer; servers name it in two
    ways."""
    told = message if isinstance(message, dict) else {}
    parts = (text_of(told.get("reasoning_content")), text_of(told.get("reasoning")))
    return next((part.strip() for part in parts if part and part.strip()), "")


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
