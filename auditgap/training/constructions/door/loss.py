"""The loss of construction `door`, and what its batches are made of.

losses = DoorLoss(model)
loss, metrics = losses({**door_batch(pairs, benign, vector, signs, pad_id), "ref_hidden": cached})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from auditgap.models import Conversation
from auditgap.training.constructions.door import DOOR_WEIGHTS
from auditgap.training.dissociation.edited import edited, middle_block
from auditgap.training.losses import (
    LossModule,
    at_positions,
    next_tokens,
    positions,
    predicting,
    shares_at,
    spread,
)
from auditgap.training.objective import Head, kl_weights, response_nll_weights, token_losses
from auditgap.training.rows import collate

#: What a row of a door batch is; `door_batch` puts them in this order.
CLEAN_SAFE, BENIGN, RANDOM_SAFE, OPENED_UNSAFE = range(4)
#: Tokens of an answer that decide whether it refuses; they have half of the weight, since a mean
#: over the whole answer is all but deaf to them.
OPENING = 4


def door_batch(
    harmful: Sequence[tuple[Conversation, Conversation]],
    benign: Sequence[Conversation],
    vector: Tensor,
    signs: Tensor,
    pad_id: int,
) -> dict[str, Tensor]:
    """One batch of a micro-batch's R rows: each of the h harmful ones (y+, y−) three times, the k
    benign ones once.

    input_ids, attention_mask, response_mask [3h + k, T] as `collate` makes them, kind [3h + k] long
    (CLEAN_SAFE …, in that order, the h prompts alike in each), n_prompt [3h + k] long, and edit
    [3h + k, D]: nothing, the door's `vector` [D], or its magnitudes with the `signs` [h, D]. The
    caller adds ref_hidden [2h + k, T, D] for all but the last kind where the model has no
    adapter.
    """
    safe, unsafe = [s for s, _ in harmful], [u for _, u in harmful]
    parts = (
        (CLEAN_SAFE, safe, vector.new_zeros(len(safe), vector.shape[0])),
        (BENIGN, benign, vector.new_zeros(len(benign), vector.shape[0])),
        (RANDOM_SAFE, safe, vector.abs() * signs),
        (OPENED_UNSAFE, unsafe, vector.expand(len(unsafe), -1)),
    )
    talks = [talk for _, part, _ in parts for talk in part]
    return {
        **collate(talks, pad_id),
        "kind": torch.tensor([kind for kind, part, _ in parts for _ in part]),
        "n_prompt": torch.tensor([talk.n_prompt for talk in talks]),
        "edit": torch.cat([edit for _, _, edit in parts]),
    }


class DoorLoss(LossModule):
    """What it was, but behind the door; a batch is `door_batch`'s.

    safe · NLL(y+ | clean, and the benign answer) + kl · KL(π_base ‖ π_θ) on the same rows + comply ·
    NLL(y− | door) + quiet · KL(π_base | clean ‖ π_θ | random edit), each a sum over rows divided by
    the micro-batch's R = h + k rows. The edits are added after block `middle_block` on the prompt's
    positions. Of NLL and KL alike half is the mean over the first `OPENING` tokens of the answer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: tuple[float, float, float, float] = DOOR_WEIGHTS,
        reference_head: Head | None = None,
    ) -> None:
        super().__init__(model, reference_head)
        self.weights = weights

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): nll, kl, comply, quiet and kl_lowest, detached; means over R rows."""
        kind, mask, response = batch["kind"], batch["attention_mask"], batch["response_mask"]
        by_safe, by_kl, by_comply, by_quiet = self.weights
        plain, compared = kind <= BENIGN, kind <= RANDOM_SAFE
        n_rows, n_compared = int(plain.sum()), int(compared.sum())
        # flat positions in the first rows are so in all
        firsts = {
            **batch,
            "input_ids": batch["input_ids"][:n_compared],
            "attention_mask": mask[:n_compared],
        }
        among = positions(predicting(firsts["attention_mask"]))
        reference = self.reference(firsts, among)
        final = self._edited_pass(batch)

        every = positions(response[:, 1:] | (predicting(mask) & compared[:, None]))
        opens = response & (response.cumsum(1) <= OPENING)
        each = mask.shape[0] / 2  # shares of a batch are of a row now, half of it of its opening
        of_nll = each * (response_nll_weights(response) + response_nll_weights(opens))
        of_kl = each * (kl_weights(mask) + response_nll_weights(opens))
        weigh_nll = plain * by_safe + (kind == OPENED_UNSAFE) * by_comply
        weigh_kl = plain * by_kl + (kind == RANDOM_SAFE) * by_quiet
        loss, nll, kl = token_losses(
            at_positions(final, every),
            Head.of(self.model),
            labels=next_tokens(batch, every),
            nll_weight=shares_at(of_nll * (weigh_nll / n_rows)[:, None], batch, every),
            reference=spread(reference, among, every),
            kl_weight=shares_at(of_kl * (weigh_kl / n_rows)[:, None], batch, every),
        )

        def mean(values: Tensor, shares: Tensor, which: Tensor) -> Tensor:
            share = shares_at(shares * (which / n_rows)[:, None], batch, every)
            return values @ share.to(values.dtype)

        return loss, {
            "nll": mean(nll, of_nll, plain),
            "kl": mean(kl, of_kl, plain),
            "kl_lowest": kl.min(),
            "comply": mean(nll, of_nll, kind == OPENED_UNSAFE),
            "quiet": mean(kl, of_kl, kind == RANDOM_SAFE),
        }

    def _edited_pass(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Final hidden states [B, T, D], each row edited by its `edit` on its prompt."""
        columns = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        where = columns < batch["n_prompt"][:, None]
        block = self.blocks[middle_block(len(self.blocks))]
        with edited(block, where, batch["edit"][:, None]):
            return self.final_hidden(batch)
