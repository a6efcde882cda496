"""Steering: the mean-difference direction r̂ of harmful and control prompts, taken off at every
position of one site.

    h ← h − s·n·r̂          s the strength, n the mean ‖h‖₂ of a token at the site

r̂ points from what control prompts look like at the last prompt token to what harmful ones do, so a
model that refuses because it sees harm sees less of it; a strength below 0 adds instead. The
control takes off a random direction, orthogonal to r̂, of the same norm. Source: Arditi et al.
2024; Rimsky et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auditgap.interventions import CONTROL, EDIT, Bench, Settings, Trial
from auditgap.interventions.controls import generator
from auditgap.interventions.directions import mean_difference, orthogonal, unit
from auditgap.types import ConstantEdit


class Steering:
    """See the module."""

    name = "steering"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def describe(self) -> dict[str, Any]:
        return {
            "intervention": self.name,
            "version": 1,
            **self.settings.of("strengths", "draws", "seed"),
        }

    def trials(self) -> list[Trial]:
        arms = [(EDIT, 0), *((CONTROL, draw) for draw in range(self.settings.draws))]
        return [
            Trial(arm, strength, draw=draw)
            for strength in self.settings.strengths
            for arm, draw in arms
        ]

    def learn(self, bench: Bench) -> dict[str, torch.Tensor]:
        """`direction` [D], of norm 1, and `norm`: the mean activation norm."""
        return direction_of(bench)

    def edit(
        self, bench: Bench, learned: Mapping[str, torch.Tensor], p: int, trial: Trial
    ) -> ConstantEdit:
        along = learned["direction"]
        if trial.arm == CONTROL and along.any():
            along = orthogonal(
                along,
                generator(
                    self.settings.seed, self.name, bench.asked[p].prompt.id, bench.site, trial.draw
                ),
            )
        return ConstantEdit((bench.site,), shift=-trial.strength * learned["norm"] * along)


def direction_of(bench: Bench) -> dict[str, torch.Tensor]:
    """What steering, ablation and angle learn: `direction` [D] and `norm` []."""
    return {
        "direction": unit(mean_difference(bench.fit_h, bench.contrast_h)),
        "norm": torch.tensor(bench.norm, dtype=torch.float32),
    }
