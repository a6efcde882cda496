"""A discrete suffix makes its target likelier than a random one as long does, is searched on its
own half, and leaves no trace."""

from __future__ import annotations

import pytest
import test_interventions as table
import tiny
import torch

from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.interventions import CONTROL, EDIT, Settings, Trial, load_intervention
from auditgap.types import Prompt, Site, Suffix

pytest.importorskip("nanogcg", reason="the package nanogcg is not installed")
SETTINGS = Settings(
    draws=3,
    target="the vault is red",
    suffix_tokens=5,
    suffix_steps=8,
    suffix_width=24,
    suffix_prompts=2,
)


@pytest.fixture(scope="module")
def found():
    engine = HFEngine(tiny.load("llama"))
    bench = table.bench_at(Site(-1), engine)
    made = load_intervention("suffix", SETTINGS)
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:  # a model's own template runs in a child alone
        patch.setattr(
            type(engine.loaded.tokenizer),
            "apply_chat_template",
            lambda *_, **__: pytest.fail("filled in this process"),
        )
        learned = made.learn(bench)
    assert (
        torch.equal(torch.get_rng_state(), before[0])
        and torch.are_deterministic_algorithms_enabled() == before[1]
    )
    return bench, made, learned


def nll(bench, made, edit: Suffix) -> float:
    return made._mean_nll(bench.engine, bench.fit, edit.text)


def test_it_makes_the_target_likelier_than_random_tokens_do(found):
    bench, made, learned = found
    mine = made.edit(bench, learned, 0, Trial(EDIT, 1.0))
    assert nll(bench, made, mine) == pytest.approx(float(learned["suffix_nll"]), rel=1e-5)
    others = [
        nll(bench, made, made.edit(bench, learned, 0, Trial(CONTROL, 1.0, draw=d)))
        for d in range(8)
    ]
    assert float(learned["suffix_nll"]) < min(others)
    assert int(learned["searched"]) == 2 and len(learned["suffix"]) == 5


def test_it_is_the_same_for_every_prompt_and_its_control_is_not(found):
    bench, made, learned = found
    assert len({made.edit(bench, learned, p, Trial(EDIT, 1.0)).text for p in range(3)}) == 1
    control = [made.edit(bench, learned, p, Trial(CONTROL, 1.0)).text for p in range(3)]
    assert len(set(control)) == 3 and control == [
        made.edit(bench, learned, p, Trial(CONTROL, 1.0)).text for p in range(3)
    ]
    assert all(t.isascii() and t.isprintable() for t in control)
    assert made.trials() == [Trial(EDIT, 1.0), *(Trial(CONTROL, 1.0, draw=d) for d in range(3))]


def test_the_search_comes_out_the_same(found):
    bench, made, learned = found
    again = made.learn(bench)
    assert torch.equal(again["suffix"], learned["suffix"]) and torch.equal(
        again["suffix_nll"], learned["suffix_nll"]
    )


def test_it_stands_behind_the_prompt(found):
    bench, made, learned = found
    suffix = made.edit(bench, learned, 0, Trial(EDIT, 1.0))
    put = suffix.behind(Prompt("what is red", "demo", "yes"))
    assert (put.text, put.source, put.target) == (f"what is red {suffix.text}", "demo", "yes")
    (said,) = bench.engine.generate([Request(bench.engine.render(put))], 3)
    assert len(said.ids) <= 3


def test_a_prompt_that_spells_the_searchs_own_mark_is_left_out(found):
    bench, made, _ = found
    assert (
        made._search(bench.engine, bench.engine.render(Prompt("the {optim_str} of the vault")))
        == []
    )
