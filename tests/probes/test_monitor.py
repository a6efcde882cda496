"""The monitor and its fit: the paper's shape, a planted direction, standardisation, splits,
files."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from auditgap import stats
from auditgap.errors import UsageError
from auditgap.probes.baselines import baselines
from auditgap.probes.fit import finite_rows, fit, logits_of, split_groups
from auditgap.probes.monitor import Monitor, seeded, standardiser
from tests.one_thread import one_thread  # noqa: F401

L, D = 3, 8


def planted(n_prompts: int = 80, strength: float = 1.5, seed: int = 0, block: int = 1):
    """Features [2n, L, D] whose block 1 carries the label in one direction, two answers a prompt,
    and a prompt's own part."""
    made = torch.Generator().manual_seed(seed)
    own = torch.randn(n_prompts, 1, L, D, generator=made)
    h = (own + torch.randn(n_prompts, 2, L, D, generator=made)).reshape(2 * n_prompts, L, D)
    labels = np.tile([0, 1], n_prompts)
    h[:, block, 2] += strength * torch.from_numpy(labels).float()
    return h, labels, [f"p{i // 2}" for i in range(2 * n_prompts)]


def test_the_monitor_is_two_linear_layers_and_512_wide():
    monitor = Monitor(L, D)
    assert {name: tuple(p.shape) for name, p in monitor.named_parameters()} == {
        "inner.weight": (512, L * D),
        "outer.weight": (1, 512),
        "outer.bias": (1,),
    }
    h = torch.randn(5, L, D)
    plain = monitor.outer(monitor.inner(h.flatten(1))).squeeze(1)
    assert torch.equal(monitor(h), plain) and monitor(h).shape == (5,)
    assert monitor(h.bfloat16()).dtype == torch.float32


def test_frozen_logits_are_the_same_numbers_and_leave_the_monitor_alone():
    monitor = Monitor(L, D, mean=torch.randn(L, D), scale=torch.rand(L) + 0.5)
    h = torch.randn(4, L, D, requires_grad=True)
    frozen = monitor.frozen_logits(h)
    assert torch.equal(frozen, monitor(h))
    frozen.sum().backward()
    gradient = h.grad.clone()
    assert all(p.grad is None for p in monitor.parameters()) and gradient.abs().sum() > 0
    h.grad = None
    monitor(h).sum().backward()
    assert torch.equal(h.grad, gradient) and all(p.grad is not None for p in monitor.parameters())


def test_another_models_activations_are_refused():
    with pytest.raises(UsageError, match="another depth or width"):
        Monitor(L, D)(torch.randn(2, L + 1, D))
    with pytest.raises(UsageError, match="together"):
        Monitor(L, D, mean=torch.zeros(L, D))
    with pytest.raises(UsageError, match=r"\[3, 8\]"):
        Monitor(L, D, mean=torch.zeros(L, D + 1), scale=torch.ones(L))


def test_a_saved_monitor_comes_back_bit_for_bit(tmp_path):
    monitor = seeded(3, L, D, mean=torch.randn(L, D), scale=torch.rand(L) + 0.5)
    monitor.about = {"fingerprint": "9c1e"}
    again = Monitor.load(monitor.save(tmp_path / "deep" / "monitor.safetensors"))
    h = torch.randn(4, L, D)
    assert (
        torch.equal(again(h), monitor(h))
        and again.standardised
        and again.about == {"fingerprint": "9c1e"}
    )
    assert not Monitor.load(Monitor(L, D).save(tmp_path / "raw.safetensors")).standardised


def test_a_torn_monitor_is_a_sentence(tmp_path):
    path = Monitor(L, D).save(tmp_path / "monitor.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="torn"):
        Monitor.load(path)
    path = Monitor(L, D).save(tmp_path / "monitor.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="torn"):
        Monitor.load(path)
    with pytest.raises(UsageError, match="no such monitor"):
        Monitor.load(tmp_path / "absent.safetensors")


def test_a_seed_decides_the_first_weights_and_nothing_else():
    state = torch.get_rng_state()
    one, two, other = seeded(1, L, D), seeded(1, L, D), seeded(2, L, D)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.inner.weight, two.inner.weight) and not torch.equal(
        one.inner.weight, other.inner.weight
    )


# --------------------------------------------------------------------------------------------------------------
# fit


def test_a_planted_direction_is_found_and_noise_is_not():
    h, labels, groups = planted(strength=4.0)
    fitted = fit(h, labels, groups, epochs=30)
    held = fitted.heldout_index
    assert (
        stats.auroc(fitted.heldout_logits, labels[held], [groups[i] for i in held]).estimate > 0.95
    )
    nothing = fit(*planted(strength=0.0), epochs=5)
    assert max(e.auroc for e in nothing.history) < 0.8


def test_the_best_epoch_is_kept_and_its_logits_are_the_monitors():
    h, labels, groups = planted(strength=1.0)
    fitted = fit(h, labels, groups, epochs=12)
    aurocs = [e.auroc for e in fitted.history]
    best = max(fitted.history, key=lambda e: e.auroc)
    assert fitted.best_epoch == best.epoch and best.auroc == max(aurocs) and len(aurocs) == 12
    logits, y = (
        torch.from_numpy(fitted.heldout_logits),
        torch.from_numpy(labels[fitted.heldout_index]).double(),
    )
    assert best.heldout_loss == pytest.approx(
        functional.binary_cross_entropy_with_logits(logits, y).item()
    )
    assert np.array_equal(logits_of(fitted.monitor, h, fitted.heldout_index), fitted.heldout_logits)
    assert stats.auroc(fitted.heldout_logits, labels[fitted.heldout_index]).estimate == max(aurocs)
    # the same path, ended where it was best
    shorter = fit(h, labels, groups, epochs=fitted.best_epoch)
    assert torch.equal(shorter.monitor.inner.weight, fitted.monitor.inner.weight)


def test_among_epochs_that_rank_perfectly_the_first_is_kept():
    h, labels, groups = planted(strength=30.0)
    fitted = fit(h, labels, groups, epochs=8)
    perfect = [e.epoch for e in fitted.history if e.auroc == 1.0]
    assert len(perfect) > 1 and fitted.best_epoch == perfect[0]


def test_rescaling_is_of_every_logit_and_of_nothing_else():
    monitor, h = seeded(0, L, D), torch.randn(6, L, D)
    before = monitor(h).detach()
    monitor.rescale(0.25, -1.5)
    assert torch.allclose(monitor(h), 0.25 * before - 1.5, atol=1e-6)


def test_the_first_steps_are_adamw_on_binary_cross_entropy():
    """One epoch of the fit against the plain loop, written out."""
    h, labels, groups = planted(20)
    fitted = fit(h, labels, groups, epochs=1, standardise=False, seed=5)
    plain = seeded(5, L, D)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-4, weight_decay=1e-4)
    order = torch.randperm(
        len(fitted.train_index), generator=torch.Generator().manual_seed(5)
    ).numpy()
    for start in range(0, len(order), 32):
        rows = fitted.train_index[order[start : start + 32]]
        loss = functional.binary_cross_entropy_with_logits(
            plain(h[rows]), torch.tensor(labels[rows]).float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(plain.inner.weight, fitted.monitor.inner.weight)


def test_the_same_call_gives_the_same_bits():
    h, labels, groups = planted(30)
    one, two = (fit(h, labels, groups, epochs=3) for _ in range(2))
    assert (
        torch.equal(one.monitor.inner.weight, two.monitor.inner.weight)
        and one.history == two.history
    )


def test_no_prompt_is_on_both_sides_and_rows_outside_are_not_looked_at():
    h, labels, groups = planted(50)
    rows = np.arange(60)
    h[60:] = float("nan")
    fitted = fit(h, labels, groups, epochs=2, rows=rows)
    sides = [{groups[i] for i in index} for index in (fitted.train_index, fitted.heldout_index)]
    assert not sides[0] & sides[1] and len(sides[1]) == 6 and len(sides[0]) == 24
    assert sorted([*fitted.train_index, *fitted.heldout_index]) == list(rows)


def test_the_split_is_by_name_alone():
    groups = [f"p{i % 40}" for i in range(120)]
    inside, outside = split_groups(groups, 0.2, 0)
    shuffled = np.random.default_rng(0).permutation(120)
    again, _ = split_groups([groups[i] for i in shuffled], 0.2, 0)
    assert {groups[i] for i in inside} == {groups[shuffled[i]] for i in again}
    assert len(inside) + len(outside) == 120 and len(outside) == 24
    assert {groups[i] for i in split_groups(groups, 0.2, 1)[1]} != {groups[i] for i in outside}
    with pytest.raises(UsageError, match="at least 2"):
        split_groups(["a", "a"], 0.2, 0)


def test_standardisation_makes_a_blocks_scale_irrelevant():
    """One block a thousand times larger: the standardised fit does not notice, the paper's does."""
    h, labels, groups = planted(60, strength=4.0)
    louder = h.clone()
    louder[:, 0] *= 1000.0
    one, two = (fit(x, labels, groups, epochs=10) for x in (h, louder))
    assert np.allclose(one.heldout_logits, two.heldout_logits, atol=1e-3)
    three, four = (fit(x, labels, groups, epochs=10, standardise=False) for x in (h, louder))
    assert not np.allclose(three.heldout_logits, four.heldout_logits, atol=0.5)


def test_the_standardiser_is_the_training_splits_mean_and_rms():
    h, labels, groups = planted(40)
    fitted = fit(h, labels, groups, epochs=1)
    own = h[fitted.train_index].double()
    assert torch.allclose(fitted.monitor.mean, own.mean(0).float(), atol=1e-6)
    rms = (own - own.mean(0)).pow(2).mean((0, 2)).sqrt().float()
    assert torch.allclose(fitted.monitor.scale, rms, rtol=1e-6)
    constant = torch.ones(6, L, D)
    assert torch.equal(standardiser(constant, np.arange(6))[1], torch.ones(L))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, y, g: (h[0], y, g), "one label and one group"),
        (lambda h, y, g: (h, y[1:], g), "one label and one group"),
        (lambda h, y, g: (h, y + 1, g), "0 .safe. or 1"),
        (lambda h, y, g: (h, 0 * y, g), "one class only"),
        (lambda h, y, g: (h * float("nan"), y, g), "not finite"),
        (lambda h, y, g: (h, y, ["p"] * len(g)), "at least 2"),
    ],
)
def test_what_cannot_be_fitted_is_a_sentence(change, said):
    with pytest.raises(UsageError, match=said):
        fit(*change(*planted(10)), epochs=1)


def test_finite_rows():
    h = torch.zeros(5, L, D)
    h[1, 2, 3], h[3, 0, 0] = float("nan"), float("inf")
    assert finite_rows(h, chunk=2).tolist() == [0, 2, 4]


# --------------------------------------------------------------------------------------------------------
# baselines


def aurocs_of(h, labels, groups, texts, lengths):
    fitted = fit(h, labels, groups, epochs=15)
    others = baselines(h, texts, lengths, labels, groups, fitted, epochs=15)
    held = fitted.heldout_index
    return {
        name: stats.auroc(getattr(others, name)[held], labels[held], [groups[i] for i in held])
        for name in ("text", "length", "shuffled")
    }


def test_the_baselines_lose_where_only_the_activations_tell():
    h, labels, groups = planted(150, strength=5.0)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "blue", "green", "vault", "door"], 8)) for _ in labels]
    found = aurocs_of(h, labels, groups, texts, rng.integers(5, 50, len(labels)).tolist())
    assert all(0.2 < i.estimate < 0.8 for i in found.values())


def test_words_and_lengths_that_tell_are_found_out():
    h, labels, groups = planted(100, strength=0.0)
    texts = ["the colour is red" if y else "i can not tell" for y in labels]
    found = aurocs_of(h, labels, groups, texts, [40 if y else 4 for y in labels])
    assert (
        found["text"].estimate == 1.0
        and found["length"].estimate == 1.0
        and found["shuffled"].estimate < 0.8
    )


def test_answers_without_words_are_no_scores():
    h, labels, groups = planted(10)
    fitted = fit(h, labels, groups, epochs=1)
    others = baselines(h, ["…"] * 20, [3] * 20, labels, groups, fitted, epochs=1)
    assert np.isnan(others.text).all() and np.ptp(others.length) < 1e-9
