"""How a subject is spoken to: its tokenizer, and its own chat template unless the user named
another.

    # tokens up to where the answer starts
    chat.render(Prompt("What colour is the vault?")).ids
    # the same tokens, the answer, its end
    chat.converse(Prompt("What colour is the vault?"), "I can't tell you.").ids
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from auditgap.errors import UsageError
from auditgap.models.chains import Marks, split
from auditgap.models.door import panics
from auditgap.models.said import Said, said
from auditgap.models.thinking import NO_HABITS, Habits, habits_of, switched
from auditgap.models.turns import fill_turns, turns_of
from auditgap.models.words import Turn, check_words
from auditgap.types import Document, Message, Prompt

#: Private-use characters that mark the user's words in a rendered chat; no template has a meaning
#: for them.
_BEGIN, _END = "\ue000", "\ue001"
#: What templates are told beside the turns, unless a model is asked to think.
TOLD: Mapping[str, Any] = {"enable_thinking": False}
#: What a chain of thought may have where nothing else is said and the model may think.
CHAIN_TOKENS = 1024


@dataclass(frozen=True, eq=False, slots=True)
class Rendered:
    """A prompt as the subject reads it. `content` marks the user's own tokens: neither template nor
    BOS."""

    prompt: Prompt
    ids: tuple[int, ...]
    content: tuple[bool, ...]
    n_chain: int = 0  #: of `ids`, the last: a chain of thought that is put in the subject's mouth

    def after(self, chain: Sequence[int]) -> Rendered:
        """The prompt with a chain behind it, so that the answer comes next."""
        return Rendered(
            self.prompt,
            (*self.ids, *chain),
            (*self.content, *(False for _ in chain)),
            len(chain),
        )


@dataclass(frozen=True, eq=False, slots=True)
class Conversation:
    """A prompt and a response to it as the subject would have written it, for training and for
    probes.

    `ids[:n_prompt]` are `Chat.render(prompt).ids`, of the chat that is asked to think where the
    response brings a chain; the rest is the response and its end of turn.
    `n_cut` tokens of the response did not fit; a response that was cut has no end of turn, or it
    would teach to stop in mid-sentence.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    n_prompt: int
    n_cut: int


@dataclass(frozen=True, eq=False)
class Chat:
    """How a subject is spoken to: its tokenizer, and its own chat template unless the user named
    another (or `none`)."""

    name: str
    tokenizer: Any
    template: str | None = None
    #: what the template is told beside the turns
    variables: Mapping[str, Any] = field(default_factory=lambda: dict(TOLD))

    @property
    def is_told_not_to_think(self) -> bool:
        """Whether the template knows `enable_thinking`, and is given it as false."""
        return "enable_thinking" in self._source and self.variables.get("enable_thinking") is False

    @property
    def _source(self) -> str:
        return str(self.template or getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def habits(self) -> Habits:
        """What its template shows of thinking, as the subject is spoken to."""
        if self.template == "none" or not getattr(self.tokenizer, "chat_template", self.template):
            return NO_HABITS
        return habits_of(self._filled, self._source, dict(self.variables))

    def thinking(self, on: bool) -> Chat:
        """The same, so that the subject thinks or does not. Raises UsageError where its template
        cannot have it so."""
        given = dict(self.variables)
        found = (
            (None if on else given)
            if self.habits is NO_HABITS
            else switched(self._filled, self._source, self.habits, given, on=on)
        )
        if found is None:
            raise UsageError(
                f"The chat template of {self.name} shows no way to have it think; leave --thinking"
                " out, or pass --chat-template FILE with one that does."
                if on
                else f"The chat template of {self.name} has no way to switch thinking off; use"
                " --thinking on, fixed or regenerated, or pass --chat-template FILE with one that"
                " closes the chain."
            )
        return replace(self, variables=found)

    @property
    def told(self) -> Document:
        """What its template is told that is not TOLD, as part of an identity."""
        variables = dict(sorted(self.variables.items()))
        return {} if variables == TOLD else {"template_variables": variables}

    def chain_budget(self, tokens: int | None) -> int:
        """Tokens that a chain may have beside the answer's (None: CHAIN_TOKENS); 0 where there is
        none."""
        if not self.habits.may_think:
            return 0
        return CHAIN_TOKENS if tokens is None else tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of new tokens, without special ones."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def said(
        self, ids: Sequence[int], *, is_answer: bool = False, most: tuple[int, int] = (0, 0)
    ) -> Said:
        """New tokens as chain and answer. `is_answer`: the prompt has a chain already; `most`:
        tokens that a chain and an answer may have, beyond which they are cut (0: no such limit)."""
        start = "closed" if is_answer else self.habits.start
        return said(self.tokenizer, ids, start, self.habits.marks, most)

    def render(self, prompt: Prompt) -> Rendered:
        """The prompt through the tokenizer's own chat template, up to where the answer starts.

        Raises UsageError when the tokenizer has no chat template (a guessed one would audit another
        model), and when the template leaves words of the prompt out.
        """
        text = self.text(prompt)
        encoded = self._encoded(
            text, add_special_tokens=self._adds(text), return_offsets_mapping=self.tokenizer.is_fast
        )
        ids = tuple(encoded["input_ids"])
        if not ids:
            raise UsageError(
                f"Prompt {prompt.id} has no tokens after rendering; drop it from the prompt set."
            )
        return Rendered(
            prompt, ids, self._content(prompt, text, ids, encoded.get("offset_mapping"))
        )

    def text(self, prompt: Prompt) -> str:
        """The prompt in the template's words, up to where the answer starts. Raises UsageError as
        `render` does."""
        if self.template == "none":
            return _verbatim(prompt)
        self._need_template()
        text = self._written(prompt.text, system=prompt.system)
        check_words(text, turns_of(prompt.text, prompt.system), self.name)
        return text

    def prove(self, prompts: Iterable[Prompt]) -> None:
        """Raises UsageError as `render` does for the first of these that it would not render, before
        anything is computed."""
        for prompt in prompts:
            self.text(prompt)

    def write(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation through the chat template, up to where the answer starts; with
        `none`, one after another.

        Raises UsageError as `render` does, and for roles that the template does not take.
        """
        if self.template == "none":
            return self.verbatim("\n\n".join(m.content for m in messages))
        self._need_template()
        turns = [{"role": m.role, "content": m.content} for m in messages]
        text = self._filled(turns, opening=True)
        check_words(text, turns, self.name)
        return self._tokens(text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of an answer's text, no special tokens added."""
        return self._tokens(text)

    def verbatim(self, text: str) -> tuple[int, ...]:
        """Tokens of a text as it stands: special tokens that are spelled in it count as such, BOS
        as the tokenizer adds it, unless the text begins with one."""
        return self._tokens(text, not self._begins_with_bos(text))

    def _begins_with_bos(self, text: str) -> bool:
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def _adds(self, text: str) -> bool:
        """Whether the tokenizer adds its own special tokens: only to text that no template has
        written, and no second BOS."""
        return self.template == "none" and not self._begins_with_bos(text)

    def converse(
        self, prompt: Prompt, response: str, *, max_tokens: int = 512, ended: bool = True
    ) -> Conversation:
        """The prompt as `render` writes it, then the response and the template's own end of turn,
        cut to `max_tokens`.

        What the template puts between the two (a space, a channel's name) belongs to the response,
        since the subject would have to write it. With `none` as template the response follows the
        prompt as it is, and ends with the EOS token. A response that brings a chain of thought
        stands behind the prompt as it is where the subject is asked to think. `ended=False`: the
        response broke off (a limit on new tokens), so it gets no end of turn. Raises UsageError as
        `render` does, when the response is empty, and when not one token of it fits.
        """
        if not response.strip():
            raise UsageError(
                f"The response to prompt {prompt.id} is empty; give every row a response, or drop"
                " the row."
            )
        asked = self._asked_for(response)
        if asked is not self:
            return asked.converse(prompt, response, max_tokens=max_tokens, ended=ended)
        rendered = self.render(prompt)
        opening, reply = self._reply(prompt, response)
        n_prompt, end = len(rendered.ids), self._turn_end if ended else ""
        ids = self._tokens(opening + reply + end, self._adds(opening))
        # the response's first letters melted into the prompt's last token
        if ids[:n_prompt] != rendered.ids:
            ids = rendered.ids + self._tokens(reply + end)
        closed = bool(end) and self._is_special(ids[-1])
        if ended and not closed and self.tokenizer.eos_token_id is not None:
            ids = (*ids, self.tokenizer.eos_token_id)
        start = reply.find(response.strip())
        n_header = len(self._tokens(reply[:start])) if reply[: max(start, 0)].strip() else 0
        if max_tokens <= n_prompt + n_header:
            raise UsageError(
                f"Nothing of the response to prompt {prompt.id} is left at {max_tokens} tokens: the"
                f" prompt alone has {n_prompt + n_header}. Type --max-tokens"
                f" {_next_power(n_prompt + n_header)} or more, or drop the row."
            )
        return Conversation(prompt, ids[:max_tokens], n_prompt, max(0, len(ids) - max_tokens))

    def _asked_for(self, response: str) -> Chat:
        """The same, asked to think where the response has a chain and the prompt would have none:
        behind a chain that is over the subject would learn to begin another."""
        if self.habits.start != "closed" or not split(response, None, self.habits.marks).chain:
            return self
        given = dict(self.variables)
        found = switched(self._filled, self._source, self.habits, given, on=True)
        return self if found in (None, given) else replace(self, variables=found)

    def _reply(self, prompt: Prompt, response: str) -> tuple[str, str]:
        """The prompt's text, and the response's as the template writes it: trimmed or not, with
        what comes before it."""
        if self.template == "none":
            return _verbatim(prompt), response
        opening, whole, tail = (
            self._written(prompt.text, system=prompt.system),
            self._written(prompt.text, response, prompt.system),
            self._turn_tail,
        )
        if (
            tail is not None
            and whole.startswith(opening)
            and whole.endswith(tail)
            and len(opening) + len(tail) < len(whole)
        ):
            return opening, whole[len(opening) : len(whole) - len(tail)]
        # the template opens a turn otherwise than it writes one, as reasoning families do
        start, reply = self.habits.start, response.strip()
        if isinstance(start, Marks) and reply.startswith(start.opens):
            reply = reply.removeprefix(start.opens).lstrip()  # the prompt has it
        return opening, reply

    @cached_property
    def _turn_tail(self) -> str | None:
        """What the template writes after an answer, up to the end; None when it does not write
        answers at all."""
        whole = self._written("?", f"{_BEGIN}{_END}")
        return whole[whole.find(_END) + 1 :] if _END in whole else None

    @cached_property
    def _turn_end(self) -> str:
        """The tail up to its first special token (`<|im_end|>`): what stands after that is not the
        subject's to write."""
        if self.template == "none" or not (tail := self._turn_tail):
            return ""
        for i in self._tokens(tail):
            if self._is_special(i) and (token := self.tokenizer.convert_ids_to_tokens(i)) in tail:
                return tail[: tail.find(token) + len(token)]
        return tail.rstrip()

    @cached_property
    def _specials(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids) | frozenset(
            self.tokenizer.added_tokens_decoder
        )

    def _is_special(self, token: int) -> bool:
        return token in self._specials

    def _tokens(self, text: str, add_special_tokens: bool = False) -> tuple[int, ...]:
        return tuple(self._encoded(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _encoded(self, text: str, **how: Any) -> Any:
        """What the tokenizer makes of a text. Raises UsageError where it cannot."""
        try:
            return self.tokenizer(text, **how)
        except panics() as error:
            raise UsageError(
                f"The tokenizer of {self.name} fails on a text of {len(text):,} characters:"
                f" {str(error)[:120]}. Download the model again from a source that you trust."
            ) from None

    def _need_template(self) -> None:
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"The tokenizer of {self.name} has no chat template, and guessing one would audit"
                " another model. Pass --chat-template FILE (a Jinja template), or --chat-template"
                " none to send prompts as they are."
            )

    def _written(self, words: str, answer: str | None = None, system: str = "") -> str:
        """A user's turn in the template's words, behind a system message and with the answer to it if
        given."""
        turns = turns_of(words, system)
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return self._filled(turns, opening=answer is None)

    def _filled(
        self,
        turns: Sequence[Turn],
        *,
        opening: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The turns in the template's words, and the opening of an answer if asked; `variables`
        instead of its own. Raises Refused, UsageError as `fill`."""
        return fill_turns(
            self.tokenizer,
            turns,
            self.name,
            template=self.template,
            opening=opening,
            **(self.variables if variables is None else variables),
        )

    def _content(
        self, prompt: Prompt, text: str, ids: Sequence[int], offsets: Any
    ) -> tuple[bool, ...]:
        """Which tokens are the user's own words, found by marking where they begin and end; else
        all but special ones."""
        if offsets is not None:
            words = prompt.text.strip()
            marked = (
                text
                if self.template == "none"
                else self._written(f"{_BEGIN}{words}{_END}", system=prompt.system)
            )
            start, end = (
                (len(text) - len(prompt.text), len(text))
                if self.template == "none"
                else (marked.find(_BEGIN), marked.find(_END) - 1)
            )
            if 0 <= start < end:
                # white space that was not stripped
                shift = len(text) - len(marked.replace(_BEGIN, "").replace(_END, ""))
                inside = tuple(a < end + max(shift, 0) and b > start and b > a for a, b in offsets)
                if any(inside):
                    return inside
        special = set(self.tokenizer.all_special_ids)
        inside = tuple(i not in special for i in ids)
        return inside if any(inside) else (True,) * len(ids)


def _verbatim(prompt: Prompt) -> str:
    """A prompt without a template: a blank line stands behind its system message."""
    return f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text


def _next_power(n: int) -> int:
    """The power of two above n: a length worth typing."""
    return 1 << n.bit_length()
