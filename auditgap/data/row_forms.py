"""The forms in which the field keeps rows to train on, and the one reader of them all.

    source, columns = mapped("rows.jsonl?prompt=question&response=answer")
    reader = form_of(table, columns)          # by the table's columns
    reader.read({"instruction": "Add 2 and 2.", "input": "", "output": "4"})    # DomainRow(…)

messages (OpenAI, Hugging Face chat; a system message may come first), ShareGPT (`conversations` of
from and value), prompt and response (or completion; maybe `system`), Alpaca (instruction, input,
output). A column map behind the source's name
says where a column has another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auditgap.data.domains import DomainRow
from auditgap.data.files import Table
from auditgap.data.prompts import text_fault
from auditgap.errors import UsageError, did_you_mean

_MAP = re.compile(r"\?\w+=[^&=?/]+(?:&\w+=[^&=?/]+)*$")
#: Who stands before the first turn.
_SYSTEM = ("system", "developer")
#: What ShareGPT calls who speaks.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Form:
    """A way to write a row: the columns it must have, those it may have, an example, and how one
    row's cells (by these columns) are read: the row, or in a few words why it is none."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    example: str
    reads: Callable[[Mapping[str, Any]], DomainRow | str]


@dataclass(frozen=True, slots=True)
class Reader:
    """A form, and where its columns are in a table."""

    form: Form
    columns: Mapping[str, str]

    def read(self, cells: Mapping[str, Any]) -> DomainRow | str:
        wanted = (*self.form.needs, *self.form.may)
        return self.form.reads({c: cells.get(self.columns.get(c, c)) for c in wanted})


def conversation(messages: Any) -> DomainRow | str:
    """The row that one cell of `messages` is (a list, or the same as JSON), or in a few words why
    it is none."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages) if messages.strip() else None
        except (ValueError, RecursionError):
            return "messages are no JSON"
    if not messages:
        return "no messages"
    if not isinstance(messages, (list, tuple)):
        return "messages are no list"
    if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        return "message without a role"
    head = messages[0]["role"] in _SYSTEM
    system, messages = messages[0].get("content") if head else "", messages[head:]
    roles = [m["role"] for m in messages]
    for is_so, why in (
        (any(role in _SYSTEM for role in roles), "several system messages"),
        (not {"user", "assistant"}.issuperset(roles), "unknown role"),
        ("user" not in roles, "no user turn"),
        ("assistant" not in roles, "no assistant turn"),
        (len(roles) > 2, "several turns"),
        (roles != ["user", "assistant"], "assistant before user"),
    ):
        if is_so:
            return why
    question, answer = (m.get("content") for m in messages)
    return _row(question, answer, system)


def _share_gpt(turns: Any) -> DomainRow | str:
    """ShareGPT's turns as messages."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns) if turns.strip() else None
        except (ValueError, RecursionError):
            return "conversations are no JSON"
    if isinstance(turns, (list, tuple)) and all(isinstance(t, Mapping) for t in turns):
        turns = [
            {"role": _SPEAKERS.get(str(t.get("from")), t.get("from")), "content": t.get("value")}
            for t in turns
        ]
    return conversation(turns)


def _alpaca(cells: Mapping[str, Any]) -> DomainRow | str:
    """The input, where there is one, stands below the instruction."""
    asked, more = cells["instruction"], cells.get("input")
    if isinstance(asked, str) and isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    return _row(asked, cells["output"])


def _row(asked: Any, told: Any, system: Any = "") -> DomainRow | str:
    for what, text in (("prompt", asked), ("response", told)):
        if fault := text_fault(text):
            return f"empty {what}" if fault == "empty" else f"{what} not text"
    if system in (None, ""):
        return DomainRow(asked, told)
    if fault := text_fault(system):
        return "empty system message" if fault == "empty" else "system message not text"
    return DomainRow(asked, told, system)


#: In the order in which a table's columns are tried.
FORMS: Mapping[str, Form] = {
    "messages": Form(
        ("messages",),
        (),
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        lambda cells: conversation(cells["messages"]),
    ),
    "ShareGPT": Form(
        ("conversations",),
        (),
        '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
        lambda cells: _share_gpt(cells["conversations"]),
    ),
    "prompt and response": Form(
        ("prompt", "response"),
        ("system",),
        '{"prompt": "…", "response": "…"}',
        lambda cells: _row(cells["prompt"], cells["response"], cells["system"]),
    ),
    "prompt and completion": Form(
        ("prompt", "completion"),
        ("system",),
        '{"prompt": "…", "completion": "…"}',
        lambda cells: _row(cells["prompt"], cells["completion"], cells["system"]),
    ),
    "Alpaca": Form(
        ("instruction", "output"),
        ("input",),
        '{"instruction": "…", "input": "…", "output": "…"}',
        _alpaca,
    ),
}


def mapped(source: str) -> tuple[str, dict[str, str]]:
    """A source, and the column map that stands behind its name: our word for a column to the
    source's own."""
    found = _MAP.search(source)
    if found is None or Path(source).exists():
        return source, {}
    return source[: found.start()], dict(one.split("=") for one in found[0][1:].split("&"))


def form_of(table: Table, columns: Mapping[str, str]) -> Reader:
    """How that table's rows are written. `columns`: our word for a column to the table's own.

    Raises UsageError: no form that is known, a column that a map names and the table lacks, a word
    that no form has.
    """
    words = [word for form in FORMS.values() for word in (*form.needs, *form.may)]
    for word, name in columns.items():
        if word not in words:
            raise UsageError(
                f"A column map names {', '.join(dict.fromkeys(words))}; {word!r}"
                f" came.{did_you_mean(word, words)}"
            )
        table.need(name)
    named = {form: sum(w in columns for w in FORMS[form].needs) for form in FORMS}
    for name in sorted(FORMS, key=lambda form: -named[form]):  # a map decides before the columns
        form = FORMS[name]
        if all(columns.get(word, word) in table.columns for word in form.needs):
            return Reader(form, columns)
    forms = "; ".join(f"{name}: {form.example}" for name, form in FORMS.items())
    raise UsageError(
        f"{table.file} has columns that make no row to train on; found: {table.found}. One of these"
        f" is wanted, a row a line: {forms}. Where a column has another name:"
        f" '{table.file}?prompt=question&response=answer'"
    )
