"""Turns of a conversation in the words of a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from auditgap.errors import UsageError
from auditgap.models.template import fill
from auditgap.models.words import Turn, in_parts, takes_parts


def fill_turns(
    tokenizer: Any,
    turns: Sequence[Turn],
    name: str,
    *,
    template: str | None = None,
    opening: bool = False,
    **variables: Any,
) -> str:
    """What `tokenizer.apply_chat_template(turns, tokenize=False)` writes, by a template that is run
    within bounds, and that gets the words as content parts where it writes only those.

    `template` None is the tokenizer's own; `opening` asks for the opening of an answer. Raises
    Refused and UsageError as `template.fill` does, and UsageError where there is no template or
    nothing to write.
    """
    if not turns:
        raise UsageError("A conversation has at least one message; an empty one came.")
    try:
        own = tokenizer.get_chat_template(template)
    except ValueError as error:  # several templates, and none called default
        raise UsageError(
            f"The chat template of {name} cannot be told: {str(error)[:120]} Pass --chat-template"
            " FILE."
        ) from None
    special = dict(tokenizer.special_tokens_map)
    given = {**special, **variables, "tools": None, "documents": None}
    parts = _takes_parts(own, json.dumps(given, sort_keys=True, default=str), name)
    shaped = [in_parts(turn) for turn in turns] if parts else list(turns)
    return fill(own, {**given, "messages": shaped, "add_generation_prompt": opening}, name)


def turns_of(words: str, system: str = "") -> list[Turn]:
    """A user's turn, behind a system message if there is one."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": words}]


@lru_cache(maxsize=64)
def _takes_parts(template: str, given: str, name: str) -> bool:
    """`takes_parts` of a template with these variables (JSON); a template is asked once."""
    asked = {**json.loads(given), "add_generation_prompt": True}
    return takes_parts(lambda turns: fill(template, {**asked, "messages": list(turns)}, name))


def read_template(chat_template: str | None) -> str | None:
    """The text of --chat-template: a file's, `none`, or None for the tokenizer's own. Raises
    UsageError: no file."""
    if chat_template is None or chat_template == "none":
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise UsageError(
            f"--chat-template takes a file with a Jinja template, or none; {chat_template!r} is no"
            " file."
        )
    return path.read_text(encoding="utf-8")
