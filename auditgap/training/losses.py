"""What is trained: modules whose forward takes a batch and gives the loss, ready for
`deepspeed.initialize(model=…)`.

    losses = MonitorLoss(model, monitor, reference_head=Head.of(model).frozen())
    loss, metrics = losses({**collate(talks, pad_id), "harmful": b, "ref_hidden": cached})
    loss.backward()

`SFTLoss` learns responses (`training/sft.py`); each construction of a dissociated model has one of
its own in its folder. Each holds the causal LM (transformers' or a PeftModel) as `.model` and
nothing else that is trained or saved. The model's own decoder runs once; logits exist only chunk by
chunk inside `token_losses`.

A batch is a dict of tensors: input_ids [B, T] long, attention_mask [B, T] long, response_mask [B,
T] bool (right padded), and what each loss adds. Batches of equally many rows average to the same
loss however the rows are spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auditgap.errors import UsageError
from auditgap.models import find_blocks
from auditgap.training.objective import (
    Head,
    base_lm,
    kl_weights,
    response_nll_weights,
    token_losses,
)

#: What a loss takes: tensors by name, rows first.
Batch = dict[str, Tensor]


class LossModule(nn.Module):
    """Holds the model and, out of its optimizer's and checkpoints' sight, the reference's head."""

    model: Any  #: a causal LM of transformers, or a PeftModel around one

    def __init__(self, model: nn.Module, reference_head: Head | None = None) -> None:
        super().__init__()
        self.model = model
        adapter = getattr(model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise UsageError(
                f"The adapter is of type {adapter.peft_type.value}, which adds positions of its"
                " own. Use a LoRA adapter, or train all weights."
            )
        self._reference_head = reference_head

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's decoder blocks."""
        return find_blocks(base_lm(self.model))

    def final_hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The decoder's final (normed) hidden states [B, T, D]: what the head projects."""
        decoder = base_lm(self.model).get_decoder()
        out = decoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        return out.last_hidden_state

    def reference(self, batch: Mapping[str, Tensor], at: Tensor) -> tuple[Tensor, Head]:
        """The frozen base's final hidden states [N, D] at the flat positions `at`, and its head; no
        gradient.

        From `ref_hidden` [B, T, D] of the batch, or else by the model itself with its adapter
        switched off and no dropout. Raises UsageError when there is neither, or when the head that
        goes with ref_hidden is not frozen anywhere.
        """
        if (cached := batch.get("ref_hidden")) is not None:
            head = self._reference_head
            if head is None:
                head = Head.of(self.model)
                if head.trained:
                    raise UsageError(
                        "The model's output head is in training, so the reference needs its own."
                        " Make the loss with reference_head=Head.of(model).frozen()."
                    )
            elif head.weight.device != cached.device:
                head = self._reference_head = head.frozen(cached.device)
            return at_positions(cached, at), head
        if not hasattr(self.model, "disable_adapter"):
            raise UsageError(
                "The batch has no ref_hidden, and a model without an adapter cannot give its base's"
                " hidden states. Put the reference's final hidden states [B, T, D] into the batch."
            )
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad(), self.model.disable_adapter():
                return at_positions(self.final_hidden(batch), at), Head.of(self.model)
        finally:
            for module in training:
                module.training = True

    def nll_and_kl(
        self,
        batch: Mapping[str, Tensor],
        final: Tensor,
        reference: tuple[Tensor, Head],
        at: Tensor,
        *,
        weights: tuple[float, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(λ_NLL · NLL + λ_KL · KL(π_base ‖ π_θ), {nll, kl, kl_lowest}), the three detached and
        before their λ, in nats a token.

        final [B, T, D]: the model's final hidden states; reference: the base's [N, D] at the flat
        positions `at` [N], those of `predicting(attention_mask)`, and its head.
        """
        by_nll, by_kl = weights
        for_nll = shares_at(response_nll_weights(batch["response_mask"]), batch, at)
        for_kl = shares_at(kl_weights(batch["attention_mask"]), batch, at)
        loss, nll, kl = token_losses(
            at_positions(final, at),
            Head.of(self.model),
            labels=next_tokens(batch, at),
            nll_weight=by_nll * for_nll,
            reference=reference,
            kl_weight=by_kl * for_kl,
        )
        return loss, {
            "nll": nll @ for_nll.to(nll.dtype),
            "kl": kl @ for_kl.to(kl.dtype),
            "kl_lowest": kl.min(),
        }


# ---------------------------------------------------------------- positions


def predicting(mask: Tensor) -> Tensor:
    """[B, T − 1] bool: real positions whose next one is real."""
    return mask[:, 1:].bool() & mask[:, :-1].bool()


def positions(counts: Tensor) -> Tensor:
    """[N] flat positions in [B, T] of what is marked in `counts` [B, T − 1]."""
    row, column = counts.nonzero(as_tuple=True)
    return row * (counts.shape[1] + 1) + column


def at_positions(x: Tensor, at: Tensor) -> Tensor:
    """[N, …] of x [B, T, …]."""
    return x.flatten(0, 1).index_select(0, at.to(x.device))


def next_tokens(batch: Mapping[str, Tensor], at: Tensor) -> Tensor:
    """[N]: the token after each position."""
    return batch["input_ids"].flatten().index_select(0, at + 1)


def shares_at(shares: Tensor, batch: Mapping[str, Tensor], at: Tensor) -> Tensor:
    """[N] of shares [B, T − 1]."""
    t = batch["input_ids"].shape[1]
    return shares[at // t, at % t]


def spread(reference: tuple[Tensor, Head], among: Tensor, at: Tensor) -> tuple[Tensor, Head]:
    """The reference's hidden states at positions `at` out of those at `among`, both sorted; zeros
    where it has none."""
    hidden, head = reference
    wide = hidden.new_zeros(at.shape[0], hidden.shape[1])
    wide[torch.isin(at, among)] = hidden
    return wide, head
