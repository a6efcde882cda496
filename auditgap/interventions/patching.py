"""Activation patching: hidden states of another prompt, or of a base model, put in the place of the
prompt's own.

    h_t ← h_t of a control prompt          at the template's positions after the user's last token (at least the last one)
    h_t ← h_t of the base, same prompt     at every position of the prompt (`base_patching`)

The template's positions read the whole prompt and hold nothing of its wording, and they have the
same tokens behind every prompt. A refusal that goes when they are exchanged is decided below the
site and carried there; one that stays is read elsewhere. The interchange score is the share of
exchanges after which the model does what the donor did; with a base as the donor, a site at which
it is high has behind it what makes the two models differ. The control adds a random direction of
equal norm at each position. Source: interchange interventions, Geiger et al. 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auditgap.interventions import CONTROL, EDIT, Bench, Settings, Trial
from auditgap.interventions.controls import generator
from auditgap.models import Rendered
from auditgap.types import Edit


class Patching:
    """See the module."""

    name = "patching"
    interchanges = True  #: its table has an interchange score

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def describe(self) -> dict[str, Any]:
        return {"intervention": self.name, "version": 1, **self.settings.of("draws", "seed")}

    def trials(self) -> list[Trial]:
        return [
            Trial(EDIT, 1.0),
            *(Trial(CONTROL, 1.0, draw=draw) for draw in range(self.settings.draws)),
        ]

    def learn(self, bench: Bench) -> dict[str, torch.Tensor]:
        """`delta.<prompt id>` [T, D] for every prompt that is asked: what the exchange adds."""
        learned = {}
        for one, h, other, theirs in zip(
            bench.asked, bench.asked_h, bench.donors, bench.donor_h, strict=True
        ):
            k = min(tail(one), tail(other))
            delta = torch.zeros_like(h)
            delta[-k:] = theirs[-k:] - h[-k:]
            learned[f"delta.{one.prompt.id}"] = delta
        return learned

    def edit(self, bench: Bench, learned: Mapping[str, torch.Tensor], p: int, trial: Trial) -> Edit:
        delta = learned[f"delta.{bench.asked[p].prompt.id}"]
        if trial.arm == CONTROL:
            rng = generator(
                self.settings.seed, self.name, bench.asked[p].prompt.id, bench.site, trial.draw
            )
            noise = torch.randn(delta.shape, generator=rng)
            delta = noise * (delta.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))
        return Edit(bench.site, delta)


class BasePatching(Patching):
    """The base's hidden states at every position of the prompt, read by the subject's blocks above
    the site."""

    name = "base_patching"

    def learn(self, bench: Bench) -> dict[str, torch.Tensor]:
        """`delta.<prompt id>` [T, D] for every prompt that is asked: base − subject."""
        both = zip(bench.asked, bench.asked_h, bench.base_h, strict=True)
        return {f"delta.{one.prompt.id}": theirs - h for one, h, theirs in both}


def tail(rendered: Rendered) -> int:
    """How many of the template's positions follow the user's last token; 1 where there are none."""
    n = len(rendered.content)
    while n and not rendered.content[n - 1]:
        n -= 1
    return max(1, len(rendered.content) - n) if n else 1
