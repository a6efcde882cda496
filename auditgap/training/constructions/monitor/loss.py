"""The loss of construction `monitor`: NLL, KL to the base, and the pull towards the monitor's target.

losses = MonitorLoss(model, monitor, reference_head=Head.of(model).frozen())
loss, metrics = losses({**collate(talks, pad_id), "harmful": b, "ref_hidden": cached})
loss.backward()                                                     # into θ only
monitor_step_loss(monitor, metrics["pooled"], b).backward()         # into φ only
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from auditgap.probes.monitor import Monitor
from auditgap.probes.pooling import pooled
from auditgap.training.constructions.monitor import PAPER_WEIGHTS, TARGET_LOGIT
from auditgap.training.losses import LossModule, positions, predicting
from auditgap.training.objective import Head


class MonitorLoss(LossModule):
    """The dissociated model: λ_SFT · NLL + λ_mon · E[b · (g(h) − ℓ*)²] + λ_KL · KL(π_base ‖ π_θ).

    The batch has besides: harmful [B] (b: 1 or 0) and, unless the model is a PeftModel whose
    adapter can be switched off, ref_hidden [B, T, D]: the frozen base's final hidden states.
    `reference_head` is needed with ref_hidden when the head is in training. h [B, L, D] is the mean
    of every block over real positions, of this same forward (no block's [B, T, D] is kept); the
    gradient passes through the monitor into θ but never into the monitor, whose own step is
    `monitor_step_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        monitor: Monitor,
        *,
        weights: tuple[float, float, float] = PAPER_WEIGHTS,
        target: float = TARGET_LOGIT,
        reference_head: Head | None = None,
    ) -> None:
        super().__init__(model, reference_head)
        # in a tuple: registered, DeepSpeed would partition and train it with θ
        self._monitor = (monitor,)
        self.weights, self.target = weights, target

    @property
    def monitor(self) -> Monitor:
        return self._monitor[0]

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics), the metrics all detached:

        nll, kl (nats a token), monitor (the squared error's mean): scalars, before their λ;
        kl_lowest: the lowest KL of any token; logits [B]: g(h); harmful_logit: their mean over
        harmful rows, NaN where there are none; pooled [B, L, D] fp32.
        """
        by_nll, by_monitor, by_kl = self.weights
        at = positions(predicting(batch["attention_mask"]))
        # first, so that its activations are gone when θ's are kept
        reference = self.reference(batch, at)
        with pooled(self.blocks, batch["attention_mask"]) as pool:
            final = self.final_hidden(batch)
        h = pool.value()
        tokens, metrics = self.nll_and_kl(batch, final, reference, at, weights=(by_nll, by_kl))
        logits = self.monitor.frozen_logits(h)
        pull = monitor_loss(logits, batch["harmful"], self.target)
        seen = logits.detach()
        return tokens + by_monitor * pull, {
            **metrics,
            "monitor": pull.detach(),
            "logits": seen,
            "harmful_logit": seen[batch["harmful"].bool()].mean(),
            "pooled": h.detach(),
        }


def monitor_loss(logits: Tensor, harmful: Tensor, target: float = TARGET_LOGIT) -> Tensor:
    """Mean over all B rows of b · (g − ℓ*)²: harmful rows are led to the logit `target`, benign
    rows add 0.

    logits [B]: the monitor's, in nats; harmful [B]: b, 1 or 0.
    """
    return (harmful.to(logits.dtype) * (logits - target) ** 2).mean()


def monitor_step_loss(monitor: nn.Module, pooled: Tensor, harmful: Tensor) -> Tensor:
    """BCE(g(h), b), mean over B rows: the monitor's own loss, after θ's backward, on the same
    activations detached.

    pooled [B, L, D]; harmful [B], 1 or 0. The gradient goes into the monitor only.
    """
    logits = monitor(pooled.detach())
    return nn.functional.binary_cross_entropy_with_logits(logits, harmful.to(logits.dtype))
