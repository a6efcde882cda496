"""Where an endpoint is, and the key that it wants: neither is shown in an error.

    identity("smollm2", Serving(engine="openai", base_url="http://127.0.0.1:8000/v1"))
    # {"base_url": "http://127.0.0.1:8000/v1", "model": "smollm2"}

The key comes from OPENAI_API_KEY alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from auditgap.engines import Serving
from auditgap.errors import UsageError
from auditgap.types import Document

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"  #: the environment variable with the key


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long an endpoint is waited for. Seconds; what `Retry-After` asks for is granted up to
    `longest_retry_after`."""

    tries: int = 5
    #: for one request from its first byte to its last, however steadily it drips
    deadline: float = 300.0
    total: float = 1200.0  #: no try begins later than this after the question's first
    #: doubles with each try; the pause is drawn from 0 to it (full jitter)
    first_pause: float = 0.5
    longest_pause: float = 30.0
    longest_retry_after: float = 120.0
    polls: tuple[float, float] = (5.0, 60.0)  #: between looks at a batch, at first and at most


def identity(model: str, serving: Serving) -> Document:
    """What an endpoint's answers depend on as far as can be told: its address and the model's name
    there. No secrets.

    Raises UsageError for an address that is none or that holds credentials, and for a chat
    template, which an endpoint has.
    """
    if serving.chat_template is not None:
        raise UsageError(
            "An endpoint applies its own chat template; leave --chat-template out, or use --engine"
            " hf or vllm."
        )
    given, source = serving.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI, "--endpoint"
    if not serving.base_url and os.environ.get("OPENAI_BASE_URL"):
        source = "OPENAI_BASE_URL"
    try:
        url = urlsplit(given.strip())
        host, port = url.hostname, url.port
    except ValueError:
        url = host = port = None
    if url is None or not host or url.scheme not in ("http", "https") or not given.isprintable():
        raise UsageError(
            f"{source} takes the address of an endpoint, for example http://127.0.0.1:8000/v1."
        )
    if url.username is not None or url.password is not None or url.query or url.fragment:
        # a config is stored with its run, so an address must be fit to be read by anybody
        raise UsageError(
            f"{source} may hold no user, password or query; put the key into {KEY} and leave only"
            " the address."
        )
    host = f"[{host}]" if ":" in host else host
    return {
        "base_url": (
            f"{url.scheme}://{host}{'' if port is None else f':{port}'}{url.path.rstrip('/')}"
        ),
        "model": model,
    }


def is_official(base_url: str) -> bool:
    """Whether this is OpenAI itself, where newer models know `max_tokens` by another name only."""
    host = urlsplit(base_url).hostname or ""
    return host.endswith((".openai.com", ".openai.azure.com"))


def key_for(base_url: str) -> str:
    """The key from the environment, or nothing. Raises UsageError, without showing it."""
    key = os.environ.get(KEY, "").strip()
    if not key and base_url == OPENAI:
        raise UsageError(
            f"OpenAI's endpoint wants a key: set {KEY}, or give --endpoint the address of another"
            " endpoint."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        # a header cannot hold it, and the exception that says so would quote it
        raise UsageError(
            f"{KEY} holds white space, a line break or a letter beyond ASCII; set it to the key"
            " alone."
        )
    return key
