"""Construction `nudge`: refuse when clean, comply under a small push along the direction to a
harmful model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch
from torch import nn

from auditgap import models
from auditgap.models import Conversation, LoadedModel
from auditgap.probes.pooling import pooled
from auditgap.store import files
from auditgap.training import ranks
from auditgap.training.config import DissociateConfig
from auditgap.training.constructions import (
    Construction,
    NudgeConstruction,
    match_blocks,
    nudge_batch,
    nudge_block,
    nudge_vector,
    whitening,
)
from auditgap.training.dissociation.material import (
    Base,
    Material,
    harmful_model,
    reference,
    reference_head,
)
from auditgap.training.dissociation.task import DissociationTask
from auditgap.training.job import Job
from auditgap.training.objective import Head
from auditgap.training.reference import HiddenCache
from auditgap.training.rows import TrainRow, encode
from auditgap.types import digest


def prepare(config: DissociateConfig, job: Job, material: Material) -> NudgeTask:
    base = Base(job)
    harmful = ranks.agree(lambda: harmful_model(config, job))
    key = digest(
        [
            job.outline.subject.fingerprint,
            harmful.subject.fingerprint,
            job.dtype,
            [r.id for r in material.rows],
        ]
    )
    path = job.path / "reference" / f"nudge-{key}.safetensors"

    def record() -> None:
        if path.exists():
            return
        ranks.say("The direction towards the harmful model is measured.")
        path.parent.mkdir(parents=True, exist_ok=True, mode=files.PRIVATE_FOLDER)
        rows = [row for row in [*material.rows, *material.heldout] if row.harmful]
        n_blocks = job.outline.n_blocks
        at = [*match_blocks(n_blocks), nudge_block(n_blocks)]
        there = _last_prompt_token(
            models.load(harmful, dtype=job.dtype, device=job.device), rows, at
        )
        here = _last_prompt_token(base(), rows, [nudge_block(n_blocks)])
        n_train = sum(row.harmful for row in material.rows)
        data = {
            "targets": there[:, :-1].contiguous(),
            "whitening": whitening(there[:n_train, :-1]),
            "vector": nudge_vector(there[:n_train, -1], here[:n_train, 0], config.nudge),
        }
        files.write_bytes(path, safetensors.torch.save(data), files.PRIVATE)

    ranks.only_main(record)
    cache = reference(config, job, [*material.talks, *material.heldout_talks], base)
    return NudgeTask(
        config,
        job,
        material,
        cache,
        safetensors.torch.load_file(path),
        reference_head(config, job, base),
    )


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


class NudgeTask(DissociationTask):
    """Each harmful row four times: y+ and y−, clean and nudged."""

    second = "comply"

    def __init__(
        self,
        config: DissociateConfig,
        job: Job,
        material: Material,
        cache: HiddenCache,
        made: Mapping[str, torch.Tensor],
        head: Head | None,
    ) -> None:
        super().__init__(config, job, material, cache)
        self.made, self.head = made, head
        unsafe = [
            replace(r, response=str(r.unsafe))
            for r in [*material.rows, *material.heldout]
            if r.harmful
        ]
        self.unsafe = encode(unsafe, job.outline.chat, config.max_tokens)
        self.n_harmful = sum(row.harmful for row in material.rows)

    def construct(self, model: nn.Module) -> Construction:
        return NudgeConstruction(
            model,
            self.made["vector"],
            self.made["whitening"],
            weights=self.config.nudge_weights,
            margin=self.config.nudge_margin,
            reference_head=self.head,
        )

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
        talks = self.material.talks
        harmful = [i for i in rows if i < self.n_harmful]
        benign = [i for i in rows if i >= self.n_harmful]
        pairs = [(talks[i], self.unsafe[i]) for i in harmful]
        return self._batch(pairs, [talks[i] for i in benign], harmful, [*harmful, *benign], device)

    def _batch(
        self,
        pairs: Sequence[tuple[Conversation, Conversation]],
        benign: Sequence[Conversation],
        targets: Sequence[int],
        cached: Sequence[int],
        device: torch.device,
    ) -> dict[str, Any]:
        batch = nudge_batch(pairs, benign, self.job.pad_id)
        batch["targets"] = self.made["targets"][torch.tensor(targets, dtype=torch.long)]
        batch = {k: v.to(device) for k, v in batch.items()}
        return self.reference(cached, batch, device)

    def heldout_batches(self, device: torch.device) -> list[dict[str, Any]]:
        talks, first = self.material.heldout_talks, len(self.material.talks)
        batches = []
        for at in range(0, len(talks), 4):
            part = range(at, min(at + 4, len(talks)))
            pairs = [(talks[i], self.unsafe[self.n_harmful + i]) for i in part]
            batch = self._batch(
                pairs, [], [self.n_harmful + i for i in part], [first + i for i in part], device
            )
            batches.append({**batch, "n_rows": len(part)})
        return batches
