"""What a cell of the intervention audit carries from learning to generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from auditgap.audits.intervene.rows import Donor, Size
from auditgap.audits.session import Arrays
from auditgap.interventions import Intervention, Trial
from auditgap.types import ConstantEdit, Edit, Suffix

#: What is put into a model: nothing, a δ on the prompt, one at every position, or tokens behind it.
AnyEdit = Edit | ConstantEdit | Suffix | None


@dataclass(frozen=True, eq=False)
class Learned:
    """A cell's intervention with all that it needed the subject's hidden states for. By prompt and
    trial: sizes, and the edits that are small."""

    intervention: Intervention
    arrays: Arrays
    found: Mapping[str, torch.Tensor]  #: the arrays as tensors
    trials: Sequence[Trial]
    sizes: Mapping[tuple[int, int], Size]
    edits: Mapping[tuple[int, int], ConstantEdit | Suffix]
    donors: Mapping[int, Donor]
    names: list[str]
    seconds: float

    @property
    def asked(self) -> list[tuple[int, int]]:
        """What is spoken under, by prompt and trial: where nothing was edited, or nobody knows with
        what, nothing is asked."""
        return [task for task, size in self.sizes.items() if not size.problem]
