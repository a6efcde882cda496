"""How a chat template has its model think: found by asking the template, not by what its variables
are called.

    habits = habits_of(write, source)
    habits.start        # Marks: the template opens a chain; "closed": it ends one; None: neither
    switched(write, source, habits, on=False)   # {'enable_thinking': False}; None: it cannot

`write(turns, opening=…, **variables)` renders. A template is asked what it writes where the answer
starts, what it puts around a chain that a turn brings along, and (to switch thinking on or off)
what each word that it uses changes when it is given as a variable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from auditgap.errors import AuditgapError
from auditgap.models.chains import CHANNEL, MARKS, Marks, Start
from auditgap.types import Document

_WORDS, _CHAIN, _ANSWER = "\ue002", "\ue003", "\ue004"
#: gpt-oss's, where the prompt itself opens the channel.
_HARMONY = Marks(f"{CHANNEL}analysis<|message|>", f"{CHANNEL}final<|message|>")
#: What a variable is given, to switch thinking off or on.
_OFF: tuple[Any, ...] = (False, "none", 0, "off")
_ON: tuple[Any, ...] = (True, "high", "on")
#: Words of a template that are tried as variables, at most.
_MOST_WORDS = 120
_CODE = re.compile(r"\{[{%].*?[%}]\}", re.S)
_LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_WORD = re.compile(r"(?<![.\w])[A-Za-z_]\w*")
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
_JINJA = set(
    "and block break call continue defined elif else endblock endcall endfor endif endmacro endset"
    " false filter for if in is loop macro namespace none not or range set true True False None"
    " raise_exception strftime_now".split()
)


class Write(Protocol):
    """Renders turns by a template; raises AuditgapError where it cannot."""

    def __call__(self, turns: Sequence[Document], *, opening: bool, variables: Document) -> str: ...


@dataclass(frozen=True)
class Habits:
    """What a template shows of thinking, with the variables that it was given."""

    start: Start = None  #: what it has written when the completion starts
    marks: tuple[Marks, ...] = MARKS  #: its own first
    thinks: bool = False  #: it shows any sign of a chain at all
    asks: bool = False  #: its prompt speaks of the marks, though it writes neither at its end

    @property
    def may_think(self) -> bool:
        """Whether a completion may begin with a chain."""
        return self.thinks and self.start != "closed"


#: Of a prompt that no template has written.
NO_HABITS = Habits()


def habits_of(write: Write, source: str, variables: Document) -> Habits:
    """What the template does with these variables. One that cannot be rendered has none."""
    own = _own_marks(write, variables)
    marks = (*own, *(one for one in MARKS if one not in own))
    try:
        text = write(_asked(), opening=True, variables=variables)
    except AuditgapError:
        return NO_HABITS
    tail = text.rpartition(_WORDS)[2]
    start = _start(tail, marks)
    speaks = any(one.opens.lower() in text.lower() for one in marks)
    signs = bool(own) or start is not None or any(one.opens in source for one in marks)
    return Habits(start, marks, signs or CHANNEL in source, speaks and start is None)


def switched(
    write: Write, source: str, habits: Habits, variables: Document, *, on: bool
) -> Document | None:
    """The variables under which the template has its model think, or not; None: it has none that
    does. `habits`: with these `variables`."""
    if not habits.thinks:
        return None if on else variables
    others = list(_others(write, source, variables, _ON if on else _OFF))
    if on:
        if habits.may_think and (habits.start is not None or habits.asks):
            return variables
        by = [v for v, h in others if isinstance(h.start, Marks)]
        by += [v for v, h in others if h.asks]
        by += [v for v, h in others if h.may_think and habits.start == "closed"]
        return by[0] if by else variables if habits.may_think else None
    if habits.start == "closed":
        return variables
    closed = [v for v, h in others if h.start == "closed"]
    if closed:
        return closed[0]
    if habits.start is None and not habits.asks:
        # it says nothing of thinking, but would if it were told to
        for _, other in _others(write, source, variables, _ON):
            if other.start is not None or other.asks:
                return variables
    silent = [v for v, h in others if h.start is None and not h.asks]
    return silent[0] if silent and (habits.asks or habits.start is not None) else None


def _others(
    write: Write, source: str, variables: Document, values: Sequence[Any]
) -> Iterator[tuple[Document, Habits]]:
    """What each word of the template changes when it is given one of the values."""
    code = " ".join(_CODE.findall(source))
    words = dict.fromkeys(_WORD.findall(_LITERAL.sub("''", code)))
    asked, seen = _asked(), set()
    for word in [w for w in words if w not in _GIVEN | _JINJA][:_MOST_WORDS]:
        for value in values:
            given = {**variables, word: value}
            try:
                text = write(asked, opening=True, variables=given)
            except AuditgapError:
                continue
            if text not in seen and _WORDS in text:
                seen.add(text)
                yield given, habits_of(write, source, given)


def _asked() -> list[Document]:
    return [{"role": "user", "content": _WORDS}]


def _start(tail: str, marks: Sequence[Marks]) -> Start:
    """What stands last behind the user's words: a mark that opens a chain, one that ends it, or
    none."""
    if tail.rstrip().endswith("<|message|>") and CHANNEL in tail:
        return "closed" if "final" in tail[tail.rfind(CHANNEL) :] else _HARMONY
    last: tuple[int, Start] = (-1, None)
    low = tail.lower()
    for one in marks:
        last = max(
            last,
            (low.rfind(one.opens.lower()), one),
            (low.rfind(one.closes.lower()), "closed"),
            key=lambda pair: pair[0],
        )
    return last[1]


def _own_marks(write: Write, variables: Document) -> tuple[Marks, ...]:
    """What the template puts around a chain that a turn brings along."""
    answer = {"role": "assistant", "content": _ANSWER}
    brought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _CHAIN)
    try:
        text = write([*_asked(), {**answer, **brought}], opening=False, variables=variables)
    except AuditgapError:
        return ()
    before, chain, rest = text.partition(_CHAIN)
    between, answered, _ = rest.partition(_ANSWER)
    if not chain or not answered or CHANNEL in before or CHANNEL in between:
        return ()
    before, between = before.rpartition(_WORDS)[2].strip(), between.strip()
    for one in MARKS:
        if before.lower().endswith(one.opens.lower()) and one.closes.lower() in between.lower():
            return (one,)
    opens, closes = before.split()[-1:], between.split()[:1]
    return (Marks(opens[0], closes[0]),) if opens and closes else ()
