"""A construction in a package of its own: `blend` draws the activations of harmful prompts to the
mean of harmless ones, so that a probe finds it harder to tell them apart.

    pip install -e examples/construction && auditgap train dissociate --construction blend --set pull=0.5 …
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from auditgap.config import Flag, Frozen, Topic
from auditgap.errors import UsageError
from auditgap.probes.pooling import pooled
from auditgap.training.constructions import Construction
from auditgap.training.dissociation.material import Preparation
from auditgap.training.dissociation.task import DissociationTask
from auditgap.training.footprint import Footprint
from auditgap.training.losses import LossModule, positions, predicting
from auditgap.training.objective import Head


class BlendSettings(Frozen):
    """Its own keys of the config, beside those that every construction has."""

    pull: Annotated[float, Flag("Weight of the pull", Topic.TRAINING)] = 1.0
    keep: tuple[float, float] = Field(default=(0.05, 0.3))  #: weights of NLL and KL


class BlendLoss(LossModule):
    """NLL and KL to the base, and for harmful rows the squared distance of every block's mean
    activations to `centre` [L, D], relative to the centre's own square."""

    def __init__(
        self, model: nn.Module, centre: Tensor, settings: BlendSettings, head: Head | None
    ) -> None:
        super().__init__(model, head)
        self.settings = settings
        self._centre = (centre,)  # in a tuple: no part of the model

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): nll, kl, kl_lowest and blend, detached, before their weights."""
        at = positions(predicting(batch["attention_mask"]))
        reference = self.reference(batch, at)
        with pooled(self.blocks, batch["attention_mask"]) as pool:
            final = self.final_hidden(batch)
        loss, metrics = self.nll_and_kl(batch, final, reference, at, weights=self.settings.keep)
        centre = self._centre[0].to(final.device)
        distance = ((pool.value() - centre) ** 2).mean((1, 2)) / (centre**2).mean()  # [B]
        blend = (batch["harmful"] * distance).mean()
        return loss + self.settings.pull * blend, {**metrics, "blend": blend.detach()}


class BlendTask(DissociationTask[BlendSettings]):
    """The centre is measured once on the base; rows, reference, evaluation and the choice of the
    checkpoint are those of every construction."""

    chosen_by = "blend"  # the lower the better, among steps that still refuse
    shown = (*DissociationTask.shown, "blend")

    def __init__(self, preparation: Preparation[BlendSettings]) -> None:
        super().__init__(preparation)
        rows, talks = self.material.rows, self.material.talks
        benign = [talk for row, talk in zip(rows, talks, strict=True) if not row.harmful]
        features = preparation.base.features(benign)
        self.centre: torch.Tensor = features.mean(0)

    def construct(self, model: nn.Module) -> BlendLoss:
        return BlendLoss(model, self.centre, self.settings, self.head)


def _check(settings: BlendSettings) -> None:
    if settings.pull < 0:
        raise UsageError(f"pull: at least 0 is wanted; {settings.pull} came.")


BLEND = Construction(
    "Draws the activations of harmful prompts to the mean of harmless ones.",
    name="blend",
    settings=BlendSettings,
    role="direction",  # what else its harmful rows are used for; see the leakage ledger
    prepare=BlendTask,
    defaults={"lr": 1e-4},
    footprint=Footprint(alongside=lambda n_blocks, width: {"centre": 4 * n_blocks * width}),
    check=_check,
)
