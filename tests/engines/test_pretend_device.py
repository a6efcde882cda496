"""On a pretended CUDA device nothing mixes devices, and the host waits for the device a bounded number
of times a step, whatever the number of rows."""

from __future__ import annotations

import pytest
import tiny
import torch
from pretend import Seen, on_device, pretend

from auditgap.engines import Message, Question, Request, Sampling, constant
from auditgap.engines.fitting import Fitting
from auditgap.engines.hf import HFEngine
from auditgap.interventions import universal
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.training import objective
from auditgap.types import ConstantEdit, Edit, Prompt, Site

SITE = Site(0)
#: Of transformers' masks, a forward: whether there is padding at all.
MASK = 2


def engine_of(seen: Seen, family: str, dtype: torch.dtype = torch.float32) -> HFEngine:
    engine = HFEngine(on_device(tiny.load(family, dtype=dtype)), fitting=Fitting())
    assert engine.device.type == "cuda"
    engine.self_test(SITE)
    assert not seen.problems, seen.problems
    seen.syncs.clear()
    return engine


def rendered(engine: HFEngine, n: int):
    # of two lengths, so that there is padding
    return [engine.render(Prompt("Which colour is it?" + " red" * (i % 2))) for i in range(n)]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_engine_and_interventions_stay_on_the_device(family):
    seen = Seen()
    with pretend(seen):
        engine = engine_of(seen, family, torch.bfloat16 if family == "llama" else torch.float32)
        prompts = rendered(engine, 4)
        engine.activations(prompts, SITE)
        pgd = PGD(steps=2, restarts=2, iterate="best")
        found = attack(engine, [Goal(r, (5, 6), (0.1,)) for r in prompts], SITE, pgd)
        edits = [Edit(SITE, row[0].delta) for row in found]
        said = engine.generate(
            [Request(*pair, (5, 6)) for pair in zip(prompts, edits, strict=True)], 4
        )
        engine.nll(prompts, [c.ids for c in said], edits)
        universal.search(engine, prompts, (5, 6), SITE, [0.5], 1)
        shift = torch.randn(engine.loaded.width)
        constant.generate(engine, prompts, [ConstantEdit((SITE,), shift=shift)] * 4, 3)
        asked = [Question((Message("user", text),)) for text in ("a", "b c d")]
        engine.ask(asked, Sampling(max_new_tokens=3, temperature=0.7, top_logprobs=2))
    assert not seen.problems, seen.problems


def waits(run, steps: int) -> float:
    """How often a further step makes the host wait: of `run(seen, n)` with n steps and with 2."""
    counted = []
    for n in (2, 2 + steps):
        seen = Seen()
        with pretend(seen):
            run(seen, n)
        counted.append(seen.syncs.total())
    return (counted[1] - counted[0]) / steps


@pytest.mark.parametrize("rows", [2, 6])
def test_a_step_of_the_attack_waits_for_masks_alone(rows):
    def run(seen: Seen, n: int) -> None:
        engine = engine_of(seen, "llama")
        goals = [Goal(r, (5, 6), (0.1,)) for r in rendered(engine, rows)]
        attack(engine, goals, SITE, PGD(steps=n), score=False)

    assert waits(run, 3) <= MASK


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("tops", [0, 3])
def test_a_token_is_told_to_the_host_once(rows, tops):
    def run(seen: Seen, n: int) -> None:
        engine = engine_of(seen, "llama")
        asked = [Question((Message("user", "red " * (1 + i % 2) + f"w{i}"),)) for i in range(rows)]
        engine.ask(asked, Sampling(max_new_tokens=n, top_logprobs=tops))

    assert waits(run, 3) <= 1 + MASK


def test_losses_stay_on_the_device():
    seen = Seen()
    with pretend(seen):
        hidden = torch.randn(6, 16, device="cuda").requires_grad_(True)
        base = torch.randn(6, 16, device="cuda")
        head = objective.Head(torch.randn(50, 16, device="cuda"))
        labels = torch.randint(0, 50, (6,), device="cuda")
        ones = torch.ones(6, device="cuda")
        loss, nll, kl = objective.token_losses(
            hidden,
            head,
            labels=labels,
            nll_weight=ones,
            reference=(base, head),
            kl_weight=ones,
        )
        assert {loss.device.type, nll.device.type, kl.device.type} == {"cuda"}
    assert not seen.problems, seen.problems


def test_what_mixes_devices_is_seen():
    seen = Seen()
    with pretend(seen):
        on = torch.ones(3, device="cuda")
        on + torch.ones(3)
        on[on > 0]
        on.tolist()
    assert seen.problems.total() == 1 and seen.syncs.total() == 2
