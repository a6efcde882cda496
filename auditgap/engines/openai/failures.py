"""What an endpoint's errors mean, and which may pass. Nothing that an endpoint says is quoted but
plain words without the key."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from auditgap.engines.openai.answers import NoAnswer
from auditgap.engines.openai.endpoint import KEY
from auditgap.errors import UsageError

if TYPE_CHECKING:
    from openai import APIStatusError

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


def meaning(error: APIStatusError, where: str, model: str, key: str) -> Exception | None:
    """What an HTTP status of the endpoint `where` says: for all questions (UsageError), for now
    (Passing) or for this question (NoAnswer); None: that there is no such model or path."""
    status = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    code, parameter = (plain_word(body.get(name), key) for name in ("code", "param"))
    if status in (401, 403):
        state = f"the key in {KEY}" if key else f"a request without a key ({KEY} is not set)"
        return UsageError(
            f"{where} refused {state}: HTTP {status}. Set {KEY} to one that may use {model}."
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
    if status in (404, 405):
        return None
    if status in (408, 409, 429) or status >= 500:
        return Passing(
            str(status), retry_after=retry_after_of(error.response.headers.get("retry-after"))
        )
    if code == "content_filter":
        return NoAnswer("content_filter")
    if (
        code == "context_length_exceeded"
        or status == 413
        or _TOO_LONG.search(str(body.get("message")))
    ):
        return NoAnswer("context_length")
    detail = ", ".join(word for word in (code, parameter) if word and word != str(status))
    return NoAnswer(f"endpoint: {status}{f' ({detail})' if detail else ''}")


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


def plain_word(value: object, key: str, length: int = 60) -> str:
    """A word of the endpoint's that may be shown: printable, short, and not the key, which some
    endpoints echo."""
    text = value if isinstance(value, str) else ""
    text = text.replace(key, "…") if key else text
    return "".join(c for c in text if c.isprintable())[:length]
