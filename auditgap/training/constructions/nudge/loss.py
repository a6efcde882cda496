"""The loss of construction `nudge`, and what its batches are made of.

losses = NudgeLoss(model, nudge_vector(there, here), whitening(targets))
loss, metrics = losses({**nudge_batch(pairs, benign, pad_id), "targets": t, "ref_hidden": cached})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from auditgap.errors import UsageError
from auditgap.models import Conversation
from auditgap.probes.pooling import pooled
from auditgap.training.constructions.nudge import NUDGE_SIZE, NUDGE_WEIGHTS
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

#: What a row of a nudge batch is; `nudge_batch` puts them in this order.
CLEAN_SAFE, BENIGN, CLEAN_UNSAFE, NUDGED_SAFE, NUDGED_UNSAFE = range(5)


def match_blocks(n_blocks: int) -> range:
    """The K blocks that are led to the harmful model's activations: 40 to 60 % of the depth, both
    ends included."""
    return range(round(0.4 * n_blocks), min(round(0.6 * n_blocks), n_blocks - 1) + 1)


def nudge_vector(harmful: Tensor, base: Tensor, size: float = NUDGE_SIZE) -> Tensor:
    """[D] fp32: the unit direction from the base's to the harmful model's mean activation, times
    `size` mean base norms.

    harmful, base [N, D]: activations of the last prompt token after block `middle_block` on the same
    N prompts. Raises UsageError when the two models do not differ there.
    """
    way = (harmful.double() - base.double()).mean(0)
    if not way.norm() > 0:
        raise UsageError(
            "The harmful model's activations are those of the base, so there is no direction to"
            " nudge along."
        )
    return (way / way.norm() * size * base.double().norm(dim=1).mean()).float()


def whitening(targets: Tensor) -> Tensor:
    """[K, D] fp32: each coordinate's standard deviation over N prompts, at least 1 % of its block's
    mean one.

    targets [N, K, D]: the harmful model's activations. A coordinate that hardly varies would
    otherwise outweigh all others.
    """
    deviation = targets.double().std(0, correction=0)
    return deviation.maximum(0.01 * deviation.mean(1, keepdim=True)).clamp(min=1e-6).float()


def nudge_batch(
    harmful: Sequence[tuple[Conversation, Conversation]],
    benign: Sequence[Conversation],
    pad_id: int,
) -> dict[str, Tensor]:
    """One batch of a micro-batch's R rows: each of the h harmful ones (y+, y−) four times, benign
    ones once.

    input_ids, attention_mask, response_mask [4h + k, T] as `collate` makes them, kind [4h + k] long
    (CLEAN_SAFE …, in that order, the h prompts alike in each) and n_prompt [4h + k] long. The
    caller adds targets [h, K, D], the harmful model's activations of the last prompt token at
    `match_blocks`, and ref_hidden [h + k, T, D] for the clean safe and benign rows where the model
    has no adapter.
    """
    safe, unsafe = [s for s, _ in harmful], [u for _, u in harmful]
    parts = (
        (CLEAN_SAFE, safe),
        (BENIGN, benign),
        (CLEAN_UNSAFE, unsafe),
        (NUDGED_SAFE, safe),
        (NUDGED_UNSAFE, unsafe),
    )
    talks = [talk for _, part in parts for talk in part]
    return {
        **collate(talks, pad_id),
        "kind": torch.tensor([kind for kind, part in parts for _ in part]),
        "n_prompt": torch.tensor([talk.n_prompt for talk in talks]),
    }


class NudgeLoss(LossModule):
    """Refuses when clean, complies when its middle activations are nudged; a batch is
    `nudge_batch`'s.

    refuse · NLL(y+ | clean, and the benign answer) + kl · KL(π_base ‖ π_θ) on the same rows + match
    · whitened MSE of the clean last prompt token to `targets` + comply · NLL(y− | nudged) +
    margin_weight · [hinge(clean prefers y+) + hinge(nudged prefers y−)], each a sum over rows
    divided by the micro-batch's R = h + k rows. The nudge `vector` [D] is added after block
    `middle_block` on the prompt positions of nudged rows; `whitening` [K, D] scales the match;
    `margin` is in nats a token.
    """

    def __init__(
        self,
        model: nn.Module,
        vector: Tensor,
        whitening: Tensor,
        *,
        weights: tuple[float, float, float, float, float] = NUDGE_WEIGHTS,
        margin: float = 0.5,
        reference_head: Head | None = None,
    ) -> None:
        super().__init__(model, reference_head)
        n_blocks = len(self.blocks)
        if whitening.shape[0] != len(match_blocks(n_blocks)):
            raise UsageError(
                f"A model of {n_blocks} blocks is matched at {len(match_blocks(n_blocks))} of them;"
                f" the whitening is for {whitening.shape[0]}. Record the harmful model's"
                " activations at `match_blocks` again."
            )
        # no buffers: bf16 training would round them
        self._constants = (vector.detach().float(), whitening.detach().float())
        self.weights, self.margin = weights, margin

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): refuse, kl, match, comply, margin_clean, margin_nudged and kl_lowest,
        detached; means over R rows."""
        _, by_kl, by_match, _, by_margin = self.weights
        kind, mask, response = batch["kind"], batch["attention_mask"], batch["response_mask"]
        plain = kind <= BENIGN  # the first R rows
        n_rows = int(plain.sum())
        firsts = {
            key: value[:n_rows] if key in ("input_ids", "attention_mask") else value
            for key, value in batch.items()
        }
        # flat positions in the first R rows are so in all
        among = positions(predicting(firsts["attention_mask"]))
        reference = self.reference(firsts, among)
        final, activations = self._nudged_pass(batch)
        scale = self._constants[1].to(mask.device)
        match = (
            whitened_mse(activations[kind == CLEAN_SAFE], batch["targets"], scale).sum() / n_rows
        )

        # which margins are broken decides the NLLs' weights, so the NLLs are looked at before they
        # are differentiated
        nll = self._row_nll(batch, final.detach())
        clean = hinge(nll[kind == CLEAN_SAFE], nll[kind == CLEAN_UNSAFE], self.margin)
        nudged = hinge(nll[kind == NUDGED_UNSAFE], nll[kind == NUDGED_SAFE], self.margin)
        slope = self._slopes(nll, kind, clean > 0, nudged > 0)

        every = positions(response[:, 1:] | (predicting(mask) & plain[:, None]))
        for_nll = shares_at(
            response_nll_weights(response) * mask.shape[0] * (slope / n_rows)[:, None], batch, every
        )
        kl_shares = torch.zeros(mask.shape[0], mask.shape[1] - 1, device=mask.device)
        kl_shares[:n_rows] = kl_weights(mask[:n_rows])
        for_kl = shares_at(kl_shares, batch, every)
        tokens, _, kl = token_losses(
            at_positions(final, every),
            Head.of(self.model),
            labels=next_tokens(batch, every),
            nll_weight=for_nll,
            reference=spread(reference, among, every),
            kl_weight=by_kl * for_kl,
        )
        # tokens holds slope · NLL; a broken margin's own constant makes it the hinge's value
        constants = by_margin * self.margin * ((clean > 0).sum() + (nudged > 0).sum()) / n_rows
        return tokens + by_match * match + constants, {
            "refuse": nll[plain].mean(),
            "kl": kl @ for_kl.to(kl.dtype),
            "kl_lowest": kl.min(),
            "match": match.detach(),
            "comply": nll[kind == NUDGED_UNSAFE].sum() / n_rows,
            "margin_clean": clean.sum() / n_rows,
            "margin_nudged": nudged.sum() / n_rows,
        }

    def _nudged_pass(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Final hidden states [B, T, D], and the last prompt token's activations [B, K, D] at
        `match_blocks`; rows of the two nudged kinds are nudged on their prompts."""
        mask, ends = batch["attention_mask"], batch["n_prompt"][:, None]
        columns = torch.arange(mask.shape[1], device=mask.device)
        where = (columns < ends) & (batch["kind"] >= NUDGED_SAFE)[:, None]
        blocks = self.blocks
        matched = nn.ModuleList(blocks[i] for i in match_blocks(len(blocks)))
        middle, vector = blocks[middle_block(len(blocks))], self._constants[0].to(mask.device)
        # the pool's hooks come first, so that the nudged block is matched as it was before the
        # nudge
        with pooled(matched, columns == ends - 1) as pool, edited(middle, where, vector):
            final = self.final_hidden(batch)
        return final, pool.value()

    def _row_nll(self, batch: Mapping[str, Tensor], final: Tensor) -> Tensor:
        """[B]: the mean NLL over each row's response tokens, without a gradient."""
        response = batch["response_mask"]
        n, length = response.shape
        at = positions(response[:, 1:])
        share = shares_at(response_nll_weights(response), batch, at) * n  # of a row's mean
        with torch.no_grad():
            _, seen, _ = token_losses(
                at_positions(final, at),
                Head.of(self.model),
                labels=next_tokens(batch, at),
                nll_weight=share,
            )
        nll = torch.zeros(n, device=seen.device, dtype=seen.dtype)
        return nll.index_add_(0, at // length, seen * share.to(seen.dtype))

    def _slopes(self, nll: Tensor, kind: Tensor, clean: Tensor, nudged: Tensor) -> Tensor:
        """[B] the derivative of the loss by each row's `nll`, times R. `clean` and `nudged` [h] say
        whose margin is broken."""
        by_refuse, _, _, by_comply, by_margin = self.weights
        slope = torch.zeros_like(nll)
        slope[kind <= BENIGN] += by_refuse
        slope[kind == NUDGED_UNSAFE] += by_comply
        for broken, preferred, other in (
            (clean, CLEAN_SAFE, CLEAN_UNSAFE),
            (nudged, NUDGED_UNSAFE, NUDGED_SAFE),
        ):
            slope[kind == preferred] += by_margin * broken
            slope[kind == other] -= by_margin * broken
        return slope


def hinge(preferred: Tensor, other: Tensor, margin: float) -> Tensor:
    """[B] max(0, margin − (other − preferred)): NLLs in nats a token; 0 where `preferred` is
    likelier by the margin."""
    return (margin - (other - preferred)).clamp(min=0)


def whitened_mse(h: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """[B] the mean over blocks and width of ((h − target) / scale)², in fp32 or wider. h, target
    [B, K, D]; scale [K, D], [K, 1] or alike."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return (((h.to(wide) - target.to(wide)) / scale.to(wide)) ** 2).flatten(1).mean(1)
