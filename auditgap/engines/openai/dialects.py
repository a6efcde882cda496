"""The dialects of OpenAI's protocol: what a finish reason, a body or a refusal means, whoever wrote
it. Everything that servers say in different words stands here, and only here.

    ending("MAX_TOKENS")                                # Ending.CUT
    is_flagged({"code": 403, "message": "… was flagged …"})     # True
    refused_option({"param": "temperature"}, {"temperature": 0.0})  # "temperature"
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from auditgap.engines import Question, Sampling
from auditgap.types import Document


class Ending(Enum):
    """How an answer ended."""

    ENDED = "ended"
    CUT = "cut at the limit on its tokens"
    FILTERED = "kept back by a filter"
    FAILED = "an error instead of an answer"


#: Finish reasons in lower case. Of OpenAI and those that follow it, text-generation-inference and
#: older vLLM (eos_token, stop_sequence), Anthropic (end_turn, refusal), Gemini (upper case), Mistral
#: (model_length), Zhipu (sensitive), OpenRouter (error).
ENDINGS: Mapping[str, Ending] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), Ending.ENDED),
    **dict.fromkeys(
        ("length", "max_tokens", "max_output_tokens", "model_length", "token_limit"), Ending.CUT
    ),
    **dict.fromkeys(
        (
            *("content_filter", "content_filtered", "sensitive", "safety", "prohibited_content"),
            *("blocklist", "recitation", "spii", "refusal"),
        ),
        Ending.FILTERED,
    ),
    **dict.fromkeys(("error", "network_error", "internal_error"), Ending.FAILED),
}
#: The limit on an answer's tokens, by its two names.
_LIMITS = {"max_tokens", "max_completion_tokens"}
#: Codes of an error that is about what one prompt says.
_FLAGS = ("content_filter", "invalid_prompt", "content_policy_violation", "moderation_blocked")
#: The same in words; a status alone does not say it (OpenRouter's is 403, as for a refused key).
_FLAGGED = re.compile(
    r"\bflagged\b|requires? moderation|content (management |filtering )?polic|usage polic", re.I
)
#: An option that a server does not take, in words.
_NOT_TAKEN = re.compile(
    r"unsupported|not (be )?support|unrecognized|not (permitted|allowed)|extra inputs|unknown"
    r"|does not (accept|take)|only the default",
    re.I,
)
#: An account's own settings that leave no provider for a model.
NO_PROVIDER = re.compile(r"no (endpoints|allowed providers|providers)", re.I)


def ending(reason: object) -> Ending | None:
    """What a finish reason means; None for one that is not known, or missing."""
    return ENDINGS.get(reason.lower()) if isinstance(reason, str) else None


def text_of(content: object) -> str | None:
    """The text of a message's content, which may come in parts; None where there is no text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if texts and len(texts) == len(parts) else None
    return content if isinstance(content, str) else None


def value_of(body: bytes) -> Any:
    """The JSON in a body; a stream that nobody asked for is put together. Raises ValueError and
    RecursionError as `json.loads`."""
    if not body.lstrip().startswith((b"data:", b"event:", b":")):  # no JSON begins so
        return json.loads(body)
    lines = [line[5:].strip() for line in body.splitlines() if line.startswith(b"data:")]
    pieces = [json.loads(line) for line in lines if line != b"[DONE]"]
    if any(not isinstance(piece, dict) for piece in pieces):
        raise ValueError("a stream of something else")
    return next((piece for piece in pieces if piece.get("error")), None) or _joined(pieces)


def _joined(pieces: list[dict[str, Any]]) -> Document:
    """A stream's one answer as if it had come whole. Log-probabilities are left out: an endpoint
    that streams unasked is not asked to be exact."""
    message: dict[str, Any] = {}
    plain, reason = "", None
    for piece in pieces:
        for choice in piece.get("choices") or ():
            if not isinstance(choice, dict) or choice.get("index", 0) != 0:
                raise ValueError("more than one answer in a stream")
            reason = choice.get("finish_reason") or reason
            plain += text_of(choice.get("text")) or ""
            for name, value in (choice.get("delta") or {}).items():
                if (text := text_of(value)) is not None and name != "role":
                    message[name] = message.get(name, "") + text
    return {"choices": [{"finish_reason": reason, "message": message, "text": plain}]}


def error_in(value: object) -> Document | None:
    """The error in a body, whatever its status: at the top, in its only choice, or as the list that
    FastAPI writes."""
    if not isinstance(value, dict):
        return None
    found = value.get("error")
    if found is None and isinstance(choices := value.get("choices"), list) and len(choices) == 1:
        found = choices[0].get("error") if isinstance(choices[0], dict) else None
    if found is None and isinstance(details := value.get("detail"), list) and details:
        first = details[0] if isinstance(details[0], dict) else {}
        where = first.get("loc") or [None]
        return {"message": first.get("msg"), "param": where[-1], "code": first.get("type")}
    if isinstance(found, dict):
        return found
    return None if found is None else {"message": found}


def is_flagged(error: Document) -> bool:
    """Whether an error is about what this one prompt says, so that others may be answered."""
    details = error.get("metadata")
    if isinstance(details, dict) and ("flagged_input" in details or "reasons" in details):
        return True
    return error.get("code") in _FLAGS or bool(_FLAGGED.search(str(error.get("message"))))


def refused_option(error: Document, sent: Document) -> str | None:
    """The option of the request that an error refuses by name, if it does."""
    message, named = str(error.get("message")), error.get("param")
    if isinstance(named, str) and named in sent:
        return named
    if not _NOT_TAKEN.search(f"{message} {error.get('code')}"):
        return None
    # the longest first: top_logprobs is not logprobs
    for option in sorted(sent, key=len, reverse=True):
        if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", message):
            return option
    return None


class Dialect:
    """How one endpoint wants to be asked, which may be learnt from what it refuses."""

    def __init__(self, *, official: bool) -> None:
        # newer models of OpenAI's know the limit by its newer name only
        self._limit = "max_completion_tokens" if official else "max_tokens"
        self._refused: set[str] = set()  # of the limit's names
        self._logprobs = True

    def options(self, question: Question, sampling: Sampling) -> Document:
        """The request's fields, no more than needed: endpoints refuse what they do not know."""
        chat = question.text is None
        options: Document = {"temperature": sampling.temperature}
        options[self._limit if chat else "max_tokens"] = sampling.new_tokens
        if sampling.temperature > 0:
            options["seed"] = question.seed(sampling.seed)
            if sampling.top_p < 1:
                options["top_p"] = sampling.top_p
        if sampling.top_logprobs and self._logprobs:
            options |= (
                {"logprobs": True, "top_logprobs": sampling.top_logprobs}
                if chat
                else {"logprobs": sampling.top_logprobs}
            )
        return options

    def learn(self, option: str) -> None:
        """An option was refused: ask for the same in another way, where there is one.
        Log-probabilities are done without, as with an endpoint that gives none; whatever else
        changes an answer is never left out."""
        if option in ("logprobs", "top_logprobs"):
            self._logprobs = False
        if option in _LIMITS:
            self._refused.add(option)
            self._limit = next(iter(_LIMITS - self._refused), self._limit)


#: What stands for a body that is not JSON.
UNREADABLE = object()


def json_in(body: bytes) -> object:
    """A body's JSON, or `UNREADABLE`."""
    try:
        return value_of(body)
    except (ValueError, RecursionError):
        return UNREADABLE
