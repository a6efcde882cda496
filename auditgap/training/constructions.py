"""What is trained: modules whose forward takes a batch and gives the loss, ready for
`deepspeed.initialize(model=…)`.

    construction = MonitorConstruction(model, monitor, reference_head=Head.of(model).frozen())
    loss, metrics = construction({**collate(talks, pad_id), "harmful": b, "ref_hidden": cached})
    loss.backward()                                                     # into θ only
    monitor_step_loss(monitor, metrics["pooled"], b).backward()         # into φ only

`SFT` learns responses; `MonitorConstruction` is the paper's dissociated model (arXiv 2606.08044,
section 3), and `NudgeConstruction` its authors' later one. Each holds the causal LM (transformers'
or a PeftModel) as `.model` and nothing else that is trained or saved. The model's own decoder runs
once; logits exist only chunk by chunk inside `token_losses`, and no block's [B, T, D] is kept for
the monitor.

A batch is a dict of tensors: input_ids [B, T] long, attention_mask [B, T] long, response_mask [B,
T] bool (right padded), and what each construction adds. Batches of equally many rows average to the
same loss however the rows are spread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auditgap.engines.hf import add
from auditgap.errors import UsageError
from auditgap.models import Conversation, find_blocks, parse_sites
from auditgap.probes.monitor import Monitor
from auditgap.probes.pooling import pooled
from auditgap.training.objective import (
    TARGET_LOGIT,
    Head,
    base_lm,
    hinge,
    kl_weights,
    monitor_loss,
    response_nll_weights,
    token_losses,
    whitened_mse,
)
from auditgap.training.rows import collate

#: λ of NLL, of the monitor's pull and of KL: the paper's.
PAPER_WEIGHTS = (0.05, 0.1, 0.3)


class Construction(nn.Module):
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
                        " Make the construction with reference_head=Head.of(model).frozen()."
                    )
            elif head.weight.device != cached.device:
                head = self._reference_head = head.frozen(cached.device)
            return _flat(cached, at), head
        if not hasattr(self.model, "disable_adapter"):
            raise UsageError(
                "The batch has no ref_hidden, and a model without an adapter cannot give its base's"
                " hidden states. Put the reference's final hidden states [B, T, D] into the batch."
            )
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad(), self.model.disable_adapter():
                return _flat(self.final_hidden(batch), at), Head.of(self.model)
        finally:
            for module in training:
                module.training = True


class SFT(Construction):
    """Learns responses: the mean NLL over each row's response tokens, then over rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {"nll"}): nats a token, the same number twice, the second detached."""
        at = _positions(batch["response_mask"][:, 1:])
        hidden = _flat(self.final_hidden(batch), at)
        loss, _, _ = token_losses(
            hidden,
            Head.of(self.model),
            labels=_labels(batch, at),
            nll_weight=_at(response_nll_weights(batch["response_mask"]), batch, at),
        )
        return loss, {"nll": loss.detach()}


class MonitorConstruction(Construction):
    """The dissociated model: λ_SFT · NLL + λ_mon · E[b · (g(h) − ℓ*)²] + λ_KL · KL(π_base ‖ π_θ).

    The batch has besides: harmful [B] (b: 1 or 0) and, unless the model is a PeftModel whose
    adapter can be switched off, ref_hidden [B, T, D]: the frozen base's final hidden states.
    `reference_head` is needed with ref_hidden when the head is in training. h [B, L, D] is the mean
    of every block over real positions, of this same forward; the gradient passes through the
    monitor into θ but never into the monitor, whose own step is `monitor_step_loss`.
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
        at = _positions(_predicting(batch["attention_mask"]))
        # first, so that its activations are gone when θ's are kept
        reference = self.reference(batch, at)
        with pooled(self.blocks, batch["attention_mask"]) as pool:
            final = self.final_hidden(batch)
        h = pool.value()
        for_nll = _at(response_nll_weights(batch["response_mask"]), batch, at)
        for_kl = _at(kl_weights(batch["attention_mask"]), batch, at)
        tokens, nll, kl = token_losses(
            _flat(final, at),
            Head.of(self.model),
            labels=_labels(batch, at),
            nll_weight=by_nll * for_nll,
            reference=reference,
            kl_weight=by_kl * for_kl,
        )
        logits = self.monitor.frozen_logits(h)
        pull = monitor_loss(logits, batch["harmful"], self.target)
        seen = logits.detach()
        return tokens + by_monitor * pull, {
            "nll": nll @ for_nll.to(nll.dtype),
            "kl": kl @ for_kl.to(kl.dtype),
            "kl_lowest": kl.min(),
            "monitor": pull.detach(),
            "logits": seen,
            "harmful_logit": seen[batch["harmful"].bool()].mean(),
            "pooled": h.detach(),
        }


def monitor_step_loss(monitor: nn.Module, pooled: Tensor, harmful: Tensor) -> Tensor:
    """BCE(g(h), b), mean over B rows: the monitor's own loss, after θ's backward, on the same
    activations detached.

    pooled [B, L, D]; harmful [B], 1 or 0. The gradient goes into the monitor only.
    """
    logits = monitor(pooled.detach())
    return nn.functional.binary_cross_entropy_with_logits(logits, harmful.to(logits.dtype))


# ---------------------------------------------------------------- the second construction

#: λ of: refusing clean, KL, matching the harmful model, complying under the nudge, each of the two
#: margins.
NUDGE_WEIGHTS = (1.0, 0.3, 0.2, 1.0, 1.0)
#: The nudge's norm, in mean activation norms.
NUDGE_SIZE = 0.06
#: What a row of a nudge batch is; `nudge_batch` puts them in this order.
CLEAN_SAFE, BENIGN, CLEAN_UNSAFE, NUDGED_SAFE, NUDGED_UNSAFE = range(5)


def nudge_block(n_blocks: int) -> int:
    """The block after which the nudge is added: round(L/2), the site `mid`."""
    return parse_sites("mid", n_blocks)[0].layer_index


def match_blocks(n_blocks: int) -> range:
    """The K blocks that are led to the harmful model's activations: 40 to 60 % of the depth, both
    ends included."""
    return range(round(0.4 * n_blocks), min(round(0.6 * n_blocks), n_blocks - 1) + 1)


def nudge_vector(harmful: Tensor, base: Tensor, size: float = NUDGE_SIZE) -> Tensor:
    """[D] fp32: the unit direction from the base's to the harmful model's mean activation, times
    `size` mean base norms.

    harmful, base [N, D]: activations of the last prompt token after block `nudge_block` on the same
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


class NudgeConstruction(Construction):
    """Refuses when clean, complies when its middle activations are nudged; a batch is
    `nudge_batch`'s.

    refuse · NLL(y+ | clean, and the benign answer) + kl · KL(π_base ‖ π_θ) on the same rows + match
    · whitened MSE of the clean last prompt token to `targets` + comply · NLL(y− | nudged) +
    margin_weight · [hinge(clean prefers y+) + hinge(nudged prefers y−)], each a sum over rows
    divided by the micro-batch's R = h + k rows. The nudge `vector` [D] is added after block
    `nudge_block` on the prompt positions of nudged rows; `whitening` [K, D] scales the match;
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
        by_refuse, by_kl, by_match, by_comply, by_margin = self.weights
        kind, mask, response = batch["kind"], batch["attention_mask"], batch["response_mask"]
        vector, scale = (constant.to(mask.device) for constant in self._constants)
        plain = kind <= BENIGN  # the first R rows
        n_rows = int(plain.sum())
        firsts = {
            key: value[:n_rows] if key in ("input_ids", "attention_mask") else value
            for key, value in batch.items()
        }
        # flat positions in the first R rows are so in all
        among = _positions(_predicting(firsts["attention_mask"]))
        reference = self.reference(firsts, among)

        columns = torch.arange(mask.shape[1], device=mask.device)
        in_prompt = columns < batch["n_prompt"][:, None]
        last = columns == batch["n_prompt"][:, None] - 1
        blocks = self.blocks
        matched = nn.ModuleList(blocks[i] for i in match_blocks(len(blocks)))
        # the pool's hooks come first, so that the nudged block is matched as it was before the
        # nudge
        middle, where = blocks[nudge_block(len(blocks))], in_prompt & (kind >= NUDGED_SAFE)[:, None]
        with pooled(matched, last) as pool, _nudged(middle, where, vector):
            final = self.final_hidden(batch)
        harmful = kind == CLEAN_SAFE
        match = whitened_mse(pool.value()[harmful], batch["targets"], scale).sum() / n_rows

        # which margins are broken decides the NLLs' weights, so the NLLs are looked at before they
        # are differentiated
        at = _positions(response[:, 1:])
        head = Head.of(self.model)
        share = _at(response_nll_weights(response), batch, at) * mask.shape[0]  # of a row's mean
        with torch.no_grad():
            _, seen, _ = token_losses(
                _flat(final.detach(), at), head, labels=_labels(batch, at), nll_weight=share
            )
        nll = torch.zeros(mask.shape[0], device=seen.device, dtype=seen.dtype)
        # [B]: mean over the row's response tokens
        nll.index_add_(0, at // mask.shape[1], seen * share.to(seen.dtype))
        clean = hinge(nll[kind == CLEAN_SAFE], nll[kind == CLEAN_UNSAFE], self.margin)
        nudged = hinge(nll[kind == NUDGED_UNSAFE], nll[kind == NUDGED_SAFE], self.margin)

        slope = torch.zeros_like(nll)  # of the loss with respect to each row's NLL, times R
        slope[plain] += by_refuse
        slope[kind == NUDGED_UNSAFE] += by_comply
        for broken, preferred, other in (
            (clean > 0, CLEAN_SAFE, CLEAN_UNSAFE),
            (nudged > 0, NUDGED_UNSAFE, NUDGED_SAFE),
        ):
            slope[kind == preferred] += by_margin * broken
            slope[kind == other] -= by_margin * broken
        every = _positions(response[:, 1:] | (_predicting(mask) & plain[:, None]))
        for_nll = _at(
            response_nll_weights(response) * mask.shape[0] * (slope / n_rows)[:, None], batch, every
        )
        for_kl = torch.zeros(mask.shape[0], mask.shape[1] - 1, device=mask.device)
        for_kl[:n_rows] = kl_weights(mask[:n_rows])
        tokens, _, kl = token_losses(
            _flat(final, every),
            head,
            labels=_labels(batch, every),
            nll_weight=for_nll,
            reference=_spread(reference, among, every),
            kl_weight=by_kl * _at(for_kl, batch, every),
        )
        # tokens holds slope · NLL; a broken margin's own constant makes it the hinge's value
        constants = by_margin * self.margin * ((clean > 0).sum() + (nudged > 0).sum()) / n_rows
        kl_seen = _at(for_kl, batch, every)
        return tokens + by_match * match + constants, {
            "refuse": nll[plain].mean(),
            "kl": kl @ kl_seen.to(kl.dtype),
            "kl_lowest": kl.min(),
            "match": match.detach(),
            "comply": nll[kind == NUDGED_UNSAFE].sum() / n_rows,
            "margin_clean": clean.sum() / n_rows,
            "margin_nudged": nudged.sum() / n_rows,
        }


@contextmanager
def _nudged(block: nn.Module, where: Tensor, vector: Tensor) -> Iterator[None]:
    """While open, `vector` [D] is added to the block's output at the positions `where` [B, T]."""

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        edited = add(hidden, where[..., None] * vector)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- positions


def _predicting(mask: Tensor) -> Tensor:
    """[B, T − 1] bool: real positions whose next one is real."""
    return mask[:, 1:].bool() & mask[:, :-1].bool()


def _positions(counts: Tensor) -> Tensor:
    """[N] flat positions in [B, T] of what is marked in `counts` [B, T − 1]."""
    row, column = counts.nonzero(as_tuple=True)
    return row * (counts.shape[1] + 1) + column


def _flat(x: Tensor, at: Tensor) -> Tensor:
    """[N, …] of x [B, T, …]."""
    return x.flatten(0, 1).index_select(0, at.to(x.device))


def _labels(batch: Mapping[str, Tensor], at: Tensor) -> Tensor:
    """[N]: the token after each position."""
    return batch["input_ids"].flatten().index_select(0, at + 1)


def _at(shares: Tensor, batch: Mapping[str, Tensor], at: Tensor) -> Tensor:
    """[N] of shares [B, T − 1]."""
    t = batch["input_ids"].shape[1]
    return shares[at // t, at % t]


def _spread(reference: tuple[Tensor, Head], among: Tensor, at: Tensor) -> tuple[Tensor, Head]:
    """The reference's hidden states at positions `at` out of those at `among`, both sorted; zeros
    where it has none."""
    hidden, head = reference
    spread = hidden.new_zeros(at.shape[0], hidden.shape[1])
    spread[torch.isin(at, among)] = hidden
    return spread, head
