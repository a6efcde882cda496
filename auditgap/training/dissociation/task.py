"""The task that both constructions share: reference, evaluation on what is held out, and the choice
of the step to keep."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from auditgap.data.refusals import has_refusal
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.models import LoadedModel
from auditgap.store import files
from auditgap.training import checkpoints, ranks
from auditgap.training import job as jobs
from auditgap.training.config import DissociateConfig
from auditgap.training.constructions import Construction
from auditgap.training.dissociation.material import Material
from auditgap.training.engine import DeepSpeedEngine
from auditgap.training.job import Job
from auditgap.training.loop import BaseTask
from auditgap.training.reference import HiddenCache

#: What KL may be before the first update, in nats a token: rounding, and nothing else.
SAME = {"float32": 1e-3, "bfloat16": 2e-2}


def best_name(step: int) -> str:
    """The folder of the run that keeps this step's weights."""
    return f"best-{step:08d}"


class DissociationTask(BaseTask):
    """Rows, reference, evaluation and choice of the checkpoint; a construction adds its batch and
    its own losses."""

    #: The number, beside refusal, that the choice is made by: lower is further inside.
    second: str

    def __init__(
        self, config: DissociateConfig, job: Job, material: Material, cache: HiddenCache | None
    ) -> None:
        self.config, self.job, self.material, self.cache = config, job, material, cache
        self.lengths = [len(talk.ids) for talk in material.talks]
        known = ranks.decided(lambda: files.read_json(job.path / "evaluations.json")) or {}
        self._seen: dict[int, Mapping[str, Any]] = {
            int(step): values for step, values in known.items()
        }

    def construct(self, model: nn.Module) -> Construction:
        raise NotImplementedError

    def measure(self, model: nn.Module) -> Construction:
        """The construction that held-out rows are read with."""
        return self.construct(model)

    def heldout_batches(self, device: torch.device) -> list[dict[str, Any]]:
        raise NotImplementedError

    def row_ids(self, rows: Sequence[int]) -> list[str]:
        return [self.material.rows[i].id for i in rows]

    def reference(
        self, rows: Sequence[int], batch: dict[str, Any], device: torch.device
    ) -> dict[str, Any]:
        if self.cache is not None:
            batch["ref_hidden"] = self.cache.batch(rows, batch["input_ids"].shape[1], device)
        return batch

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
    # ------------------------------------------------------------------------------------------------------

    def evaluate(self, step: int, engine: DeepSpeedEngine) -> Mapping[str, Any]:
        with engine.speaking(self.job.path / "scratch" / "speaking") as loaded:
            values = jobs.on_main_with(loaded, self._look)
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
    def _look(self, loaded: LoadedModel) -> dict[str, Any]:
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
        construction = self.measure(loaded.model).eval()
        sums: dict[str, float] = {}
        n_rows = 0
        for batch in self.heldout_batches(loaded.device):
            rows = batch.pop("n_rows")
            loss, told = construction(batch)
            for name, value in {"loss": loss, **told}.items():
                if value.ndim == 0 and bool(torch.isfinite(value)):
                    sums[name] = sums.get(name, 0.0) + float(value) * rows
            n_rows += rows
        return {**shares, **{name: value / n_rows for name, value in sums.items()}}

    def chosen(self, *, upto: int | None = None) -> dict[str, Any]:
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
            min(keeps, key=lambda s: (keeps[s][self.second], s))
            if keeps
            else max(later, key=lambda s: (later[s]["refusal"], -s))
        )
        return {
            "step": step,
            "kept_refusal": bool(keeps),
            "base_refusal": self._seen[0]["refusal"],
            **later[step],
        }
