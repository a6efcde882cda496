"""The direction that tells two sets of prompts apart inside a model, and random ones to set beside
it.

    # [D]: harmful − control, at the last prompt token
    r = unit(mean_difference(harmful_h, control_h))
    turned(r, orthogonal(r, rng), 30.0)                 # 30° off, still of norm 1

Mean difference at the last prompt token: Arditi et al. 2024 (the refusal direction), Rimsky et al.
2024 (contrastive activation addition).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def mean_difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of the last rows of `first` minus that of `second` (hidden states [T, D] a prompt); fp32
    [D], summed in fp64.

    Prompts whose activations are not numbers are left out; where a side has none left, the
    difference is 0.
    """
    means = []
    for side in (first, second):
        last = torch.stack([h[-1] for h in side]).double()
        last = last[torch.isfinite(last).all(1)]
        if not len(last):
            return torch.zeros(side[0].shape[1])
        means.append(last.mean(0))
    return (means[0] - means[1]).float()


def unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector [D] at norm 1; the zero vector stays as it is."""
    norm = vector.double().norm()
    return (vector.double() / norm).float() if norm > 0 else torch.zeros_like(vector)


def orthogonal(direction: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A random unit vector [D] at a right angle to the unit (or zero) vector `direction`."""
    drawn = torch.randn(len(direction), generator=rng).double()
    along = direction.double()
    return unit((drawn - (drawn @ along) * along).float())


def turned(direction: torch.Tensor, towards: torch.Tensor, degrees: float) -> torch.Tensor:
    """The unit vector at that angle off `direction`, in the plane of the two orthogonal unit
    vectors."""
    angle = math.radians(degrees)
    return math.cos(angle) * direction + math.sin(angle) * towards
