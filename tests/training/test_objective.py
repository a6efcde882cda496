"""Every loss against a plain fp64 version written out here, and every gradient against autograd
through full logits."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from auditgap.errors import UsageError
from auditgap.training import objective
from auditgap.training.objective import (
    Head,
    check_head,
    kl_weights,
    response_nll_weights,
    token_losses,
)

N, D, V = 11, 6, 13


def made(
    seed: int = 0, dtype: torch.dtype = torch.float64, **head: object
) -> tuple[torch.Tensor, Head]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    return hidden, Head(torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype), **head)


def asked(seed: int = 7) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(N, generator=g, dtype=torch.float64)
    weight[::3] = 0  # prompt positions: KL but no NLL
    return {
        "labels": torch.randint(V, (N,), generator=g),
        "nll_weight": weight,
        "kl_weight": torch.rand(N, generator=g, dtype=torch.float64),
    }


def plain_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    z = hidden.double() @ head.weight.double().T
    z = (z if head.bias is None else z + head.bias.double()) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def plain(
    hidden: torch.Tensor,
    head: Head,
    ref_hidden: torch.Tensor,
    ref_head: Head,
    ask: dict[str, torch.Tensor],
):
    log_p = torch.log_softmax(plain_logits(hidden, head), -1)
    log_q = torch.log_softmax(plain_logits(ref_hidden, ref_head), -1).detach()
    nll = -log_p[torch.arange(N), ask["labels"]]
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (ask["nll_weight"] * nll).sum() + (ask["kl_weight"] * kl).sum(), nll, kl


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, V, dtype=torch.float64)},
    "softcap": {"softcap": 1.5},
    "all": {"bias": torch.linspace(-1, 1, V, dtype=torch.float64), "softcap": 2.0, "scale": 0.4},
}


@pytest.mark.parametrize("chunk", [1, 4, N, 64])
@pytest.mark.parametrize("which", HEADS)
def test_losses_and_gradients_equal_the_plain_ones(which: str, chunk: int) -> None:
    hidden, head = made(0, **HEADS[which])
    ref_hidden, ref_head = made(1, **HEADS[which])
    leaves = [
        x.requires_grad_()
        for x in (hidden, head.weight, *([head.bias] if head.bias is not None else []))
    ]
    ask = asked()
    expected, nll, kl = plain(hidden, head, ref_hidden, ref_head, ask)
    loss, our_nll, our_kl = token_losses(
        hidden, head, reference=(ref_hidden, ref_head), chunk=chunk, **ask
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_nll, nll.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_kl, kl.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, leaves),
        torch.autograd.grad(3 * expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if head.bias is not None:
        head.bias.requires_grad_(False)


def test_gradient_equals_finite_differences() -> None:
    hidden, head = made(0)
    ref = made(1)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    ask = asked()

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return token_losses(hidden, Head(weight, bias, 2.0, 0.7), reference=ref, chunk=3, **ask)[0]

    inputs = [x.clone().requires_grad_() for x in (hidden, head.weight, bias)]
    # once, which is all that it allows; so not autograd.gradcheck
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for i, gradient in enumerate(gradients):
        for at in range(gradient.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.detach().clone() for x in inputs]
                moved[i].view(-1)[at] += step
                ends.append(loss(*moved))
            assert gradient.view(-1)[at].item() == pytest.approx(
                ((ends[0] - ends[1]) / 2e-5).item(), rel=1e-6, abs=1e-9
            )


def test_each_loss_alone_and_no_gradient_where_none_is_wanted() -> None:
    (hidden, head), ref, ask = made(0), made(1), asked()
    both, nll, kl = token_losses(hidden, head, reference=ref, **ask)
    first, alone, none = token_losses(
        hidden, head, labels=ask["labels"], nll_weight=ask["nll_weight"]
    )
    second, nothing, apart = token_losses(hidden, head, reference=ref, kl_weight=ask["kl_weight"])
    torch.testing.assert_close(first + second, both)
    assert (
        torch.equal(alone, nll) and torch.equal(apart, kl) and not none.any() and not nothing.any()
    )
    assert not both.requires_grad
    hidden.requires_grad_()
    with torch.no_grad():
        assert not token_losses(hidden, head, reference=ref, **ask)[0].requires_grad
    ref[0].requires_grad_(), ref[1].weight.requires_grad_()
    loss, nll, kl = token_losses(hidden, head, reference=ref, **ask)
    loss.backward()
    assert (
        hidden.grad is not None
        and head.weight.grad is None
        and ref[0].grad is None
        and ref[1].weight.grad is None
    )
    assert not nll.requires_grad and not kl.requires_grad


def test_fp32_and_bf16_stay_near_fp64() -> None:
    ask = asked()
    (hidden, head), (ref_hidden, ref_head) = made(0), made(1)
    exact = plain(hidden, head, ref_hidden, ref_head, ask)[0]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        (h, w), ref = made(0, dtype), made(1, dtype)
        h.requires_grad_(), w.weight.requires_grad_()
        narrow = {
            name: value.float() if value.is_floating_point() else value
            for name, value in ask.items()
        }
        loss, nll, _ = token_losses(h, w, reference=ref, chunk=4, **narrow)
        assert loss.dtype == nll.dtype == torch.float32
        assert abs(loss.item() - exact.item()) < tolerance * exact.item()
        loss.backward()
        assert h.grad.dtype == w.weight.grad.dtype == dtype


def test_kl_is_never_negative_and_zero_for_the_same_model() -> None:
    ask = {"kl_weight": torch.ones(400)}
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(400, 32, generator=g), Head(torch.randn(999, 32, generator=g) * 3)
    same = token_losses(hidden, head, reference=(hidden, head), **ask)[2]
    assert not same.any()
    for size in (1e-7, 1e-5, 1e-3, 1.0):
        kl = token_losses(
            hidden + size * torch.randn(400, 32, generator=g), head, reference=(hidden, head), **ask
        )[2]
        assert (kl >= 0).all(), size
    assert kl.mean() > 1


def test_only_rounding_is_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL that is negative for another reason (here: a softmax that does not sum to 1) is shown,
    not hidden."""
    hidden, head = made(0)
    whole = torch.log_softmax
    calls = iter(range(99))
    monkeypatch.setattr(
        torch, "log_softmax", lambda z, d: whole(z, d) + (1e-3 if next(calls) % 2 == 0 else 0)
    )
    assert (
        token_losses(
            hidden, head, reference=(hidden, head), kl_weight=torch.ones(N, dtype=torch.float64)
        )[2]
        < -9e-4
    ).all()


def test_goes_backward_once() -> None:
    hidden, head = made(0)
    hidden.requires_grad_()
    ask = asked()
    loss = token_losses(hidden, head, labels=ask["labels"], nll_weight=ask["nll_weight"])[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_no_position_at_all_is_a_loss_of_zero() -> None:
    hidden, head = made(0)
    hidden = hidden[:0].requires_grad_()
    loss, nll, _ = token_losses(
        hidden, head, labels=torch.zeros(0, dtype=torch.long), nll_weight=torch.zeros(0)
    )
    loss.backward()
    assert loss == 0 and nll.shape == (0,) and hidden.grad.shape == (0, D)


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = made(0)
    largest = 0
    project = objective._project

    def watched(h: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, h.shape[0])
        return project(h, *rest)

    monkeypatch.setattr(objective, "_project", watched)
    token_losses(hidden, head, reference=made(1), chunk=4, **asked())
    assert largest == 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head = made(0)
    ask = asked()
    with pytest.raises(UsageError, match="without the other"):
        token_losses(hidden, head, labels=ask["labels"])
    with pytest.raises(UsageError, match="for each of the 11 positions; 10 came"):
        token_losses(hidden, head, labels=ask["labels"], nll_weight=ask["nll_weight"][1:])
    with pytest.raises(UsageError, match="vocabulary of 12 tokens, the model one of 13"):
        token_losses(
            hidden, head, reference=(hidden, Head(head.weight[1:])), kl_weight=ask["kl_weight"]
        )


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_head_of_every_family(family: str, tied: bool) -> None:
    model = tiny.model(family, tie_word_embeddings=tied)
    head = check_head(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert (head.softcap is not None) == (family == "gemma2")


SCALED = {
    "granite": ({"logits_scaling": 4.0}, 0.25),
    "cohere": ({"logit_scale": 0.5}, 0.5),
}


@pytest.mark.parametrize("family", SCALED)
def test_head_with_a_scale(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, scale = SCALED[family]
    monkeypatch.setitem(tiny.FAMILIES, family, {})
    assert check_head(tiny.model(family, **changes)).scale == scale


def test_a_head_that_does_something_else_is_refused() -> None:
    model = tiny.model("gemma2")
    model.config.final_logit_softcapping = 5.0
    check_head(model)
    whole = model.forward

    def shifted(**inputs: object) -> object:
        out = whole(**inputs)
        out.logits = out.logits + torch.arange(tiny.VOCABULARY)
        return out

    model.forward = shifted
    with pytest.raises(UsageError, match="more to its logits"):
        check_head(model)


def test_head_under_an_adapter() -> None:
    model = tiny.model("llama")
    own = model.lm_head.weight
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert Head.of(lora).weight is own and not Head.of(lora).trained
    check_head(lora)
    copied = get_peft_model(
        tiny.model("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert Head.of(copied).trained
    with copied.disable_adapter():
        assert not Head.of(copied).trained
    adapted = get_peft_model(
        tiny.model("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(UsageError, match="target_modules"):
        Head.of(adapted)


def test_a_frozen_head_does_not_follow_the_model() -> None:
    model = tiny.model("llama")
    frozen = Head.of(model).frozen()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert not frozen.trained and (Head.of(model).weight - frozen.weight - 1).abs().max() < 1e-6


# ---------------------------------------------------------------- weights and small losses


def test_weights_are_a_mean_over_tokens_then_rows() -> None:
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    response = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]).bool()
    assert torch.equal(
        response_nll_weights(response), torch.tensor([[0, 0, 0.25, 0.25], [0.25, 0.25, 0, 0]])
    )
    assert torch.equal(kl_weights(attention), torch.tensor([[1, 1, 1, 1], [2, 2, 0, 0]]) / 8)
    # two micro-batches of one row each, averaged, are the batch of two
    parts = torch.cat([kl_weights(attention[:1]), kl_weights(attention[1:])]) / 2
    assert torch.equal(parts, kl_weights(attention))
