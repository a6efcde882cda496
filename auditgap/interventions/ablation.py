"""Ablation: the direction of one site projected out of the residual stream, at every site and every
position.

    h ← h − (r̂·h) r̂

so that nothing in the model can read or write it. The control takes as much off along a random
direction u, orthogonal to r̂: h ← h − (r̂·h) u, of equal norm for the same h. Source: Arditi et al.
2024, section 2.4 (directional ablation); there at the outputs of attention and MLP, here of every
block, whose sum they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auditgap.interventions import CONTROL, EDIT, Bench, Settings, Trial
from auditgap.interventions.controls import generator
from auditgap.interventions.directions import orthogonal
from auditgap.interventions.steering import direction_of
from auditgap.types import ConstantEdit


class Ablation:
    """See the module. Its strength is 1: all of the component goes."""

    name = "ablation"

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
        """`direction` [D], of norm 1, and `norm`: the mean activation norm."""
        return direction_of(bench)

    def edit(
        self, bench: Bench, learned: Mapping[str, torch.Tensor], p: int, trial: Trial
    ) -> ConstantEdit:
        along = learned["direction"]
        write = along
        if trial.arm == CONTROL and along.any():
            write = orthogonal(
                along,
                generator(
                    self.settings.seed, self.name, bench.asked[p].prompt.id, bench.site, trial.draw
                ),
            )
        return ConstantEdit(bench.sites, read=along, write=write)
