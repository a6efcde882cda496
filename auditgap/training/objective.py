"""The losses that make a dissociated model, as pure functions of hidden states: no [N, V] tensor of
logits ever exists.

    head = Head.of(model)
    loss, nll, kl = token_losses(hidden, head, labels=labels, nll_weight=w, reference=(ref_hidden, ref_head), kl_weight=u)
    # into hidden [N, D], and into the head where its weight is trained
    loss.backward()

`hidden` are the model's final hidden states at the N positions that predict a token. The vocabulary
is visited for a few positions at a time, where both losses and their gradients are computed at
once; backward is then one multiplication. All losses are computed in fp32 (fp64 for fp64 inputs).
Their sum over a batch is arXiv 2606.08044, section 3 (its construction).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auditgap.errors import UsageError

#: Elements of a chunk's logits [c, V]; about four such buffers of fp32 are alive at once.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True, eq=False)
class Head:
    """A causal LM's way from final hidden states to logits: `softcap · tanh(scale · (h Wᵀ + b) /
    softcap)`."""

    weight: Tensor  #: [V, D]
    bias: Tensor | None = None  #: [V]
    softcap: float | None = None  #: Gemma's final_logit_softcapping
    #: Cohere's logit_scale, the inverse of Granite's logits_scaling, Falcon-H1's lm_head_multiplier
    scale: float = 1.0

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a transformers causal LM or a PeftModel around one, sharing its weight (not a
        copy).

        Under an adapter that trains its own copy of the head, the copy that is in use now. Raises
        UsageError when the head itself carries an adapter, or is no plain projection. `check_head`
        proves that nothing else happens to the logits.
        """
        base = base_lm(model)
        layer: Any = base.get_output_embeddings()
        if hasattr(layer, "modules_to_save"):  # PEFT trains a copy of the whole layer
            layer = (
                layer.original_module
                if layer.disable_adapters
                else layer.modules_to_save[layer.active_adapters[0]]
            )
        weight = getattr(layer, "weight", None)
        if weight is None or hasattr(layer, "base_layer"):
            raise UsageError(
                f"{type(base).__name__}: its output head is {type(layer).__name__}, not a plain"
                " projection of hidden states. Leave the head out of the adapter's target_modules,"
                " or choose another model."
            )
        config = base.config.get_text_config()
        # transformers gives the scale four names; which way it acts is each family's own
        scale = 1.0
        if (times := getattr(config, "logit_scale", None)) is not None:
            scale *= float(times)
        if (times := getattr(config, "lm_head_multiplier", None)) is not None:
            scale *= float(times)
        if (by := getattr(config, "logits_scaling", None)) is not None:
            scale *= float(by) if config.model_type.startswith("hyperclovax") else 1 / float(by)
        return cls(
            weight,
            getattr(layer, "bias", None),
            getattr(config, "final_logit_softcapping", None),
            scale,
        )

    @property
    def trained(self) -> bool:
        """Whether its weight or bias is a parameter in training."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def frozen(self, device: torch.device | str | None = None) -> Head:
        """A copy of its own, out of every gradient's reach: the reference's head, when the model's
        is going to change."""
        return replace(
            self,
            weight=_copied(self.weight, device),
            bias=None if self.bias is None else _copied(self.bias, device),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] in fp32 (fp64 for fp64) from `hidden` [N, D]. For a few positions: `token_losses`
        is for many."""
        return _project(hidden, self.weight, self.bias, self.softcap, self.scale)


def base_lm(model: Any) -> PreTrainedModel:
    """The transformers causal LM inside `model`: itself, or what a PeftModel wraps (with the
    adapter's layers in place)."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def check_head(model: nn.Module, *, rows: int = 2, tokens: int = 8, seed: int = 0) -> Head:
    """Prove on random ids that the head on the decoder's final hidden states gives the model's own
    logits; returns the head.

    Whatever else a family does to its logits would make both losses those of another model, so it
    is refused: raises UsageError naming the largest difference. The model is run as it stands (an
    active adapter included), without dropout.
    """
    base = base_lm(model)
    head = Head.of(model)
    device = head.weight.device
    ids = torch.randint(
        head.weight.shape[0], (rows, tokens), generator=torch.Generator().manual_seed(seed)
    ).to(device)
    training = base.training
    base.eval()
    try:
        with torch.no_grad():
            own = base(input_ids=ids, use_cache=False).logits.float()
            hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            ours = head.logits(hidden.flatten(0, 1)).view(own.shape).float()
    finally:
        base.train(training)
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 3e-2
    worst = (own - ours).abs().max().item()
    if not worst <= tolerance * (1 + own.abs().max().item()):
        raise UsageError(
            f"{type(base).__name__} does more to its logits than auditgap knows of (they differ by"
            f" {worst:.3g}), so its losses would be those of another model. Choose a model whose"
            " logits are a projection of its final hidden states."
        )
    return head


# ---------------------------------------------------------------- tokens: NLL and KL


def token_losses(
    hidden: Tensor,
    head: Head,
    *,
    labels: Tensor | None = None,
    nll_weight: Tensor | None = None,
    reference: tuple[Tensor, Head] | None = None,
    kl_weight: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ nll_weight · NLL + Σ kl_weight · KL(π_base ‖ π_θ) over N positions, in nats, chunk by chunk
    over the vocabulary.

    hidden [N, D] and head: the model in training, bf16, fp32 or fp64. labels [N]: the token that
    each position predicts. reference: the frozen base's final hidden states [N, D] at the same
    positions, and its head; never differentiated. nll_weight, kl_weight [N]: 0 where a loss does
    not count (a position where both are 0 had better not come at all). chunk: positions at a time;
    by default such that a chunk's logits take 16 MB on a CPU and 256 MB on a GPU.

    Returns (loss, nll [N], kl [N]): `loss` differentiable with respect to hidden and the head's
    weight and bias, once (the gradient is computed on the way); nll and kl detached and unweighted,
    zeros where not asked for. KL is forward and token-wise. A KL between −1e-6 · (1 +
    |log-normaliser|) and 0 is rounding and becomes 0; anything below stays as it is, so that a
    caller can see it. Raises UsageError when shapes do not fit.
    """
    n = hidden.shape[0]
    if (labels is None) != (nll_weight is None) or (reference is None) != (kl_weight is None):
        raise UsageError(
            "token_losses takes labels with nll_weight, and reference with kl_weight; one came"
            " without the other."
        )
    expected = {
        "labels": labels,
        "nll_weight": nll_weight,
        "kl_weight": kl_weight,
        "reference": reference and reference[0],
    }
    for name, value in expected.items():
        if value is not None and value.shape[0] != n:
            raise UsageError(
                f"token_losses takes {name} for each of the {n} positions; {value.shape[0]} came."
            )
    if reference is not None and reference[1].weight.shape[0] != head.weight.shape[0]:
        raise UsageError(
            f"The reference has a vocabulary of {reference[1].weight.shape[0]} tokens, the model"
            f" one of {head.weight.shape[0]}; KL needs the same vocabulary. Use the reference that"
            " the model was made from."
        )
    if chunk is None:
        chunk = max(16, _CHUNK_ELEMENTS.get(hidden.device.type, 2**22) // head.weight.shape[0])
    nll = None if labels is None or nll_weight is None else (labels, nll_weight)
    kl = None if reference is None or kl_weight is None else (*reference, kl_weight)
    plan = _Plan(nll, kl, chunk, head.softcap, head.scale, torch.is_grad_enabled())
    return _TokenLosses.apply(hidden, head.weight, head.bias, plan)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything about a call that has no gradient."""

    nll: tuple[Tensor, Tensor] | None  #: labels, weights
    kl: tuple[Tensor, Head, Tensor] | None  #: the reference's hidden states and head, weights
    chunk: int
    softcap: float | None
    scale: float
    grad: bool

    def visit(
        self,
        at: slice,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        nll: Tensor,
        kl: Tensor,
        *,
        gradient: bool,
    ) -> Tensor | None:
        """One chunk's NLL and KL, written into `nll` [N] and `kl` [N]; with `gradient` also d loss /
        d (h Wᵀ + b) [c, V]: (w + u) p − w · 1[label] − u q, through scale and soft-cap."""
        z = _project(h, weight, bias, self.softcap, self.scale)  # [c, V]
        # the slope of the soft-cap, needed only on the way back
        slope = 1 - (z / self.softcap) ** 2 if self.softcap is not None and gradient else None
        log_p = torch.log_softmax(z, -1)
        # 1 + |log-normaliser|: what rounding is relative to
        size = 1 + (z[:, 0] - log_p[:, 0]).abs()
        del z
        picked, back = None, None
        total = torch.zeros(h.shape[0], dtype=log_p.dtype, device=h.device)
        if self.nll is not None:
            label, weights = self.nll[0][at, None], self.nll[1][at]
            nll[at] = -log_p.gather(1, label)[:, 0]
            total = total + weights
            picked = label, -weights[:, None]
        if self.kl is not None:
            ref_hidden, ref_head, weights = self.kl
            log_q = torch.log_softmax(ref_head.logits(ref_hidden[at]), -1)
            q = log_q.exp()
            size = size.maximum(1 + log_q[:, 0].abs())
            value = torch.linalg.vecdot(q, log_q.sub_(log_p))  # Σ q (log q − log p)
            del log_q
            kl[at] = torch.where((value < 0) & (value > -1e-6 * size), 0.0, value)
            total = total + weights[at]
            back = q.mul_(weights[at, None])
        if not gradient:
            return None
        g = log_p.exp_().mul_(total[:, None])  # (w + u) p
        if back is not None:
            g.sub_(back)
            del back
        if picked is not None:
            g.scatter_add_(1, picked[0], picked[1].to(g.dtype))
        if slope is not None:
            g.mul_(slope)
        return g if self.scale == 1.0 else g.mul_(self.scale)


class _TokenLosses(torch.autograd.Function):
    """The losses and, in the same visit of each chunk, their gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, wide = hidden.shape[0], _wide(hidden)
        nll = torch.zeros(n, dtype=wide, device=hidden.device)
        kl = torch.zeros_like(nll)
        needs = [plan.grad and needed for needed in ctx.needs_input_grad[:3]]
        any_needed = any(needs)
        to_hidden = torch.empty_like(hidden) if needs[0] else None
        to_weight = (
            torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
            if needs[1]
            else None
        )
        to_bias = (
            torch.zeros(bias.shape, dtype=wide, device=weight.device)
            if needs[2] and bias is not None
            else None
        )

        for start in range(0, n, plan.chunk):
            at = slice(start, start + plan.chunk)
            h = hidden[at]
            g = plan.visit(at, h, weight, bias, nll, kl, gradient=any_needed)
            if g is None:
                continue
            if to_bias is not None:
                to_bias += g.sum(0)
            g = g.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[at] = (g @ weight).to(hidden.dtype)
            if to_weight is not None:
                to_weight.addmm_(g.T, h) if to_weight.dtype == h.dtype else to_weight.add_(g.T @ h)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        if plan.nll is not None:
            loss = loss + nll @ plan.nll[1].to(wide)
        if plan.kl is not None:
            loss = loss + kl @ plan.kl[2].to(wide)
        # attributes and not saved tensors: they are neither inputs nor outputs, so nothing is kept
        # alive in a circle
        ctx.gradients = (
            to_hidden,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None or bias is None else to_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(nll, kl)
        return loss, nll, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the names of its parameters
        ctx: Any, upstream: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "token_losses goes backward once; compute it again for another pass."
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients), None)


def _project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """Logits [N, V] in fp32 or wider: the product in the weight's dtype, everything after it in
    fp32."""
    wide = _wide(hidden)
    if hidden.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and wide == torch.float32:
        # unrounded, where the device can
        z = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    else:
        z = (hidden.to(weight.dtype) @ weight.T).to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else (z / softcap).tanh() * softcap


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _copied(x: Tensor, device: torch.device | str | None) -> Tensor:
    return x.detach().to(device=device, copy=True)


# ---------------------------------------------------------------- which positions count, and how
# much


def response_nll_weights(response_mask: Tensor) -> Tensor:
    """[B, T − 1] fp32: the share of each predicting position in the mean over a row's response
    tokens, then over rows.

    response_mask [B, T] marks the response's own tokens; column t of the result is for position t,
    which predicts t + 1. Shares sum to 1 over a batch in which every row has a response, however
    rows are spread over ranks and micro-batches.
    """
    return _shares(response_mask[:, 1:])


def kl_weights(attention_mask: Tensor) -> Tensor:
    """[B, T − 1] fp32: likewise over every real predicting position, prompt and response: one that
    has a real next token."""
    return _shares(attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool())


def _shares(counts: Tensor) -> Tensor:
    counts = counts.float()
    return counts / counts.sum(1, keepdim=True).clamp(min=1) / counts.shape[0]
