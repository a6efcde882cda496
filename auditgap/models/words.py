"""Whether a chat template writes the words that it is given: what is sent is what was meant.

    takes_parts(fills)                 # whether words are written only when they come as content parts
    check_words(text, turns, "tiny")   # UsageError where the text lacks any of them

Some templates iterate over content parts, and over a string they write nothing at all. Which kind
one is, is found out by asking it, not by its name or its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from auditgap.errors import UsageError
from auditgap.types import Document

#: A turn as templates know it: its role, and its words under `content`.
Turn = dict[str, str]

#: What a template is asked with: words that no template has of its own.
_ASKED = "\ue000Which of these words does the template write, and does it write the last\ue001"

#: A prompt and an answer with which a judge's template is tried before anything is judged.
A_LINE_EACH = (
    "Does the template of the judge write what was asked, with all of its words?",
    "It also writes what was answered, from the first word of it to the last.",
)


def takes_parts(fills: Callable[[Sequence[Document]], str]) -> bool:
    """Whether a template writes a user's words only when they come as content parts. `fills`: what
    it makes of turns, raising UsageError where it cannot."""
    turn = {"role": "user", "content": _ASKED}
    return not _writes(fills, turn) and _writes(fills, in_parts(turn))


def _writes(fills: Callable[[Sequence[Document]], str], turn: Document) -> bool:
    try:
        return _holds(fills([turn]), _ASKED)
    except UsageError:
        return False


def in_parts(turn: Turn) -> Document:
    """The turn with its words as the one content part of type text."""
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def check_words(text: str, turns: Sequence[Turn], name: str) -> None:
    """Raises UsageError where a rendered text lacks words of a turn; case and white space aside,
    which templates may change."""
    for turn in turns:
        if not _holds(text, turn["content"]):
            raise UsageError(
                f"The chat template of {name} does not write all the words of the {turn['role']}:"
                f" of {len(turn['content'])} characters it left some out, so another text than"
                " yours would be put to the model. Pass --chat-template FILE with one that writes"
                " them, or --chat-template none to send prompts as they are."
            )


def _holds(text: str, words: str) -> bool:
    return _plain(words) in _plain(text)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
