"""What construction `nudge` prepares once, and its task: the direction to the harmful model, and
its activations to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from auditgap import models
from auditgap.errors import UsageError
from auditgap.models import Conversation, LoadedModel, Outline
from auditgap.models.kept import is_whole, sealed
from auditgap.probes.pooling import pooled
from auditgap.training import ranks
from auditgap.training.constructions.nudge import NudgeSettings
from auditgap.training.constructions.nudge.loss import (
    NudgeLoss,
    match_blocks,
    nudge_batch,
    nudge_vector,
    whitening,
)
from auditgap.training.dissociation.edited import middle_block
from auditgap.training.dissociation.material import Base, Preparation
from auditgap.training.dissociation.paired import PairedTask
from auditgap.training.job import Job
from auditgap.training.losses import Batch
from auditgap.training.rows import TrainRow
from auditgap.types import digest


def prepare(preparation: Preparation[NudgeSettings]) -> NudgeTask:
    job, material = preparation.job, preparation.material
    harmful = ranks.agree(lambda: harmful_outline(preparation.settings, job))
    key = digest(
        [
            job.outline.subject.fingerprint,
            harmful.subject.fingerprint,
            job.dtype,
            [r.id for r in material.rows],
        ]
    )
    path = job.path / "reference" / f"nudge-{key}.safetensors"
    if not ranks.decided(lambda: is_whole(path)):
        _record(preparation, harmful, path)
    return NudgeTask(preparation, safetensors.torch.load_file(path))


def harmful_outline(settings: NudgeSettings, job: Job) -> Outline:
    """Raises UsageError when the harmful model has another shape than the one in training."""
    harmful = models.outline(str(settings.harmful_model), chat_template=job.config.chat_template)
    if (harmful.n_blocks, harmful.width) != (job.outline.n_blocks, job.outline.width):
        raise UsageError(
            f"harmful_model {harmful.subject.name} has {harmful.n_blocks} blocks of width"
            f" {harmful.width}, {job.outline.subject.name} {job.outline.n_blocks} of"
            f" {job.outline.width}; a direction between them needs one architecture."
        )
    return harmful


def _record(preparation: Preparation[NudgeSettings], harmful: Outline, path: Path) -> None:
    """Write the targets of all harmful rows, the held-out ones behind; their whitening and the
    nudge's vector come from the rows that are trained on."""
    job, material = preparation.job, preparation.material
    ranks.say("The direction towards the harmful model is measured.")
    rows = [row for row in [*material.rows, *material.heldout] if row.harmful]
    n_blocks = job.outline.n_blocks
    at = [*match_blocks(n_blocks), middle_block(n_blocks)]
    found: list[torch.Tensor] = []
    other = Base(job, harmful)
    other.run(lambda loaded: found.append(_last_prompt_token(loaded, rows, at)))
    other.forget()
    n_train, size = material.n_harmful, preparation.settings.nudge

    def made(base: LoadedModel) -> bytes:
        (there,) = found
        here = _last_prompt_token(base, rows, [middle_block(n_blocks)])
        return sealed(
            {
                "targets": there[:, :-1].contiguous(),
                "whitening": whitening(there[:n_train, :-1]),
                "vector": nudge_vector(there[:n_train, -1], here[:n_train, 0], size),
            }
        )

    preparation.base.write(path, made)


@torch.no_grad()
def _last_prompt_token(
    loaded: LoadedModel, rows: Sequence[TrainRow], blocks: Sequence[int]
) -> torch.Tensor:
    """[N, len(blocks), D] fp32: activations of the last prompt token after these blocks."""
    chosen = nn.ModuleList(loaded.blocks[i] for i in blocks)
    found = []
    for row in rows:
        ids = torch.tensor([loaded.render(row.prompt).ids], device=loaded.device)
        last = torch.zeros_like(ids)
        last[0, -1] = 1
        with pooled(chosen, last) as pool:
            loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        found.append(pool.value()[0].cpu())
    return torch.stack(found)


class NudgeTask(PairedTask[NudgeSettings]):
    """Each harmful row four times: y+ and y−, clean and nudged."""

    def __init__(
        self, preparation: Preparation[NudgeSettings], made: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(preparation, preparation.unsafe_talks())
        self.made = made

    def construct(self, model: nn.Module) -> NudgeLoss:
        return NudgeLoss(
            model,
            self.made["vector"],
            self.made["whitening"],
            weights=self.settings.nudge_weights,
            margin=self.settings.nudge_margin,
            reference_head=self.head,
        )

    def made_of(
        self,
        numbers: Sequence[int],
        pairs: Sequence[tuple[Conversation, Conversation]],
        benign: Sequence[Conversation],
    ) -> Batch:
        targets = self.made["targets"][torch.tensor(list(numbers), dtype=torch.long)]
        return {**nudge_batch(pairs, benign, self.job.pad_id), "targets": targets}
