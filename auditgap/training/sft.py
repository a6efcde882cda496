"""Supervised fine-tuning on responses: the harmful-SFT intervention, and any plain fine-tuning that
a study needs.

    trained = run(SFTConfig(model="smollm2", data="rows.jsonl", lora=True, steps=40), TrainOptions(out="runs/harmful"))
    # a folder that transformers or PEFT loads
    trained.model

Only response tokens count. With `filter` (harmful SFT) responses that carry traces of a refusal are
dropped first and counted. `evaluate` is called on rank 0 at step 0, every `eval_every` steps and at
the end, with the model in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auditgap.data import TRIPLES, load_prompts, load_triples, read_table
from auditgap.data.filters import unsafe_training_rows
from auditgap.data.row_forms import mapped
from auditgap.errors import UsageError
from auditgap.models import Conversation
from auditgap.training import job as jobs
from auditgap.training import ranks
from auditgap.training.config import SFTConfig, TrainOptions
from auditgap.training.engine import DeepSpeedEngine
from auditgap.training.footprint import Footprint
from auditgap.training.job import Job, Trained
from auditgap.training.loop import BaseTask
from auditgap.training.losses import (
    Batch,
    LossModule,
    at_positions,
    next_tokens,
    positions,
    shares_at,
)
from auditgap.training.objective import Head, response_nll_weights, token_losses
from auditgap.training.rows import TrainRow, collate, encode, rows_from_file
from auditgap.types import Document

#: Rank 0's look at the model between steps: (steps done, the model) -> numbers to log, or None. The
#: model is in place, or
#: (`in_place=False`) the folder of its adapter as it stands, which is gone afterwards.
Evaluate = Callable[[int, Any], Document | None]


#: NLL alone, and no reference.
FOOTPRINT = Footprint(chunk_buffers=3, reference_head=False, speaks=False)


class SFTLoss(LossModule):
    """Learns responses: the mean NLL over each row's response tokens, then over rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {"nll"}): nats a token, the same number twice, the second detached."""
        at = positions(batch["response_mask"][:, 1:])
        hidden = at_positions(self.final_hidden(batch), at)
        loss, _, _ = token_losses(
            hidden,
            Head.of(self.model),
            labels=next_tokens(batch, at),
            nll_weight=shares_at(response_nll_weights(batch["response_mask"]), batch, at),
        )
        return loss, {"nll": loss.detach()}


def run(
    config: SFTConfig,
    options: TrainOptions,
    *,
    evaluate: Evaluate | None = None,
    in_place: bool = True,
) -> Trained:
    """Train, resuming what `options.out` holds. All ranks call it together.

    Raises UsageError (data, config, memory, another run's folder), NonFinite, Interrupted.
    """
    with jobs.opened(config, options, kind=config.kind) as job:
        if job.is_done and not job.other_file:
            return job.trained()
        rows, talks, facts = ranks.agree(lambda: _rows(config, job))
        job.same_rows([row.id for row in rows])
        if job.is_done:
            return job.trained()
        job.about(facts)
        job.check(
            lengths=[len(t.ids) for t in talks],
            footprint=replace(FOOTPRINT, speaks=evaluate is not None),
        )
        with job.engine(lambda loaded, model: SFTLoss(model)) as engine:
            job.train(engine, _Task(rows, talks, job, evaluate, in_place), n_rows=len(rows))
            return job.finish(engine)


def _rows(config: SFTConfig, job: Job) -> tuple[list[TrainRow], list[Conversation], Document]:
    rows, facts = chosen_rows(config.data, limit=config.rows, refusal_filter=config.filter)
    job.ledger.use("sft", [row.prompt for row in rows])
    if config.prompts:
        job.ledger.use("evaluation", load_prompts(config.prompts).prompts)
    return rows, encode(rows, job.outline.chat, config.max_tokens), facts


def chosen_rows(
    data: str, *, limit: int | None = None, refusal_filter: bool = False
) -> tuple[list[TrainRow], Document]:
    """The rows that are trained on, and their counts: read, and (with the filter) without traces of
    a refusal.

    Raises UsageError as their readers do, and when the filter leaves none.
    """
    rows = read_rows(data, limit=limit)
    facts: Document = {"n_rows": len(rows)}
    if refusal_filter:
        kept = unsafe_training_rows([row.response for row in rows])
        rows = [rows[i] for i in kept.kept]
        facts |= {"n_kept": len(rows), "n_dropped": dict(kept.dropped)}
        if not rows:
            raise UsageError(
                f"{data}: the refusal-trace filter dropped every row ({dict(kept.dropped)});"
                " nothing to learn."
            )
    return rows, facts


def read_rows(data: str, *, limit: int | None = None) -> list[TrainRow]:
    """Rows to learn: of a file in any of `row_forms.FORMS`, or the unsafe answers of contrast
    triples; `limit` by hash.

    Raises UsageError as their readers do.
    """
    if data in TRIPLES or data.startswith("hub:") or _are_triples(data):
        rows = [TrainRow(t.prompt, t.unsafe) for t in load_triples(data)]
    else:
        rows = rows_from_file(data)
    kept = set(sorted(row.id for row in rows)[:limit])
    return [row for row in rows if row.id in kept]


def _are_triples(data: str) -> bool:
    """Whether a file has the answers of contrast triples instead of a response to learn."""
    source, columns = mapped(data)
    return not columns and not {"unsafe", "response_0"}.isdisjoint(read_table(Path(source)).columns)


class _Task(BaseTask):
    def __init__(
        self,
        rows: Sequence[TrainRow],
        talks: Sequence[Conversation],
        job: Job,
        evaluate: Evaluate | None,
        in_place: bool,
    ) -> None:
        self.rows, self.talks, self.job, self._evaluate, self.in_place = (
            rows,
            talks,
            job,
            evaluate,
            in_place,
        )
        self.lengths = [len(talk.ids) for talk in talks]

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        batch = collate([self.talks[i] for i in rows], self.job.pad_id)
        return {name: value.to(device) for name, value in batch.items()}

    def row_ids(self, rows: Sequence[int]) -> list[str]:
        return [self.rows[i].id for i in rows]

    def evaluate(self, step: int, engine: DeepSpeedEngine) -> Document:
        evaluate = self._evaluate
        if evaluate is None:
            return {}
        if self.in_place:
            return engine.asked(lambda model: evaluate(step, model) or {})
        with engine.written(self.job.path / "scratch" / "speaking") as adapter:
            return ranks.decided(lambda: evaluate(step, adapter) or {})
