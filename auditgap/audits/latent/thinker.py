"""What thinking changes in the attacks at one site: where edits and targets stand, and how answers
come about.

    thinker = Thinker(worker, clean)
    thinker.rendered[0]         # the prompt with its clean chain behind it, if the model thinks
    thinker.generate(requests)  # the chain forced, or written anew under the edit

For a model that does not think, each of these is what it would be without this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from auditgap.audits.latent.rows import Clean
from auditgap.audits.latent.thinking import prompt_alone, span_of, thinks_first
from auditgap.audits.scored import Unjudged
from auditgap.engines import UNFINISHED, Completion, Request
from auditgap.interventions.pgd import Ball
from auditgap.models import Rendered
from auditgap.types import Edit, Exchange, Prompt, Site

if TYPE_CHECKING:
    from auditgap.audits.latent.worker import LatentWorker


class Thinker:
    """See the module. `left_out`: prompts without an attack, and why."""

    def __init__(self, worker: LatentWorker, clean: dict[str, Clean]) -> None:
        self.worker, self.session, self.mode = worker, worker.session, worker.mode
        self.left_out: list[tuple[Prompt, str]] = [(p, "too_long") for p in worker.too_long]
        self.rendered = worker.rendered
        if thinks_first(self.mode):
            # a chain that never ended has no place where an answer starts, and none to keep
            self.left_out += [
                (r.prompt, UNFINISHED) for r in worker.rendered if not clean[r.prompt.id].finished
            ]
            self.rendered = [
                r.after(clean[r.prompt.id].chain)
                for r in worker.rendered
                if clean[r.prompt.id].finished
            ]

    @property
    def writes_anew(self) -> bool:
        """Whether the chain is written under the edit; one of the answer's tokens alone leaves the
        chain that the model has written."""
        return self.mode in ("on", "regenerated") and not self.goes_on

    # -- edits

    def span(self, rendered: Rendered) -> tuple[int, int]:
        """[from, to) of the tokens that are edited."""
        return span_of(rendered, self.worker.config.span)

    @property
    def goes_on(self) -> bool:
        """Whether edits stand at every token of the answer, while it is written."""
        return self.worker.config.span == "answer"

    def ball(self, h: torch.Tensor, rendered: Rendered) -> Ball:
        """The norm and the scales of what is edited: of a prompt, its user's words; of an answer,
        which is not there yet, those of one such word."""
        if self.goes_on:
            ball = Ball.of(h, rendered.content)
            return replace(ball, h_norm=ball.rms * h.shape[1] ** 0.5)
        start, end = self.span(rendered)
        content = rendered.content[start:end]
        return Ball.of(h[start:end], content if any(content) else (True,) * (end - start))

    def placed(self, delta: torch.Tensor, rendered: Rendered) -> torch.Tensor:
        """An edit of the span's tokens as one of all tokens, 0 elsewhere."""
        start, end = self.span(rendered)
        return torch.nn.functional.pad(delta, (0, 0, start, len(rendered.ids) - end))

    def edit(self, site: Site, delta: torch.Tensor) -> Edit:
        """The edit of a δ [T, D] of all tokens."""
        return Edit(site, delta, self.goes_on)

    # -- speech

    def as_spoken(self, request: Request) -> Request:
        """The request as the model gets it: without the clean chain where it writes one anew."""
        if not self.writes_anew or request.edit is None:
            return request
        alone = prompt_alone(request.rendered)
        delta = request.edit.delta[: len(alone.ids)]
        return Request(alone, Edit(request.edit.site, delta))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions, with the NLL of each target where the search put it: behind the clean
        chain."""
        done = self.session.generate([self.as_spoken(r) for r in requests])
        if not self.writes_anew or not all(r.target for r in requests):
            return done
        nll = self.session.nll(
            [r.rendered for r in requests],
            [r.target for r in requests],
            [r.edit for r in requests],
        )
        return [replace(c, target_nll=n) for c, n in zip(done, nll, strict=True)]

    def again(
        self,
        requests: Sequence[Request],
        waiting: Sequence[Unjudged],
        openings: Sequence[tuple[str, ...]],
        names: list[str],
        what: Any,
    ) -> list[Unjudged | None]:
        """`regenerated`: what follows each chain once the edit is gone, for its verdict."""
        found: list[Unjudged | None] = [None] * len(waiting)
        which = [i for i, one in enumerate(waiting) if one.completion.finished]
        if self.mode != "regenerated" or not which:
            return found
        after = []
        for i in which:
            completion = waiting[i].completion
            alone = prompt_alone(requests[i].rendered)
            after.append(alone.after(completion.ids[: completion.n_chain]))
        asked = [Request(r) for r in after]
        done, nll = self.session.complete(
            after, lambda: self.session.generate(asked), names, [what, "again"]
        )
        exchanges = [Exchange(r.prompt, c.text) for r, c in zip(after, done, strict=True)]
        told = self.session.rewarded(exchanges, done, nll, nll, [openings[i] for i in which])
        for i, one in zip(which, told, strict=True):
            found[i] = one
        return found
