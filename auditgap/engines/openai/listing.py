"""What an endpoint lists of its models, as far as it may be shown.

found = await listed(client, key, seconds=30.0)     # None: it lists nothing that can be read
told_of(found, "ft:gpt-4o-mini:me::law", key)       # {"id": …, "owned_by": …, "created": …}
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from auditgap.engines.openai.answers import NoAnswer, plain_word
from auditgap.types import Document

if TYPE_CHECKING:
    from openai import AsyncOpenAI

#: What servers say of a model that tells it from another of the same name.
_WORDS = ("id", "owned_by", "root", "parent")
Entries = Sequence[Mapping[str, Any]]


async def listed(client: AsyncOpenAI, key: str, seconds: float) -> Entries | None:
    """The entries of `/models`, each with an `id` that may be shown."""
    import openai

    try:
        async with asyncio.timeout(seconds):
            raw = await client.models.with_raw_response.list()
            data = json.loads(raw.http_response.content)["data"]
        return [{**entry, "id": plain_word(entry["id"], key, 200)} for entry in data]
    except (
        openai.OpenAIError,
        TimeoutError,
        NoAnswer,
        ValueError,
        TypeError,
        KeyError,
        RecursionError,
    ):
        return None


def told_of(entries: Entries | None, model: str, key: str) -> Document:
    """What they say of one model; empty where they do not list it."""
    own = next((entry for entry in entries or () if entry["id"] == model), {})
    told: Document = {name: plain_word(own[name], key, 200) for name in _WORDS if own.get(name)}
    created = own.get("created")
    return {**told, "created": created} if isinstance(created, int) else told
