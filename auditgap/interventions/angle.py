"""Direction tolerance: by how many degrees may a steering direction be off before it stops working?

    h ← h − s·n·(cos θ · r̂ + sin θ · u)       u a random unit vector orthogonal to r̂, drawn a prompt

The norm stays, only the aim changes; at 90° nothing of r̂ is left, and that is the control. The
angle at which the effect is halved stands in the table (`half_angle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auditgap.interventions import CONTROL, EDIT, Bench, Settings, Trial
from auditgap.interventions.controls import generator
from auditgap.interventions.directions import orthogonal, turned
from auditgap.interventions.steering import direction_of
from auditgap.types import ConstantEdit

RIGHT_ANGLE = 90.0


class Angle:
    """See the module. The same u serves all angles of a prompt and draw, so that a curve is of one
    turn."""

    name = "angle"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def describe(self) -> dict[str, Any]:
        return {
            "intervention": self.name,
            "version": 1,
            **self.settings.of("angles", "angle_strength", "draws", "seed"),
        }

    def trials(self) -> list[Trial]:
        """One draw at 0°, where all are alike; the right angle always, as the control."""
        return [
            Trial(
                CONTROL if angle == RIGHT_ANGLE else EDIT, self.settings.angle_strength, angle, draw
            )
            for angle in sorted({*self.settings.angles, RIGHT_ANGLE})
            for draw in range(1 if angle == 0 else self.settings.draws)
        ]

    def learn(self, bench: Bench) -> dict[str, torch.Tensor]:
        """`direction` [D], of norm 1, and `norm`: the mean activation norm."""
        return direction_of(bench)

    def edit(
        self, bench: Bench, learned: Mapping[str, torch.Tensor], p: int, trial: Trial
    ) -> ConstantEdit:
        along = learned["direction"]
        if along.any():
            rng = generator(
                self.settings.seed, self.name, bench.asked[p].prompt.id, bench.site, trial.draw
            )
            along = turned(along, orthogonal(along, rng), trial.angle or 0.0)
        return ConstantEdit((bench.site,), shift=-trial.strength * learned["norm"] * along)
