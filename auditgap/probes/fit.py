"""Fitting the latent monitor: a split by prompt, binary cross-entropy, and the epoch whose held-out
AUROC is best.

    # features [n, L, D]; labels 1 = unsafe; groups: which prompt, one an example
    fitted = fit(features, labels, groups)
    fitted.best_epoch, fitted.history[fitted.best_epoch - 1].auroc
    # [n_heldout], of examples whose prompts were not trained on
    fitted.heldout_logits

Optimiser, batch, epochs, split and selection are the paper's (arXiv 2606.08044, appendix B, table
3).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from auditgap import stats
from auditgap.errors import AuditgapError, UsageError
from auditgap.probes import BATCH, EPOCHS, HELDOUT, LR, WEIGHT_DECAY
from auditgap.probes.monitor import HIDDEN, Monitor, seeded, standardiser


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training split, and what the held-out split says after it. Losses are mean
    BCE in nats."""

    epoch: int
    loss: float
    heldout_loss: float
    auroc: float | None  #: on the held-out split; None: one class is empty there


@dataclass(frozen=True, eq=False)
class Fitted:
    """A monitor at its best epoch, in eval mode on the CPU, with where the split fell. Indices are
    rows of the features."""

    monitor: Monitor
    best_epoch: int  #: from 1
    history: tuple[Epoch, ...]
    train_index: np.ndarray
    heldout_index: np.ndarray
    heldout_logits: np.ndarray  #: fp64, in the order of `heldout_index`


def split_groups(groups: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of (about) 1 − `share` of the groups, and rows of the others, each ascending. No group
    is on both sides.

    Groups are drawn by the hash of (seed, group), so the split depends neither on the order of rows
    nor on the machine. Raises UsageError when there are fewer than two groups.
    """
    names = sorted(
        set(groups),
        key=lambda g: (hashlib.sha256(f"{seed}:{g}".encode("utf-8", "surrogatepass")).digest(), g),
    )
    if len(names) < 2 or not 0 < share < 1:
        raise UsageError(
            "A split by prompt needs at least 2 different prompts and a share between 0 and 1;"
            f" {len(names)} and {share:g} came."
        )
    out = set(names[: min(max(round(share * len(names)), 1), len(names) - 1)])
    inside = np.array([g not in out for g in groups])
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def fit(
    features: torch.Tensor,
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[str],
    *,
    standardise: bool = True,
    seed: int = 0,
    epochs: int = EPOCHS,
    batch_size: int = BATCH,
    lr: float = LR,
    weight_decay: float = WEIGHT_DECAY,
    heldout: float = HELDOUT,
    hidden: int = HIDDEN,
    rows: np.ndarray | None = None,
    device: str = "cpu",
    tick: Callable[[int], None] | None = None,
) -> Fitted:
    """Fit a Monitor to features [n, L, D] (fp32 or bf16; may be memory-mapped), labels [n] (1 =
    unsafe), groups [n] (prompts).

    The statistics of `standardise` come from the training split alone; without it the monitor is
    the paper's. The first epoch that reaches the best held-out AUROC is kept (of those that tie,
    its logits are the smallest); where a class is missing in the held-out split it is the one with
    the lowest held-out loss. The same input, seed and number of threads give the same bits. Only
    the examples `rows` are looked at (None: all of them). `tick(epoch)` is called after each epoch.
    Raises UsageError for shapes that disagree, labels that are not 0 or 1, activations that are not
    numbers, and a training split with one class only.
    """
    y = _checked(features, labels, groups)
    chosen = np.arange(len(y)) if rows is None else np.asarray(rows)
    train, held = (
        chosen[part] for part in split_groups([groups[int(i)] for i in chosen], heldout, seed)
    )
    if len(set(y[train].tolist())) < 2:
        raise UsageError(
            "The training split holds one class only; give safe and unsafe answers of more prompts."
        )
    constants = _constants(features, train) if standardise else {}
    started = seeded(seed, features.shape[1], features.shape[2], hidden=hidden, **constants)
    monitor = started.to(device).train()
    optimizer = torch.optim.AdamW(monitor.parameters(), lr=lr, weight_decay=weight_decay)
    order = torch.Generator().manual_seed(seed)
    target = torch.from_numpy(y)
    history: list[Epoch] = []
    best, best_epoch, best_weights = -math.inf, 0, {}
    for epoch in range(1, epochs + 1):
        shuffled = torch.from_numpy(train)[torch.randperm(len(train), generator=order)]
        total = _epoch(monitor, optimizer, features, target, shuffled.split(batch_size), device)
        if not math.isfinite(total):
            raise AuditgapError(
                f"The monitor's loss is not a number in epoch {epoch}. Standardise its input, or"
                " look for activations that are not finite."
            )
        logits = logits_of(monitor, features, held)
        auroc = stats.auroc(logits, y[held]).estimate
        heldout_loss = float(np.mean(np.logaddexp(0, logits) - y[held] * logits))
        history.append(Epoch(epoch, total / len(train), heldout_loss, auroc))
        merit = -heldout_loss if auroc is None else auroc
        if merit > best:
            best, best_epoch = merit, epoch
            best_weights = {
                name: value.detach().cpu().clone() for name, value in monitor.state_dict().items()
            }
        if tick is not None:
            tick(epoch)
    monitor = monitor.cpu().eval()
    monitor.load_state_dict(best_weights)
    return Fitted(
        monitor, best_epoch, tuple(history), train, held, logits_of(monitor, features, held)
    )


def _checked(
    features: torch.Tensor, labels: Sequence[int] | np.ndarray, groups: Sequence[str]
) -> np.ndarray:
    """The labels as numbers. Raises UsageError as `fit`."""
    y = np.asarray(labels, dtype=np.float32)
    if features.ndim != 3 or len(y) != len(features) or len(groups) != len(features):
        raise UsageError(
            "Fitting needs features [n, L, D] with one label and one group each;"
            f" {list(features.shape)}, {len(y)} and {len(groups)} came."
        )
    if not np.isin(y, (0.0, 1.0)).all():
        raise UsageError(
            "Labels must be 0 (safe) or 1 (unsafe). Leave out the examples that have neither."
        )
    return y


def _constants(features: torch.Tensor, train: np.ndarray) -> dict[str, torch.Tensor]:
    """Mean and scale of the training split. Raises UsageError where they are no numbers."""
    mean, scale = standardiser(features, train)
    found = {"mean": mean, "scale": scale}
    if not all(bool(torch.isfinite(c).all()) for c in found.values()):
        raise UsageError(
            "Some activations are not finite numbers, so nothing can be fitted. Extract them in"
            " float32."
        )
    return found


def _epoch(
    monitor: Monitor,
    optimizer: torch.optim.Optimizer,
    features: torch.Tensor,
    target: torch.Tensor,
    batches: Sequence[torch.Tensor],
    device: str,
) -> float:
    """One step a batch of rows; the loss, summed over rows."""
    total = 0.0
    for batch in batches:
        logits = monitor(features[batch].to(device))
        loss = functional.binary_cross_entropy_with_logits(logits, target[batch].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total


def calibrate(fitted: Fitted, labels: Sequence[int] | np.ndarray) -> stats.Platt | None:
    """Fold Platt's scaling, fitted to the held-out split, into the monitor, in place; None (and no
    change) with one class there.

    A target such as ln 3 then means a score of 0.75, and squared distances to it stay moderate.
    `labels` [n] as `fit` had them.
    """
    scale = stats.platt(fitted.heldout_logits, np.asarray(labels)[fitted.heldout_index])
    if scale is not None:
        fitted.monitor.rescale(scale.slope, scale.offset)
    return scale


@torch.no_grad()
def logits_of(
    monitor: Monitor, features: torch.Tensor, index: np.ndarray | None = None, *, chunk: int = 256
) -> np.ndarray:
    """The monitor's logits, fp64 [len(index)], of rows `index` of features [n, L, D] (all of them:
    None)."""
    rows = torch.arange(len(features)) if index is None else torch.from_numpy(np.asarray(index))
    found = [
        monitor(features[part].to(monitor.mean.device)).double().cpu()
        for part in rows.split(chunk)
        if len(part)
    ]
    return torch.cat(found).numpy() if found else np.empty(0)


def finite_rows(features: torch.Tensor, *, chunk: int = 256) -> np.ndarray:
    """The rows of features [n, L, D] that hold numbers only, ascending; a model that overflows
    leaves others."""
    found = [torch.isfinite(part.flatten(1)).all(1) for part in features.split(chunk)]
    return torch.cat(found).nonzero().squeeze(1).numpy() if found else np.empty(0, dtype=int)
