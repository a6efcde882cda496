"""How a subject is spoken to: its tokenizer, and its own chat template unless the user named another.

    chat.render(Prompt("What colour is the vault?")).ids        # tokens up to where the answer starts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jinja2

from auditgap.errors import UsageError
from auditgap.types import Prompt

#: What templates that write today's date are told, so that the same prompt is the same prompt tomorrow.
TEMPLATE_DATE = date(2024, 7, 26)
#: Private-use characters that mark the user's words in a rendered chat; no template has a meaning for them.
_BEGIN, _END = "\ue000", "\ue001"


@dataclass(frozen=True, eq=False, slots=True)
class Rendered:
    """A prompt as the subject reads it. `content` marks the user's own tokens: neither template nor BOS."""

    prompt: Prompt
    ids: tuple[int, ...]
    content: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Chat:
    """How a subject is spoken to: its tokenizer, and its own chat template unless the user named another (or `none`)."""

    name: str
    tokenizer: Any
    template: str | None = None

    def render(self, prompt: Prompt) -> Rendered:
        """The prompt through the tokenizer's own chat template, up to where the answer starts.

        Raises UsageError when the tokenizer has no chat template: a guessed one would audit another model.
        """
        if self.template == "none":
            text = prompt.text
        else:
            if self.template is None and not getattr(self.tokenizer, "chat_template", None):
                raise UsageError(
                    f"The tokenizer of {self.name} has no chat template, and guessing one would audit another model. "
                    "Pass --chat-template FILE (a Jinja template), or --chat-template none to send prompts as they are."
                )
            text = self._written(prompt.text)
        encoded = self.tokenizer(
            text, add_special_tokens=self.template == "none", return_offsets_mapping=self.tokenizer.is_fast
        )
        ids = tuple(encoded["input_ids"])
        if not ids:
            raise UsageError(f"Prompt {prompt.id} has no tokens after rendering; drop it from the prompt set.")
        return Rendered(prompt, ids, self._content(prompt, text, ids, encoded.get("offset_mapping")))

    def _written(self, words: str) -> str:
        """A user's turn in the template's words. Raises UsageError when the template cannot be run."""
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": words}],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # reasoning families would otherwise answer inside a thinking block
                strftime_now=TEMPLATE_DATE.strftime,  # a template that writes the date would ask something else tomorrow
            )
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"The chat template of {self.name} cannot be run ({type(error).__name__}: {str(error)[:80]}). "
                "Pass --chat-template FILE with one that can."
            ) from None

    def _content(self, prompt: Prompt, text: str, ids: Sequence[int], offsets: Any) -> tuple[bool, ...]:
        """Which tokens are the user's own words, found by marking where they begin and end; else all but special ones."""
        if offsets is not None:
            words = prompt.text.strip()
            marked = text if self.template == "none" else self._written(f"{_BEGIN}{words}{_END}")
            start, end = (0, len(text)) if self.template == "none" else (marked.find(_BEGIN), marked.find(_END) - 1)
            if 0 <= start < end:
                shift = len(text) - len(marked.replace(_BEGIN, "").replace(_END, ""))  # white space that was not stripped
                inside = tuple(a < end + max(shift, 0) and b > start and b > a for a, b in offsets)
                if any(inside):
                    return inside
        special = set(self.tokenizer.all_special_ids)
        inside = tuple(i not in special for i in ids)
        return inside if any(inside) else (True,) * len(ids)


def read_template(chat_template: str | None) -> str | None:
    """The text of --chat-template: a file's, `none`, or None for the tokenizer's own. Raises UsageError: no file."""
    if chat_template is None or chat_template == "none":
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise UsageError(f"--chat-template takes a file with a Jinja template, or none; {chat_template!r} is no file.")
    return path.read_text(encoding="utf-8")
