"""The ways in which a latent audit lets a model think: each is a subject of its own, with its own
clean pass, rows and gap.

    spoken(outline, "fixed").subject.name       # 'smollm2 (thinking fixed)'

`off` has the chat template switch thinking off. Else the model thinks first, and every target
stands where its answer starts, behind the chain of its clean pass. `on`: chain and answer are
written under the edit. `fixed`: the clean chain is put in its mouth and the answer follows under
the edit. `regenerated`: as `on`, and each answer once more behind the same chain without the edit.
"""

from __future__ import annotations

from dataclasses import replace

from auditgap.audits.latent.config import Span
from auditgap.models import Outline, Rendered
from auditgap.types import Document, Subject, ThinkingMode, in_mode


def spoken(outline: Outline, mode: ThinkingMode) -> Outline:
    """The subject, spoken to in this way. Raises UsageError where its template has no such way."""
    if mode == "auto":
        return outline
    subject = Subject(in_mode(outline.subject.name, mode), outline.subject.fingerprint)
    return replace(outline.asked_to_think(mode), subject=subject)


def mode_of(outline: Outline) -> ThinkingMode | None:
    """What `auto` comes to: thinking is on where the template does not rule it out; None: the model
    is not one that thinks."""
    if outline.thinking != "auto":
        return outline.thinking
    return "on" if outline.chat.habits.may_think else None


def settings(outline: Outline, tokens: int | None, span: Span) -> Document:
    """What of it stands in a cell's settings: nothing for a model that does not think, so that its
    keys are as ever."""
    mode = mode_of(outline)
    if mode is None:
        return {} if span == "prompt" else {"span": span}
    told = {"mode": mode, "tokens": outline.chat.chain_budget(tokens), "span": span}
    return {"thinking": {**told, "template": dict(sorted(outline.chat.variables.items()))}}


def span_of(rendered: Rendered, span: Span) -> tuple[int, int]:
    """Where an edit stands in a prompt with a chain behind it: [from, to) of its tokens. An
    answer's begins at the last of them, from which its first token is told."""
    n = len(rendered.ids)
    if span == "answer":
        return n - 1, n
    start = n - rendered.n_chain
    return (0, start) if span == "prompt" else (start, n)


def prompt_alone(rendered: Rendered) -> Rendered:
    """Without the chain that was put behind it."""
    n = len(rendered.ids) - rendered.n_chain
    if not rendered.n_chain:
        return rendered
    return Rendered(rendered.prompt, rendered.ids[:n], rendered.content[:n])


def thinks_first(mode: ThinkingMode | None) -> bool:
    """Whether targets stand behind a chain."""
    return mode in ("on", "fixed", "regenerated")
