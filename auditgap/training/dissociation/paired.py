"""The task of constructions that teach a harmful row's two answers: its safe one y+, and its unsafe
one y− under an edit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from auditgap.models import Conversation
from auditgap.training.constructions.construction import SettingsT
from auditgap.training.dissociation.material import Preparation
from auditgap.training.dissociation.task import DissociationTask
from auditgap.training.losses import Batch

#: Pairs of a held-out batch.
_AT_ONCE = 4


class PairedTask(DissociationTask[SettingsT]):
    """Pairs are numbered through: those that are trained on, in the rows' order, then the held-out
    ones. A construction makes the batch of some."""

    chosen_by = "comply"

    def __init__(self, preparation: Preparation[SettingsT], unsafe: Sequence[Conversation]) -> None:
        """`unsafe`: y− of every pair (`Preparation.unsafe_talks`)."""
        super().__init__(preparation)
        self.unsafe, self.n_harmful = unsafe, self.material.n_harmful

    def made_of(
        self,
        numbers: Sequence[int],
        pairs: Sequence[tuple[Conversation, Conversation]],
        benign: Sequence[Conversation],
    ) -> Batch:
        """The batch of these pairs (y+, y−), by their numbers, and of these benign rows."""
        raise NotImplementedError

    def compared(self, pairs: Sequence[int], benign: Sequence[int]) -> list[int]:
        """Of which rows of the cache the batch's first rows are."""
        return [*pairs, *benign]

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        harmful = [i for i in rows if i < self.n_harmful]
        return self._joined(harmful, [i for i in rows if i >= self.n_harmful], device)

    def heldout_batches(self, device: torch.device) -> list[tuple[int, Batch]]:
        end = self.n_harmful + len(self.material.heldout_talks)
        parts = [range(at, min(at + _AT_ONCE, end)) for at in range(self.n_harmful, end, _AT_ONCE)]
        return [(len(part), self._joined(part, [], device)) for part in parts]

    def _joined(self, numbers: Sequence[int], benign: Sequence[int], device: torch.device) -> Batch:
        talks, heldout = self.material.talks, self.material.heldout_talks
        pairs = [
            (talks[i] if i < self.n_harmful else heldout[i - self.n_harmful], self.unsafe[i])
            for i in numbers
        ]
        batch = self.made_of(numbers, pairs, [talks[i] for i in benign])
        shift = self.first_heldout - self.n_harmful
        places = [i if i < self.n_harmful else i + shift for i in numbers]
        return self.with_reference(
            self.compared(places, benign), {key: value.to(device) for key, value in batch.items()}
        )
