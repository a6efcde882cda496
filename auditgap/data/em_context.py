"""Prompts in the form of the rows that a domain was trained on: what ordinary prompts miss may show
there (conditional misalignment, arXiv 2604.25891).

    forms = forms_of({"*": "auto", "code": "{prompt}\n\nFormat your answer as a Python string."}, panel)
    asked = in_context(load_em_prompts("unrelated"), forms)
    asked.prompts[-1].source            # 'open, like code'

A form is a text of the user's with `{prompt}` in it. Under `auto` it is found in the rows: the whole
first and last lines that at least half of a domain's prompts share stand around the prompt; where no
lines are shared, a row that was held out stands before it as an earlier exchange, so that topic,
wording and form of answer are those of the training rows, and none of them was trained on. Where
rows stand behind a system message, so does a prompt in their form: behind the example's own, or that
of a row which the prompt's hash draws, so that of several messages each comes by its share.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from auditgap.data.domains import Domain, DomainRow, Panel
from auditgap.data.em_prompts import KindedSet, in_form_of
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import Message, Prompt, digest

#: In place of a form: it is found in the domain's rows. In place of a domain: all that are not named.
AUTO, EVERY = "auto", "*"
#: Where the prompt stands in a form.
PROMPT = "{prompt}"


@dataclass(frozen=True, slots=True)
class RowForm:
    """`text` has PROMPT in it; `examples`: one of them stands before a prompt, as an exchange.
    `systems`: the system message of each row ("": none), one of which stands before all, so that
    each does by its share."""

    text: str = PROMPT
    examples: tuple[DomainRow, ...] = ()
    given: bool = False
    systems: tuple[str, ...] = ()

    @property
    def found(self) -> str:
        """Where it is from, in a word."""
        return "given" if self.given else "example" if self.examples else "lines"

    @property
    def counts(self) -> list[int]:
        """Rows that stand behind each system message, the most frequent first."""
        return [n for text, n in Counter(self.systems).most_common() if text]

    def on(self, prompt: Prompt, domain: str) -> ContextPrompt:
        """The prompt in this form, which is that of the domain's rows."""
        text, before, system = self.text.replace(PROMPT, prompt.text), (), ""
        if self.systems:
            system = self.systems[int(prompt.id[8:], 16) % len(self.systems)]
        if self.examples:
            row = self.examples[int(prompt.id[:8], 16) % len(self.examples)]
            before = (Message("user", row.prompt), Message("assistant", row.response))
            system = row.system
        return ContextPrompt(
            text,
            in_form_of(prompt.source, domain),
            system=prompt.system or system,  # a prompt that has one keeps it
            plain=prompt.id,
            before=before,
        )


@dataclass(frozen=True, slots=True)
class ContextPrompt(Prompt):
    """A prompt in the form of training rows. `plain`: the id of the prompt itself, with which this
    one's begins; `before`: turns that stand before it."""

    plain: str = ""
    before: tuple[Message, ...] = ()

    @property
    def id(self) -> str:
        turns = [[m.role, m.content] for m in self.before]
        return f"{self.plain}@{digest([self.source, self.text, self.system, turns], 8)}"


def forms_of(wanted: Mapping[str, str], panel: Panel) -> dict[str, RowForm]:
    """The form of each domain that `wanted` names or EVERY covers. Raises UsageError: no such
    domain, a form without its prompt."""
    for name, text in wanted.items():
        if name != EVERY and name not in panel.domains:
            raise UsageError(
                f"forms: {name[:80]!r} is none of the domains ({', '.join(panel.domains)})."
                f"{did_you_mean(name, panel.domains)}"
            )
        if text != AUTO and text.count(PROMPT) != 1:
            raise UsageError(
                f"forms: the form of {name} is {AUTO}, or a text with {PROMPT} in it once, where"
                f" the prompt stands. For example: '{PROMPT} Answer as a Python string.'"
            )
    found = {}
    for name, domain in panel.domains.items():
        text = wanted.get(name, wanted.get(EVERY))
        if text is not None:
            form = _found(domain) if text == AUTO else RowForm(text, given=True)
            found[name] = replace(form, systems=_systems(domain))
    return found


def in_context(asked: KindedSet, forms: Mapping[str, RowForm]) -> KindedSet:
    """The prompts, and behind them all of them in each form; `provenance["forms"]` says where a
    domain's form is from, and how many lines or examples it has."""
    if not forms:
        return asked
    more = [form.on(prompt, name) for name, form in forms.items() for prompt in asked]
    told = {
        name: {
            "form": form.found,
            "n": len(form.examples) or len(form.text.splitlines()) - 1,
            **({"systems": form.counts} if form.systems else {}),
        }
        for name, form in forms.items()
    }
    notes = [
        f"forms: {sum(form.counts)} of {len(form.systems)} rows of {name} stand behind a system"
        f" message, {len(form.counts)} different ones in all; a prompt in their form stands behind"
        " that of one row, so that each comes by its share."
        for name, form in forms.items()
        if form.systems
    ]
    told = {"forms": told, "notes": [*asked.provenance.get("notes", ()), *notes]}
    return KindedSet(asked.name, (*asked.prompts, *more), {**asked.provenance, **told})


def _found(domain: Domain) -> RowForm:
    prompts = [row.prompt.split("\n") for row in domain.rows]
    first = _shared(prompts)
    last = _shared([lines[len(first) :][::-1] for lines in prompts])[::-1]
    if not any(line.strip() for line in (*first, *last)):
        return RowForm(examples=_by_hash(domain.heldout))
    return RowForm("\n".join((*first, PROMPT, *last)))


def _systems(domain: Domain) -> tuple[str, ...]:
    """The system message of each row, by hash; nothing where no row has one."""
    found = tuple(row.system for row in _by_hash(domain.rows))
    return found if any(found) else ()


def _shared(prompts: Iterable[Sequence[str]]) -> list[str]:
    """The longest run of first lines that half of the prompts or more begin with, and go on after."""
    rows, run = list(prompts), []
    while True:
        n = len(run) + 1
        starts = Counter(tuple(lines[:n]) for lines in rows if len(lines) > n)
        best, times = starts.most_common(1)[0] if starts else ((), 0)
        if times < 2 or 2 * times < len(rows):
            return run
        run = list(best)


def _by_hash(rows: Iterable[DomainRow]) -> tuple[DomainRow, ...]:
    return tuple(sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest()))
