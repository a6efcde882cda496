"""What construction `monitor` prepares once, and its task: the monitor is fitted on the base's
activations, then trained alongside the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from auditgap.errors import AuditgapError, UsageError
from auditgap.probes.fit import calibrate, fit
from auditgap.probes.monitor import Monitor
from auditgap.training import ranks
from auditgap.training.constructions.monitor import MonitorSettings
from auditgap.training.constructions.monitor.loss import MonitorLoss, monitor_step_loss
from auditgap.training.dissociation.material import Preparation
from auditgap.training.dissociation.task import DissociationTask
from auditgap.training.job import Job
from auditgap.training.losses import Batch
from auditgap.training.rows import encode


def prepare(preparation: Preparation[MonitorSettings]) -> MonitorTask:
    job, given = preparation.job, preparation.settings.monitor_from
    path = job.path / "monitor.safetensors"
    if given:
        ranks.only_main(lambda: _given_monitor(Path(given), job).save(path))
    elif not ranks.decided(path.exists):
        _fit(preparation, path)
    monitor = Monitor.load(path)
    known = ("heldout_auroc", "auroc", "best_epoch")
    job.about({"monitor": {k: v for k, v in monitor.about.items() if k in known}})
    return MonitorTask(preparation, monitor)


def _fit(preparation: Preparation[MonitorSettings], path: Path) -> None:
    """Fit the monitor on the base's activations of y+ and y− of every harmful row; every rank
    computes its share of them, and rank 0 fits."""
    job, m = preparation.job, preparation.settings.monitor
    harmful = [row for row in preparation.material.rows if row.harmful]
    unsafe = [replace(row, response=str(row.unsafe)) for row in harmful]
    both = [
        talk
        for rows in (harmful, unsafe)
        for talk in encode(rows, job.outline.chat, preparation.config.max_tokens)
    ]
    ranks.say(f"The monitor is fitted on the base's activations of {len(both)} answers.")
    features = preparation.base.features(both, "float32" if job.dtype == "float32" else "bfloat16")
    labels = [0] * len(harmful) + [1] * len(harmful)

    def fit_once() -> None:
        fitted = fit(
            features,
            labels,
            [row.prompt.id for row in harmful] * 2,
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
        fitted.monitor.save(path)

    ranks.only_main(fit_once)


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


class MonitorTask(DissociationTask[MonitorSettings]):
    """The four phases: forward; backward into θ; BCE on the same activations into φ; φ's optimizer
    steps with θ's."""

    chosen_by = "monitor"
    shown = (*DissociationTask.shown, "monitor")

    def __init__(self, preparation: Preparation[MonitorSettings], monitor: Monitor) -> None:
        super().__init__(preparation)
        self.monitor = monitor.to(self.job.device).train()
        #: the monitor as it was fitted on the base: steps can only be compared by one that does not
        #: learn along
        self.yardstick = copy.deepcopy(self.monitor).eval()
        self.optimizer = torch.optim.AdamW(
            self.monitor.parameters(),
            lr=self.settings.cotrain_lr,
            weight_decay=self.settings.cotrain_weight_decay,
        )

    def construct(self, model: nn.Module) -> MonitorLoss:
        return self._read_by(self.monitor, model)

    def measure(self, model: nn.Module) -> MonitorLoss:
        return self._read_by(self.yardstick, model)

    def _read_by(self, monitor: Monitor, model: nn.Module) -> MonitorLoss:
        return MonitorLoss(
            model,
            monitor,
            weights=self.settings.weights,
            target=self.settings.target,
            reference_head=self.head,
        )

    def after_backward(
        self, batch: Batch, metrics: Mapping[str, torch.Tensor], share: float
    ) -> dict[str, torch.Tensor]:
        loss = monitor_step_loss(self.monitor, metrics["pooled"], batch["harmful"])
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
