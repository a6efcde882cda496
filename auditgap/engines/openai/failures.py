"""What an endpoint's errors mean, and which may pass. Nothing that an endpoint says is quoted but
plain words without the key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from auditgap.engines.openai.answers import NoAnswer, plain_word
from auditgap.engines.openai.dialects import (
    NO_PROVIDER,
    Ending,
    ending,
    error_in,
    is_flagged,
    refused_option,
)
from auditgap.engines.openai.endpoint import KEY
from auditgap.errors import UsageError
from auditgap.types import Document

_TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|(prompt|input) (is )?too long|too many tokens|token count",
    re.I,
)


class Passing(Exception):
    """A failure that may pass. `unreached`: not even a connection came about; `retry_after`:
    seconds that were asked for."""

    def __init__(
        self, what: str, *, unreached: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.unreached, self.retry_after = what, unreached, retry_after


class OptionRefused(Exception):
    """The endpoint does not take an option of the request, and says which."""

    def __init__(self, option: str) -> None:
        super().__init__(option)
        self.option = option


@dataclass(frozen=True)
class Failure:
    """An error of the endpoint `where`: its HTTP status, or the one that its body tells of, the
    error in the body, and the request that it answers."""

    status: int
    error: Document
    sent: Document  #: the request's options
    where: str
    model: str
    key: str
    retry_after: str | None = None  #: the header

    def meaning(self) -> Exception | None:
        """What it says: for all questions (UsageError, OptionRefused), for now (Passing) or for this
        question (NoAnswer); None: that there is no such model or path. The body decides before the
        status does."""
        status, error, where = self.status, self.error, self.where
        code, parameter = (plain_word(error.get(name), self.key) for name in ("code", "param"))
        if 400 <= status < 500 and is_flagged(error):
            return NoAnswer("content_filter")
        if status in (400, 403, 422) and (option := refused_option(error, self.sent)):
            return OptionRefused(option)
        if status in (401, 403):
            state = (
                f"the key in {KEY}" if self.key else f"a request without a key ({KEY} is not set)"
            )
            return UsageError(
                f"{where} refused {state}: HTTP {status}. Set {KEY} to one that may use"
                f" {self.model}."
            )
        if status == 402 or code == "insufficient_quota":
            return UsageError(
                f"{where} has no credit left for this key: HTTP {status}. Add some, then type the"
                " same command with --set retry_failed=true."
            )
        if 300 <= status < 400:
            return UsageError(
                f"{where} sends us elsewhere (HTTP {status}), and prompts and key go nowhere"
                " unasked. Give --endpoint the final address."
            )
        if status == 404 and NO_PROVIDER.search(str(error.get("message"))):
            return UsageError(
                f"{where} knows {self.model}, but no provider of it that this account's settings"
                " allow (HTTP 404). Look at the account's data policy and providers, or choose"
                " another model."
            )
        if status in (404, 405):
            return None
        if status in (408, 409, 429) or status >= 500:
            return Passing(str(status), retry_after=retry_after_of(self.retry_after))
        if (
            code == "context_length_exceeded"
            or status == 413
            or _TOO_LONG.search(str(error.get("message")))
        ):
            return NoAnswer("context_length")
        detail = ", ".join(word for word in (code, parameter) if word and word != str(status))
        return NoAnswer(f"endpoint: {status}{f' ({detail})' if detail else ''}")


def inside(value: object) -> tuple[int, Document] | None:
    """(status, error) of a body that came with HTTP 200 and is no answer: what the error's code
    says, else 502, as somebody behind the endpoint failed. None where there is an answer."""
    error = error_in(value)
    choices = value.get("choices") if isinstance(value, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    if error is None and not (
        isinstance(first, dict) and ending(first.get("finish_reason")) is Ending.FAILED
    ):
        return None
    code = (error or {}).get("code")
    known = isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600
    return (int(code) if known and code is not None else 502), error or {}


def retry_after_of(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait, from a number or an HTTP date; None when it
    says nothing usable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
        except (TypeError, ValueError, OverflowError):
            return None
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        seconds = max(0.0, (at - datetime.now(UTC)).total_seconds())
    return seconds if seconds >= 0 else None  # NaN compares as False
