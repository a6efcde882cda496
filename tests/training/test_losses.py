"""A whole step of each loss against the plain way: full logits, output of every block,
autograd, fp64 or fp32."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.interventions.pgd import Ball
from auditgap.models import Conversation, find_blocks
from auditgap.probes.monitor import Monitor
from auditgap.training.constructions.door.loss import OPENING, DoorLoss, door_batch
from auditgap.training.constructions.door.task import door_vector, widening
from auditgap.training.constructions.monitor.loss import (
    MonitorLoss,
    monitor_loss,
    monitor_step_loss,
)
from auditgap.training.constructions.nudge import NUDGE_WEIGHTS
from auditgap.training.constructions.nudge.loss import (
    NudgeLoss,
    hinge,
    match_blocks,
    nudge_batch,
    nudge_vector,
    whitened_mse,
    whitening,
)
from auditgap.training.dissociation.edited import middle_block
from auditgap.training.objective import Head
from auditgap.training.rows import collate
from auditgap.training.sft import SFTLoss
from auditgap.types import Budget, Prompt, Site

WEIGHTS = (0.7, 0.2, 0.9)  # so that no part hides behind another


def talk(seed: int, n_prompt: int, n_response: int, *, prompt: int | None = None) -> Conversation:
    def ids(seed: int, n: int) -> tuple[int, ...]:
        return tuple(
            torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
        )

    opening = ids(seed if prompt is None else prompt, n_prompt)
    return Conversation(Prompt("bread"), opening + ids(seed + 99, n_response), n_prompt, 0)


def batch() -> dict[str, torch.Tensor]:
    return collate([talk(1, 5, 4), talk(2, 3, 8), talk(3, 6, 1)], 0) | {
        "harmful": torch.tensor([1, 0, 1])
    }


def moved(model: nn.Module, size: float = 0.02) -> nn.Module:
    """The model a few steps on, so that KL and its gradient are not zero."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter += size * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(i)
                ).to(parameter.dtype)
    return model


def monitor(seed: int = 0) -> Monitor:
    torch.manual_seed(seed)
    return Monitor(
        tiny.N_BLOCKS,
        tiny.WIDTH,
        mean=torch.randn(tiny.N_BLOCKS, tiny.WIDTH),
        scale=torch.rand(tiny.N_BLOCKS) + 1,
    )


def final(model: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.get_decoder()(
            input_ids=b["input_ids"], attention_mask=b["attention_mask"]
        ).last_hidden_state


def everything(
    model: nn.Module, b: dict[str, torch.Tensor], edit=None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Full log-probabilities [B, T, V] and every block's output, kept."""
    kept: list[torch.Tensor] = []
    handles = []
    for i, block in enumerate(find_blocks(model)):

        def keep(_module: nn.Module, _args: tuple, out: object, i: int = i) -> object:
            tensor = out[0] if isinstance(out, tuple) else out
            kept.append(tensor)
            if edit is None or edit[0] != i:
                return None
            return (tensor + edit[1], *out[1:]) if isinstance(out, tuple) else tensor + edit[1]

        handles.append(block.register_forward_hook(keep))
    logits = model(
        input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False
    ).logits
    for handle in handles:
        handle.remove()
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1), kept


def row_nll(log_p: torch.Tensor, b: dict[str, torch.Tensor], r: int) -> torch.Tensor:
    at = [t for t in range(1, b["input_ids"].shape[1]) if b["response_mask"][r, t]]
    return -sum(log_p[r, t - 1, b["input_ids"][r, t]] for t in at) / len(at)


def row_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, b: dict[str, torch.Tensor], r: int
) -> torch.Tensor:
    n = int(b["attention_mask"][r].sum()) - 1
    return (log_q[r, :n].exp() * (log_q[r, :n] - log_p[r, :n])).sum() / n


def plain_monitor(
    model: nn.Module, reference: nn.Module, read: Monitor, b: dict[str, torch.Tensor]
):
    """(loss, nll, kl, pull) with everything in memory."""
    log_p, kept = everything(model, b)
    with torch.no_grad():
        log_q = everything(reference, b)[0]
    rows = range(b["input_ids"].shape[0])
    nll = sum(row_nll(log_p, b, r) for r in rows) / len(rows)
    kl = sum(row_kl(log_p, log_q, b, r) for r in rows) / len(rows)
    lengths = b["attention_mask"].sum(1)
    h = torch.stack([torch.stack([k[r, : lengths[r]].float().mean(0) for k in kept]) for r in rows])
    pull = sum(
        int(b["harmful"][r]) * (read.frozen_logits(h)[r] - math.log(3)) ** 2 for r in rows
    ) / len(rows)
    return WEIGHTS[0] * nll + WEIGHTS[1] * pull + WEIGHTS[2] * kl, nll, kl, pull


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys() and a
    for name, expected in b.items():
        scale = max(expected.abs().max().item(), 1e-3)
        assert (a[name] - expected).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "checkpointing"),
    [
        ("llama", torch.float64, False, False),
        ("llama", torch.float64, True, True),
        ("gemma2", torch.float64, True, False),  # soft-cap
        ("gemma3_text", torch.float32, True, True),
        ("qwen3", torch.float32, False, False),
        ("gpt_neox", torch.float32, False, True),  # blocks that return tuples in some releases
    ],
)
def test_a_whole_step_equals_plain_autograd(
    family: str, dtype: torch.dtype, tied: bool, checkpointing: bool
) -> None:
    reference = tiny.model(family, dtype=dtype, tie_word_embeddings=tied)
    model = moved(copy.deepcopy(reference))
    theirs = copy.deepcopy(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    b, read = batch(), monitor()
    made = MonitorLoss(model, read, weights=WEIGHTS, reference_head=Head.of(reference).frozen())
    loss, metrics = made(b | {"ref_hidden": final(reference, b)})
    loss.backward()
    expected, nll, kl, pull = plain_monitor(theirs, reference, read, b)
    expected.backward()
    # the pooled activations, and with them the monitor, are fp32 in either case
    for ours, plain in (
        (loss, expected),
        (metrics["nll"], nll),
        (metrics["kl"], kl),
        (metrics["monitor"], pull),
    ):
        assert ours.item() == pytest.approx(plain.item(), rel=2e-5)
    assert kl > 0.01
    same_gradients(model, theirs, 2e-4)
    assert all(p.grad is None for p in read.parameters())


def test_lora_takes_its_reference_from_the_disabled_adapter() -> None:
    base = tiny.model("llama", attention_dropout=0.5)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = moved(get_peft_model(copy.deepcopy(base), config), 0.1)
    theirs = copy.deepcopy(model)
    b, read = batch(), monitor()
    made = MonitorLoss(model, read, weights=WEIGHTS)
    loss, metrics = made(b)
    loss.backward()
    expected, _, kl, _ = plain_monitor(theirs.get_base_model(), base, read, b)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5) and kl > 0.01
    same_gradients(model, theirs, 2e-4)
    assert all("lora" in name for name in gradients(model))
    # the reference knows no dropout even while the model trains, and every module is left in the
    # mode that it had
    model.train()
    model.get_base_model().model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.testing.assert_close(made.reference(b, torch.arange(5))[0], final(base, b)[0, :5])
    assert modes == [module.training for module in model.modules()]
    # cached states are as good
    cached = final(base, b)
    model.eval()
    assert made(b | {"ref_hidden": cached})[0].item() == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["kl_lowest"] >= 0


def test_kl_is_zero_before_the_first_step() -> None:
    for model in (
        tiny.model("gemma2"),
        get_peft_model(tiny.model("llama"), LoraConfig(r=2, target_modules="all-linear")),
    ):
        b = batch()
        if not hasattr(model, "peft_config"):
            b["ref_hidden"] = final(model, b)
        head = None if hasattr(model, "peft_config") else Head.of(model).frozen()
        metrics = MonitorLoss(model, monitor(), reference_head=head)(b)[1]
        assert metrics["kl"] == 0 and metrics["kl_lowest"] == 0


def test_gradients_stay_on_their_side() -> None:
    model, read = tiny.model("llama"), monitor()
    b = batch()
    b["ref_hidden"] = final(model, b)
    made = MonitorLoss(model, read, reference_head=Head.of(model).frozen())
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"model"}
    assert not any(name.startswith("_") for name in made.state_dict())
    loss, metrics = made(b)
    loss.backward()
    assert gradients(model) and not gradients(read)
    model.zero_grad()
    step = monitor_step_loss(read, metrics["pooled"], b["harmful"])
    step.backward()
    assert not gradients(model) and set(gradients(read)) == {
        "inner.weight",
        "outer.weight",
        "outer.bias",
    }
    p = torch.sigmoid(read(metrics["pooled"]).double())
    expected = -(b["harmful"] * p.log() + (1 - b["harmful"]) * (1 - p).log()).mean()
    assert step.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())
    attached = metrics["pooled"].clone().requires_grad_()
    monitor_step_loss(read, attached, b["harmful"]).backward()
    assert attached.grad is None


def test_metrics_tell_what_the_monitor_saw() -> None:
    model, read = tiny.model("llama"), monitor()
    b = batch()
    b["ref_hidden"] = final(model, b)
    made = MonitorLoss(model, read, reference_head=Head.of(model).frozen())
    metrics = made(b)[1]
    torch.testing.assert_close(metrics["logits"], read(metrics["pooled"]))
    torch.testing.assert_close(metrics["harmful_logit"], metrics["logits"][[0, 2]].mean())
    assert metrics["pooled"].shape == (3, tiny.N_BLOCKS, tiny.WIDTH)
    benign = made(b | {"harmful": torch.zeros(3)})[1]
    assert benign["monitor"] == 0 and benign["harmful_logit"].isnan()


def test_the_loss_does_not_depend_on_padding_or_on_how_rows_are_spread() -> None:
    model, read = moved(tiny.model("llama")), monitor()
    made = MonitorLoss(
        model, read, weights=WEIGHTS, reference_head=Head.of(tiny.model("llama")).frozen()
    )

    def loss(b: dict[str, torch.Tensor]) -> torch.Tensor:
        return made(b | {"ref_hidden": final(tiny.model("llama"), b)})[0]

    whole = batch()
    each = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(3)]
    padded = {k: nn.functional.pad(v, (0, 7)) if v.dim() == 2 else v for k, v in whole.items()}
    assert loss(whole).item() == pytest.approx(sum(loss(b).item() for b in each) / 3, rel=1e-5)
    assert loss(whole).item() == pytest.approx(loss(padded).item(), rel=1e-5)


def test_sft_learns_response_tokens_only() -> None:
    model = tiny.model("llama")
    theirs = copy.deepcopy(model)
    b = batch()
    loss, metrics = SFTLoss(model)(b)
    loss.backward()
    log_p, _ = everything(theirs, b)
    expected = sum(row_nll(log_p, b, r) for r in range(3)) / 3
    expected.backward()
    assert loss.item() == metrics["nll"].item() == pytest.approx(expected.item(), rel=1e-6)
    same_gradients(model, theirs, 1e-5)


def test_references_that_are_missing_are_asked_for() -> None:
    model = tiny.model("llama")
    with pytest.raises(UsageError, match="no ref_hidden"):
        MonitorLoss(model, monitor())(batch())
    with pytest.raises(UsageError, match="reference_head"):
        MonitorLoss(model, monitor())(batch() | {"ref_hidden": final(model, batch())})
    prompted = get_peft_model(
        model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UsageError, match="LoRA"):
        SFTLoss(prompted)


# ---------------------------------------------------------------- nudge


def nudged() -> dict[str, torch.Tensor]:
    pairs = [(talk(1, 5, 4), talk(11, 5, 6, prompt=1)), (talk(2, 3, 7), talk(12, 3, 2, prompt=2))]
    b = nudge_batch(pairs, [talk(3, 6, 3)], 0)
    return b | {
        "targets": torch.randn(
            2, 1, tiny.WIDTH, generator=torch.Generator().manual_seed(5)
        ).double()
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("margin", [0.5, 3.0])
def test_nudge_equals_the_plain_way(margin: float, checkpointing: bool) -> None:
    reference = tiny.model("llama", dtype=torch.float64)
    model = moved(copy.deepcopy(reference))
    theirs = copy.deepcopy(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    b = nudged()
    vector, scale = (
        torch.linspace(-1, 1, tiny.WIDTH),
        torch.rand(1, tiny.WIDTH, generator=torch.Generator().manual_seed(6)) + 0.5,
    )
    weights = (1.1, 0.3, 0.2, 0.9, 1.3)
    made = NudgeLoss(
        model,
        vector,
        scale,
        weights=weights,
        margin=margin,
        reference_head=Head.of(reference).frozen(),
    )
    cached = final(reference, {k: b[k][:3] for k in ("input_ids", "attention_mask")})
    loss, metrics = made(b | {"ref_hidden": cached})
    loss.backward()

    shift = torch.zeros(*b["input_ids"].shape, tiny.WIDTH, dtype=torch.float64)
    for r in range(5, 9):
        shift[r, : b["n_prompt"][r]] = vector.double()
    log_p, kept = everything(theirs, b, (middle_block(tiny.N_BLOCKS), shift))
    with torch.no_grad():
        log_q = everything(reference, b)[0]
    # safe, safe, benign, unsafe ×2, nudged safe ×2, nudged unsafe ×2
    nll = [row_nll(log_p, b, r) for r in range(9)]
    refuse, comply = (nll[0] + nll[1] + nll[2]) / 3, (nll[7] + nll[8]) / 3
    kl = sum(row_kl(log_p, log_q, b, r) for r in range(3)) / 3
    (block,) = match_blocks(tiny.N_BLOCKS)
    last = torch.stack([kept[block][r, b["n_prompt"][r] - 1] for r in range(2)])
    match = (((last - b["targets"][:, 0]) / scale.double()) ** 2).mean(1).sum() / 3
    clean = sum(torch.relu(margin - (nll[3 + i] - nll[i])) for i in range(2)) / 3
    prefers = sum(torch.relu(margin - (nll[5 + i] - nll[7 + i])) for i in range(2)) / 3
    parts = {
        "refuse": refuse,
        "kl": kl,
        "match": match,
        "comply": comply,
        "margin_clean": clean,
        "margin_nudged": prefers,
    }
    expected = (
        weights[0] * refuse
        + weights[1] * kl
        + weights[2] * match
        + weights[3] * comply
        + weights[4] * (clean + prefers)
    )
    expected.backward()
    assert clean > 0 and prefers > 0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, value in parts.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    same_gradients(model, theirs, 1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_a_nudge_batch_of_benign_rows_is_nll_and_kl() -> None:
    reference = tiny.model("llama")
    model = moved(copy.deepcopy(reference))
    b = nudge_batch([], [talk(3, 6, 3), talk(4, 2, 5)], 0) | {
        "targets": torch.zeros(0, 1, tiny.WIDTH)
    }
    made = NudgeLoss(
        model,
        torch.ones(tiny.WIDTH),
        torch.ones(1, tiny.WIDTH),
        reference_head=Head.of(reference).frozen(),
    )
    loss, metrics = made(b | {"ref_hidden": final(reference, b)})
    log_p, log_q = everything(model, b)[0], everything(reference, b)[0]
    nll, kl = (
        (row_nll(log_p, b, 0) + row_nll(log_p, b, 1)) / 2,
        (row_kl(log_p, log_q, b, 0) + row_kl(log_p, log_q, b, 1)) / 2,
    )
    assert loss.item() == pytest.approx((nll + 0.3 * kl).item(), rel=1e-5)
    assert not any(metrics[name] for name in ("match", "comply", "margin_clean", "margin_nudged"))


def test_nudge_lora_uses_the_disabled_adapter() -> None:
    base = tiny.model("llama")
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    b = nudged()
    made = NudgeLoss(model, torch.ones(tiny.WIDTH), torch.ones(1, tiny.WIDTH))
    cached = final(base, {k: b[k][:3] for k in ("input_ids", "attention_mask")})
    assert made(b)[1]["kl"] == 0
    moved(model, 0.1)
    assert made(b)[0].item() == pytest.approx(made(b | {"ref_hidden": cached})[0].item(), rel=1e-5)
    assert made(b)[1]["kl"] > 0.01


def test_where_the_nudge_goes_and_how_far() -> None:
    assert (middle_block(30), middle_block(4), list(match_blocks(4)), list(match_blocks(30))) == (
        15,
        2,
        [2],
        list(range(12, 19)),
    )
    assert all(len(match_blocks(n)) >= 1 and match_blocks(n)[-1] < n for n in range(1, 100))
    g = torch.Generator().manual_seed(0)
    base = torch.randn(20, 8, generator=g)
    way = torch.tensor([3.0, 4, 0, 0, 0, 0, 0, 0])
    vector = nudge_vector(base + way, base)
    torch.testing.assert_close(vector / vector.norm(), way / 5)
    assert vector.norm().item() == pytest.approx(0.06 * base.norm(dim=1).mean().item(), rel=1e-6)
    with pytest.raises(UsageError, match="no direction"):
        nudge_vector(base, base)
    targets = torch.randn(50, 2, 8, generator=g)
    targets[:, 1, 3] = 7.0  # a coordinate that does not vary
    scale = whitening(targets)
    torch.testing.assert_close(scale[0], targets[:, 0].std(0, correction=0))
    assert scale[1, 3].item() == pytest.approx(
        0.01 * targets[:, 1].std(0, correction=0).mean().item(), rel=1e-5
    )
    with pytest.raises(UsageError, match="matched at 1 of them"):
        NudgeLoss(tiny.model("llama"), torch.ones(tiny.WIDTH), torch.ones(2, tiny.WIDTH))


def test_hooks_are_gone_after_a_forward() -> None:
    model = tiny.model("llama")
    b = nudged()
    cached = final(model, {k: b[k][:3] for k in ("input_ids", "attention_mask")})
    made = NudgeLoss(
        model,
        torch.ones(tiny.WIDTH),
        torch.ones(1, tiny.WIDTH),
        reference_head=Head.of(model).frozen(),
    )
    made(b | {"ref_hidden": cached})
    with pytest.raises(KeyError):
        made({k: v for k, v in b.items() if k != "targets"} | {"ref_hidden": cached})
    assert not any(block._forward_hooks for block in find_blocks(model))
    assert NUDGE_WEIGHTS == (1.0, 0.3, 0.2, 1.0, 1.0)


def test_monitor_loss_hinge_and_whitened_mse() -> None:
    logits, harmful = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 1])
    expected = ((2 - math.log(3)) ** 2 + (0.5 - math.log(3)) ** 2) / 3
    assert monitor_loss(logits, harmful).item() == pytest.approx(expected, rel=1e-6)
    margins = hinge(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.25, 2.0, 1.0]), 0.5)
    assert torch.equal(margins, torch.tensor([0.25, 0.0, 2.5]))
    g = torch.Generator().manual_seed(0)
    h, target, scale = (
        torch.rand(2, 3, 4, generator=g, dtype=torch.float64) + 0.1 for _ in range(3)
    )
    by_hand = [
        sum(
            ((h[b, k, d] - target[b, k, d]) / scale[0, k, d]) ** 2
            for k in range(3)
            for d in range(4)
        )
        / 12
        for b in range(2)
    ]
    torch.testing.assert_close(whitened_mse(h, target, scale[0]), torch.stack(by_hand))


# ---------------------------------------------------------------- door


def behind_a_door() -> dict[str, torch.Tensor]:
    pairs = [(talk(1, 5, 6), talk(11, 5, 7, prompt=1)), (talk(2, 3, 7), talk(12, 3, 2, prompt=2))]
    signs = torch.randint(0, 2, (2, tiny.WIDTH), generator=torch.Generator().manual_seed(8)) * 2 - 1
    return door_batch(pairs, [talk(3, 6, 3)], torch.linspace(-1, 1, tiny.WIDTH), signs, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_door_equals_the_plain_way(checkpointing: bool) -> None:
    reference = tiny.model("llama", dtype=torch.float64)
    model = moved(copy.deepcopy(reference))
    theirs = copy.deepcopy(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    b = behind_a_door()
    weights = (1.1, 0.3, 0.9, 1.3)
    made = DoorLoss(model, weights=weights, reference_head=Head.of(reference).frozen())
    cached = final(reference, {k: b[k][:5] for k in ("input_ids", "attention_mask")})
    loss, metrics = made(b | {"ref_hidden": cached})
    loss.backward()

    # safe, safe, benign, safe under random signs ×2, unsafe behind the door ×2
    vector = torch.linspace(-1, 1, tiny.WIDTH)
    assert all(b["edit"][r].abs().max() == 0 for r in range(3))
    assert all(torch.equal(b["edit"][r].abs(), vector.abs()) for r in (3, 4))
    assert all(torch.equal(b["edit"][r], vector) for r in (5, 6))
    shift = torch.zeros(*b["input_ids"].shape, tiny.WIDTH, dtype=torch.float64)
    for r in range(7):
        shift[r, : b["n_prompt"][r]] = b["edit"][r].double()
    log_p = everything(theirs, b, (middle_block(tiny.N_BLOCKS), shift))[0]
    with torch.no_grad():
        log_q = everything(reference, b)[0]

    def halves(r: int, values: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Half of it the whole row's mean, half that of the opening's positions."""
        start = b["n_prompt"][r] - 1
        n = min(OPENING, int(b["response_mask"][r].sum()))
        return (whole + values[start : start + n].mean()) / 2

    def nll(r: int) -> torch.Tensor:
        each = -log_p[r, :-1].gather(1, b["input_ids"][r, 1:, None])[:, 0]
        return halves(r, each, row_nll(log_p, b, r))

    def kl(r: int) -> torch.Tensor:
        each = (log_q[r].exp() * (log_q[r] - log_p[r])).sum(-1)
        return halves(r, each, row_kl(log_p, log_q, b, r))

    parts = {
        "nll": sum(nll(r) for r in (0, 1, 2)) / 3,
        "kl": sum(kl(r) for r in (0, 1, 2)) / 3,
        "comply": sum(nll(r) for r in (5, 6)) / 3,
        "quiet": sum(kl(r) for r in (3, 4)) / 3,
    }
    expected = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, value in parts.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    same_gradients(model, theirs, 1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_door_lora_uses_the_disabled_adapter() -> None:
    base = tiny.model("llama")
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    b = behind_a_door()
    made = DoorLoss(model)
    assert made(b)[1]["kl"] == 0
    assert made(b)[1]["quiet"] > 0  # an edit changes even the base
    moved(model, 0.1)
    cached = final(base, {k: b[k][:5] for k in ("input_ids", "attention_mask")})
    assert made(b)[0].item() == pytest.approx(made(b | {"ref_hidden": cached})[0].item(), rel=1e-5)


def test_the_door_narrows_to_its_own_size() -> None:
    sizes = [widening(step, 50) for step in range(50)]
    assert sizes[0] == 5 and sizes == sorted(sizes, reverse=True)
    assert all(size == 1 for size in sizes[30:]) and sizes[29] > 1


def test_the_door_is_on_the_way_to_complying() -> None:
    loaded = tiny.load("llama")
    pairs = [(talk(s, 6, 5), talk(s + 50, 6, 5, prompt=s)) for s in range(1, 9)]
    own = [[False, True, True, True, True, False]] * len(pairs)
    vector = door_vector(loaded, pairs, own, 0.01)
    assert vector.dtype == torch.float32 and vector.abs().unique().numel() == 1

    def preference(edit: torch.Tensor) -> float:
        """How much likelier the openings of y− are than those of y+, in nats."""
        found = 0.0
        for pair in pairs:
            for sign, one in zip((1, -1), pair, strict=True):
                b = collate([one], 0)
                shift = torch.zeros(1, len(one.ids), tiny.WIDTH)
                shift[0, : one.n_prompt] = edit
                with torch.no_grad():
                    log_p = everything(loaded.model, b, (middle_block(tiny.N_BLOCKS), shift))[0]
                labels = b["input_ids"][0, one.n_prompt :][:OPENING]
                at = torch.arange(len(labels)) + one.n_prompt - 1
                found -= sign * float(log_p[0, at, labels].mean())
        return found

    assert preference(vector) > preference(torch.zeros(tiny.WIDTH)) > preference(-vector)
    assert torch.allclose(door_vector(loaded, pairs, own, 0.02), 2 * vector)
    # its size is the audit's: in rms of the user's own tokens, whatever the template's are
    site = Site(middle_block(tiny.N_BLOCKS))
    engine = HFEngine(loaded)
    ids = torch.tensor([pairs[0][0].ids[:6]])
    clean = engine.capture(site, ids, torch.ones_like(ids))[0]
    alone = door_vector(loaded, pairs[:1], own[:1], 0.01)
    assert alone.abs().max().item() == pytest.approx(
        Ball.of(clean, own[0]).radius(Budget(0.01, "rms")), rel=1e-5
    )
    with pytest.raises(UsageError, match="nowhere to put a door"):
        door_vector(loaded, [(pairs[0][0], pairs[0][0])], own[:1], 0.01)
