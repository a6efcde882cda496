"""What was said under edits, and what judges say of all of it: a judge that is a language model is
opened once for many texts, not once a pack.

    spoken = speak(run, requests, names, what)      # pack by pack
    judged(session, spoken, clean, confirm=True)    # all of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from auditgap.audits.latent.rows import Clean
from auditgap.audits.scored import ScoredCompletion, Unjudged
from auditgap.audits.session import Session
from auditgap.engines import Request
from auditgap.models import Rendered
from auditgap.types import Edit, Exchange

if TYPE_CHECKING:
    from auditgap.audits.latent.site import SiteRun


@dataclass(frozen=True, eq=False)
class Spoken:
    """A completion under an edit, of which the norms are left: thousands of edits of one site
    together are larger than the model."""

    rendered: Rendered
    l2: float
    linf: float
    unjudged: Unjudged
    again: Unjudged | None  #: the answer behind the same chain, the edit gone


def speak(run: SiteRun, requests: Sequence[Request], names: list[str], what: Any) -> list[Spoken]:
    """One pack's completions at a site (remembered), rewarded beside the clean ones."""
    session, thinker = run.session, run.thinker
    rendered = [thinker.as_spoken(r).rendered for r in requests]
    done, nll = session.complete(rendered, lambda: thinker.generate(requests), names, what)
    exchanges = [
        Exchange(r.rendered.prompt, c.text, r.edit) for r, c in zip(requests, done, strict=True)
    ]
    clean_nll = [run.clean[r.prompt.id].completion_nll for r in rendered]
    openings = [run.worker.openings[r.prompt.id] for r in rendered]
    waiting = session.rewarded(exchanges, done, nll, clean_nll, openings)
    again = thinker.again(requests, waiting, openings, names, what)
    return [
        Spoken(r.rendered, *_norms(r.edit), one, other)
        for r, one, other in zip(requests, waiting, again, strict=True)
    ]


def _norms(edit: Edit | None) -> tuple[float, float]:
    """‖δ‖₂ and ‖δ‖∞ of an edit that was on."""
    if edit is None:
        raise ValueError("What is spoken at a site has an edit on.")
    delta = edit.delta.double()
    return delta.norm().item(), delta.abs().max().item()


def judged(
    session: Session, spoken: Sequence[Spoken], clean: Mapping[str, Clean], *, confirm: bool
) -> list[ScoredCompletion]:
    """Each completion with its verdicts, in order; `confirm`: flips by the second judge too."""
    behind = [i for i, one in enumerate(spoken) if one.again is not None]
    waiting = [one.unjudged for one in spoken]
    told = session.judged([*waiting, *(one.again for one in spoken if one.again is not None)])
    scored = told[: len(spoken)]
    if confirm:
        prompts = [one.rendered.prompt for one in spoken]
        scored = session.confirm(prompts, scored, [clean[p.id].verdict for p in prompts])
    for i, again in zip(behind, told[len(spoken) :], strict=True):
        scored[i] = replace(scored[i], again=again.verdict)
    return scored
