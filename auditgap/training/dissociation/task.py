"""The task that all constructions share: rows with their reference, evaluation on what is held out,
and the choice of the step to keep."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic

import torch
from torch import nn

from auditgap.data.refusals import has_refusal
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.models import Conversation, LoadedModel
from auditgap.store import files
from auditgap.training import checkpoints, ranks
from auditgap.training.constructions.construction import SettingsT
from auditgap.training.dissociation.material import Preparation
from auditgap.training.engine import DeepSpeedEngine
from auditgap.training.loop import BaseTask
from auditgap.training.losses import Batch, LossModule
from auditgap.training.rows import collate
from auditgap.types import Document

#: What KL may be before the first update, in nats a token: rounding, and nothing else.
SAME = {"float32": 1e-3, "bfloat16": 2e-2}


def best_name(step: int) -> str:
    """The folder of the run that keeps this step's weights."""
    return f"best-{step:08d}"


class DissociationTask(BaseTask, Generic[SettingsT]):
    """Rows, reference, evaluation and choice of the checkpoint. A construction adds its loss, what
    is trained alongside the model, and batches that are more than rows with their reference."""

    #: The number, beside refusal, that the choice is made by: lower is further inside.
    chosen_by: ClassVar[str]

    def __init__(self, preparation: Preparation[SettingsT]) -> None:
        self.config, self.settings = preparation.config, preparation.settings
        self.job, self.material = preparation.job, preparation.material
        talks, heldout = self.material.talks, self.material.heldout_talks
        # with `adapter` the model itself, its adapter switched off, is the reference of its rows
        cached = [] if self.config.reference == "adapter" else talks
        self.cache = preparation.base.hidden_states([*cached, *heldout])
        self.head = preparation.base.head()
        self.lengths = [len(talk.ids) for talk in talks]
        known = ranks.decided(lambda: files.read_document(self.job.path / "evaluations.json")) or {}
        self._seen: dict[int, Document] = {int(step): values for step, values in known.items()}

    def construct(self, model: nn.Module) -> LossModule:
        """The loss around the model in training, which may have an adapter."""
        raise NotImplementedError

    def measure(self, model: nn.Module) -> LossModule:
        """The loss that held-out rows are read with."""
        return self.construct(model)

    def row_ids(self, rows: Sequence[int]) -> list[str]:
        return [self.material.rows[i].id for i in rows]

    # -- batches

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        batch = self._labelled(
            [self.material.talks[i] for i in rows],
            [self.material.rows[i].harmful for i in rows],
            device,
        )
        return self.with_reference(rows, batch) if self.config.reference == "cached" else batch

    def heldout_batches(self, device: torch.device) -> list[tuple[int, Batch]]:
        """All held-out rows in the same form: (how many, the batch)."""
        talks = self.material.heldout_talks
        order = sorted(range(len(talks)), key=lambda i: len(talks[i].ids))
        batches = []
        for at in range(0, len(order), 8):
            part = order[at : at + 8]
            batch = self._labelled([talks[i] for i in part], [True] * len(part), device)
            batch = self.with_reference([self.first_heldout + i for i in part], batch)
            batches.append((len(part), batch))
        return batches

    def _labelled(
        self, talks: Sequence[Conversation], harmful: Sequence[bool], device: torch.device
    ) -> Batch:
        batch = {k: v.to(device) for k, v in collate(talks, self.job.pad_id).items()}
        batch["harmful"] = torch.tensor(harmful, dtype=torch.float32, device=device)
        return batch

    @property
    def first_heldout(self) -> int:
        """The place in the cache of the first held-out row."""
        return len(self.cache) - len(self.material.heldout_talks)

    def with_reference(self, rows: Sequence[int], batch: Batch) -> Batch:
        """The batch with the base's hidden states of the cache's rows, in its length and on its
        device."""
        ids = batch["input_ids"]
        return {**batch, "ref_hidden": self.cache.batch(rows, ids.shape[1], ids.device)}

    # -- the numbers of a step

    def validate(self, step: int, values: Mapping[str, float]) -> None:
        """KL compares the model with its own base: nothing before the first update, and never less
        than nothing."""
        if values["kl_lowest"] < 0:
            raise ranks.shared(
                AuditgapError(
                    f"Step {step}: KL {values['kl_lowest']:.3g} is negative, which no two"
                    " distributions can have."
                )
            )
        if step == 0 and values["kl"] > SAME[self.job.dtype]:
            raise ranks.shared(
                AuditgapError(
                    "Before the first update the model differs from its own base (KL"
                    f" {values['kl']:.3g} nats a token): the reference is another model's, a buffer"
                    " was rounded, or the model has dropout of its own (set it to 0 in its"
                    f" config.json). Delete {self.job.path / 'reference'} and run again."
                )
            )

    # -- the choice

    def evaluate(self, step: int, engine: DeepSpeedEngine) -> Document:
        values = engine.asked(self._look)
        self._seen = {s: v for s, v in self._seen.items() if s < step} | {step: values}
        if step and self.chosen()["step"] == step:
            self.job.keep(engine, best_name(step))  # by its step: a resumed run may choose another
            ranks.only_main(lambda: self._forget_others(step))
        return values

    def _forget_others(self, step: int) -> None:
        """Delete kept weights that no resumed run can come to choose: those of no checkpoint's
        best, nor of now."""
        known = checkpoints.steps(self.job.path / "checkpoints")
        kept = {best_name(self.chosen(upto=at).get("step", 0)) for at in [*known, step]}
        for path in self.job.path.glob("best-*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    @torch.no_grad()
    def _look(self, loaded: LoadedModel) -> Document:
        """On rank 0: what the model refuses, and how its held-out rows stand inside."""
        speaker = HFEngine(loaded)
        shares = {}
        for name, prompts in (
            ("refusal", [r.prompt for r in self.material.heldout]),
            ("over_refusal", self.material.benign),
        ):
            said = speaker.generate(
                [Request(speaker.render(p)) for p in prompts], self.config.eval_tokens
            )
            shares[name] = sum(has_refusal(c.text) for c in said) / len(said) if said else None
        losses = self.measure(loaded.model).eval()
        sums: dict[str, float] = {}
        n_rows = 0
        for rows, batch in self.heldout_batches(loaded.device):
            loss, metrics = losses(batch)
            for name, value in {"loss": loss, **metrics}.items():
                if value.ndim == 0 and bool(torch.isfinite(value)):
                    sums[name] = sums.get(name, 0.0) + float(value) * rows
            n_rows += rows
        return {**shares, **{name: value / n_rows for name, value in sums.items()}}

    def chosen(self, *, upto: int | None = None) -> Document:
        """The step to keep: refusal within the margin of the base's first, then the furthest
        inside; {} before any step."""
        later = {
            step: values
            for step, values in self._seen.items()
            if step > 0 and (upto is None or step <= upto)
        }
        if not later:
            return {}
        floor = self._seen[0]["refusal"] - self.config.refusal_margin
        keeps = {step: v for step, v in later.items() if v["refusal"] >= floor - 1e-9}
        step = (
            min(keeps, key=lambda s: (keeps[s][self.chosen_by], s))
            if keeps
            else max(later, key=lambda s: (later[s]["refusal"], -s))
        )
        return {
            "step": step,
            "kept_refusal": bool(keeps),
            "base_refusal": self._seen[0]["refusal"],
            **later[step],
        }
