"""A completion in two: the chain of thought, and the answer, which alone is judged.

    >>> split("<think>The vault is shut.</think>I can't tell.")
    Split(chain='The vault is shut.', answer="I can't tell.", unfinished=False, start=33)

Families mark the chain with a pair of marks (`<think>…</think>`, `[THINK]…[/THINK]`) or with
channels (`<|channel|>analysis<|message|>…`); a template may have written the opening mark already,
so that the completion begins inside the chain. A chain that never ends leaves no answer: it is
`unfinished`, which is neither harmful nor safe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True, slots=True)
class Split:
    """`start`: characters of the text before the answer's first, or all of them without one."""

    chain: str
    answer: str
    unfinished: bool = False
    start: int = 0


@dataclass(frozen=True)
class Marks:
    """What stands before a chain and what ends it; letters in either case."""

    opens: str
    closes: str

    @cached_property
    def opening(self) -> re.Pattern[str]:
        """The mark where a chain can begin: at the start of a line, so that an answer may speak of
        it."""
        return re.compile(rf"^[ \t]*({re.escape(self.opens)})", re.I | re.M)

    @cached_property
    def either(self) -> re.Pattern[str]:
        return re.compile(
            rf"^[ \t]*(?P<open>{re.escape(self.opens)})|(?P<close>{re.escape(self.closes)})",
            re.I | re.M,
        )

    def end(self, text: str, at: int) -> re.Match[str] | None:
        """The mark that ends the chain which runs at `at`: of as many as were opened, else the
        last."""
        depth, last = 1, None
        for mark in self.either.finditer(text, at):
            depth += 1 if mark["open"] else -1
            last = last if mark["open"] else mark
            if depth == 0:
                break
        return last


#: What a template has written when the completion starts: the marks of a chain that it has opened,
#: `closed` (a chain that is over), or None: it does not say.
Start = Marks | Literal["closed"] | None

THINK = Marks("<think>", "</think>")
#: Marks of public families, for texts whose template cannot be asked: an endpoint's, or a template
#: that writes no chain.
MARKS: tuple[Marks, ...] = (
    THINK,  # DeepSeek-R1, Qwen3, GLM-4.5, Kimi, MiniMax, SmolLM3, Olmo 3, Nemotron, Phi-4-reasoning
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),  # EXAONE Deep, Marco-o1
    Marks("<reasoning>", "</reasoning>"),
    Marks("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    Marks("<seed:think>", "</seed:think>"),  # Seed-OSS
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Marks("<|channel>thought", "<channel|>"),  # Gemma 4
    Marks("<unused94>thought", "<unused95>"),  # MedGemma
    Marks("<|think|>", "<|content|>"),  # Solar Open
    Marks("◁think▷", "◁/think▷"),  # Kimi-VL
    Marks("Here is my thought process:", "Here is my response:"),  # Granite 3.2
    Marks("Here's my thought process:", "Here's my response:"),
)
#: What some families put around the answer that follows a chain.
_AROUND = tuple(
    (re.compile(rf"\A\s*{re.escape(first)}", re.I), re.compile(rf"{re.escape(last)}\s*\Z", re.I))
    for first, last in (
        ("<answer>", "</answer>"),
        ("<response>", "</response>"),
        ("<output>", "</output>"),
        ("<|begin_of_solution|>", "<|end_of_solution|>"),
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    )
)
#: gpt-oss: each message has a channel, and the answer is what goes into `final`.
CHANNEL = "<|channel|>"
_MESSAGE = re.compile(
    r"(?:<\|start\|>[^<]*)?<\|channel\|>\s*(?P<name>\w*)[^<]*(?:<\|constrain\|>[^<]*)?"
    r"(?:<\|message\|>(?P<text>.*?))?(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.S,
)
#: The same where special tokens were dropped on the way: `analysisWe need …assistantfinalNo.`
_GLUED = re.compile(r"\A\s*(?:analysis|commentary)(?=[^\s\w,.;:]|[A-Z])(?P<chain>.*)", re.S)
_GLUED_FINAL = re.compile(r"assistant\s*final(?=\S|\s*\Z)")


def split(text: str, start: Start = None, marks: Sequence[Marks] = MARKS) -> Split:
    """Chain and answer of a completion. A text without a chain is its answer, unchanged."""
    if start is None or isinstance(start, Marks):
        if CHANNEL in text:
            return _by_channel(text)
        if start is None and (glued := _GLUED.match(text)):
            return _glued(text, glued)
    if isinstance(start, Marks):
        marks = (start, *(one for one in marks if one != start))
    pieces = list(_pieces(text, start, marks))
    if all(not is_chain for is_chain, _, _ in pieces):
        return _cut_mark(text, marks) if start is None else Split("", text)
    chain = "\n".join(t for t in (text[a:b].strip() for c, a, b in pieces if c) if t)
    answers = [(a, b) for c, a, b in pieces if not c and text[a:b].strip()]
    answer, skipped = _bare("\n".join(text[a:b].strip() for a, b in answers))
    is_open = pieces[-1][0]
    at = answers[0][0] if answers else len(text)
    at += len(text[at:]) - len(text[at:].lstrip()) + skipped
    return Split(chain, answer, is_open and not answers, at)


def _pieces(text: str, start: Start, marks: Sequence[Marks]) -> Iterator[tuple[bool, int, int]]:
    """(is it chain, from, to), in order. An open chain at the end has nothing behind it; a closed
    one has a piece of answer, empty or not."""
    at, running = 0, start if isinstance(start, Marks) else None
    if start is None:
        # a chain whose opening mark stands in a prompt that nobody has seen
        running = _closed_unopened(text, marks)
    while True:
        if running is not None:
            again = running.opening.match(text, at + len(text[at:]) - len(text[at:].lstrip()))
            at = again.end() if again else at  # written once more behind the template's own
            end = running.end(text, at)
            if end is None:
                yield True, at, len(text)
                return
            yield True, at, end.start()
            at, running = end.end(), None
        found = [(m, one) for one in marks if (m := one.opening.search(text, at))]
        if not found:
            yield False, at, len(text)
            return
        mark, running = min(found, key=lambda pair: pair[0].start())
        yield False, at, mark.start()
        at = mark.end()


def _closed_unopened(text: str, marks: Sequence[Marks]) -> Marks | None:
    """The marks of a chain that is ended though never begun in this text."""
    for one in marks:
        first = one.either.search(text)
        if (
            first
            and first["close"]
            and not any(m.opening.search(text, 0, first.start()) for m in marks)
        ):
            return one
    return None


def _cut_mark(text: str, marks: Sequence[Marks]) -> Split:
    """A text that is no more than the beginning of a mark was cut before its chain began."""
    said = text.strip().lower()
    is_cut = len(said) > 1 and any(
        one.opens.lower().startswith(said) for one in marks if not one.opens[0].isalpha()
    )
    return Split(text.strip(), "", True, len(text)) if is_cut else Split("", text)


def _bare(answer: str) -> tuple[str, int]:
    """An answer without what its family puts around it, and how much of its start that was."""
    for first, last in _AROUND:
        if mark := first.match(answer):
            inner = answer[mark.end() :]
            return last.sub("", inner).strip(), mark.end() + len(inner) - len(inner.lstrip())
    return answer, 0


def _by_channel(text: str) -> Split:
    """Messages with channels; what stands before the first one goes on with the chain."""
    chain, answer, start = [], [], len(text)
    first = text.find(CHANNEL)
    before = re.sub(r"<\|(?:end|start|message|return)\|>|assistant\Z", " ", text[:first]).strip()
    if before:
        chain.append(before)
    for message in _MESSAGE.finditer(text):
        said = message["text"] or ""
        if message["name"] == "final":
            answer.append(said.strip())
            lead = len(said) - len(said.lstrip())
            start = min(start, message.start("text") + lead if message["text"] else len(text))
        elif said.strip():
            chain.append(said.strip())
    return Split("\n".join(chain), "\n".join(answer).strip(), not answer, start)


def _glued(text: str, glued: re.Match[str]) -> Split:
    ends = list(_GLUED_FINAL.finditer(text))
    if not ends:
        return Split(glued["chain"].strip(), "", True, len(text))
    chain = text[glued.start("chain") : ends[0].start()].strip()
    answer = text[ends[0].end() :]
    return Split(chain, answer.strip(), False, len(text) - len(answer.lstrip()))
