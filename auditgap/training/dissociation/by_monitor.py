"""Construction `monitor` (arXiv 2606.08044, section 3): safe answers drawn to where a monitor,
learning too, sees unsafe ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auditgap.errors import AuditgapError, UsageError
from auditgap.models import Conversation
from auditgap.probes.features import cached_features
from auditgap.probes.fit import calibrate, fit
from auditgap.probes.monitor import Monitor
from auditgap.training import ranks
from auditgap.training.config import DissociateConfig
from auditgap.training.constructions import Construction, MonitorConstruction, monitor_step_loss
from auditgap.training.dissociation.material import Base, Material, reference, reference_head
from auditgap.training.dissociation.task import DissociationTask
from auditgap.training.job import Job
from auditgap.training.objective import Head
from auditgap.training.reference import HiddenCache
from auditgap.training.rows import collate, encode


def prepare(config: DissociateConfig, job: Job, material: Material) -> MonitorTask:
    base = Base(job)
    monitor_path = job.path / "monitor.safetensors"
    if config.monitor_from:
        given = Path(config.monitor_from)
        ranks.only_main(lambda: _given_monitor(given, job).save(monitor_path))
    elif not ranks.decided(monitor_path.exists):
        harmful = [row for row in material.rows if row.harmful]
        both = encode(harmful, job.outline.chat, config.max_tokens) + encode(
            [replace(row, response=str(row.unsafe)) for row in harmful],
            job.outline.chat,
            config.max_tokens,
        )
        ranks.say(f"The monitor is fitted on the base's activations of {len(both)} answers.")
        features = cached_features(
            base(),
            both,
            folder=job.path / "reference",
            shard=(ranks.rank(), ranks.world()),
            dtype="float32" if job.dtype == "float32" else "bfloat16",
        )
        labels = [0] * len(harmful) + [1] * len(harmful)
        groups = [row.prompt.id for row in harmful] * 2

        def fit_once() -> None:
            m = config.monitor
            fitted = fit(
                features,
                labels,
                groups,
                standardise=m.standardise,
                seed=m.seed,
                epochs=m.epochs,
                batch_size=m.batch,
                lr=m.lr,
                weight_decay=m.weight_decay,
                hidden=m.hidden,
            )
            if m.calibrate:
                calibrate(fitted, labels)
            fitted.monitor.about = {
                "heldout_auroc": fitted.history[fitted.best_epoch - 1].auroc,
                "best_epoch": fitted.best_epoch,
            }
            fitted.monitor.save(monitor_path)

        ranks.only_main(fit_once)
    # the adapter is switched off for them instead
    trained = [] if config.reference == "adapter" else material.talks
    cache = reference(config, job, [*trained, *material.heldout_talks], base)
    monitor = Monitor.load(monitor_path)
    job.about(
        {
            "monitor": {
                k: v
                for k, v in monitor.about.items()
                if k in ("heldout_auroc", "auroc", "best_epoch")
            }
        }
    )
    return MonitorTask(config, job, material, cache, monitor, reference_head(config, job, base))


def _given_monitor(path: Path, job: Job) -> Monitor:
    """A monitor fitted before. Raises UsageError when it was fitted on another model, or cannot
    read this one."""
    monitor = Monitor.load(path / "monitor.safetensors" if path.is_dir() else path)
    base = monitor.about.get("base", {}).get("fingerprint", job.outline.subject.fingerprint)
    if (monitor.n_blocks, monitor.width) != (
        job.outline.n_blocks,
        job.outline.width,
    ) or base != job.outline.subject.fingerprint:
        raise UsageError(
            f"monitor_from {path}: it was fitted on another model than {job.outline.subject.name}."
            " Fit one on this model (auditgap train monitor), or leave monitor_from out."
        )
    return monitor


class MonitorTask(DissociationTask):
    """The four phases: forward; backward into θ; BCE on the same activations into φ; φ's optimizer
    steps with θ's."""

    second = "monitor"

    def __init__(
        self,
        config: DissociateConfig,
        job: Job,
        material: Material,
        cache: HiddenCache,
        monitor: Monitor,
        head: Head | None,
    ) -> None:
        super().__init__(config, job, material, cache)
        #: rows of the cache before the held-out ones
        self.n_trained = len(cache) - len(material.heldout_talks)
        self.monitor = monitor.to(job.device).train()
        #: the monitor as it was fitted on the base: steps can only be compared by one that does not
        #: learn along
        self.yardstick = copy.deepcopy(self.monitor).eval()
        self.head = head
        self.optimizer = torch.optim.AdamW(
            self.monitor.parameters(),
            lr=config.cotrain_lr,
            weight_decay=config.cotrain_weight_decay,
        )

    def construct(self, model: nn.Module) -> Construction:
        return self._read_by(self.monitor, model)

    def measure(self, model: nn.Module) -> Construction:
        return self._read_by(self.yardstick, model)

    def _read_by(self, monitor: Monitor, model: nn.Module) -> Construction:
        return MonitorConstruction(
            model,
            monitor,
            weights=self.config.weights,
            target=self.config.target,
            reference_head=self.head,
        )

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
        return self._batch(
            rows,
            [self.material.talks[i] for i in rows],
            [self.material.rows[i].harmful for i in rows],
            device,
        )

    def _batch(
        self,
        at: Sequence[int],
        talks: Sequence[Conversation],
        harmful: Sequence[bool],
        device: torch.device,
        *,
        cached: bool = False,
    ) -> dict[str, Any]:
        batch = {k: v.to(device) for k, v in collate(talks, self.job.pad_id).items()}
        batch["harmful"] = torch.tensor(harmful, dtype=torch.float32, device=device)
        return (
            self.reference(at, batch, device)
            if cached or self.config.reference == "cached"
            else batch
        )

    def heldout_batches(self, device: torch.device) -> list[dict[str, Any]]:
        talks, first = self.material.heldout_talks, self.n_trained
        order = sorted(range(len(talks)), key=lambda i: len(talks[i].ids))
        batches = []
        for at in range(0, len(order), 8):
            part = order[at : at + 8]
            batch = self._batch(
                [first + i for i in part],
                [talks[i] for i in part],
                [True] * len(part),
                device,
                cached=True,
            )
            batches.append({**batch, "n_rows": len(part)})
        return batches

    def after_backward(
        self, batch: Mapping[str, Any], told: Mapping[str, torch.Tensor], share: float
    ) -> dict[str, torch.Tensor]:
        loss = monitor_step_loss(self.monitor, told["pooled"], batch["harmful"])
        (loss * share).backward()
        return {"monitor_bce": loss.detach()}

    def after_step(self) -> None:
        for parameter in self.monitor.parameters():
            if parameter.grad is not None:
                ranks.mean(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sums = ranks.gathered(
            [
                int(p.detach().view(torch.int32).sum(dtype=torch.int64))
                for p in self.monitor.parameters()
            ]
        )
        if any(other != sums[0] for other in sums):  # of the bits: equal numbers have equal sums
            raise ranks.shared(
                AuditgapError(
                    f"The monitor is no longer the same on all {ranks.world()} ranks, so what they"
                    " trained since the last checkpoint cannot be used. Run the same command"
                    " again; if it comes back, look for a faulty device."
                )
            )

    def state(self) -> dict[str, torch.Tensor]:
        state = {f"monitor.{name}": value for name, value in self.monitor.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{slot}": value for slot, value in slots.items()}
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.monitor.load_state_dict(
            {k.removeprefix("monitor."): v for k, v in state.items() if k.startswith("monitor.")}
        )
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
