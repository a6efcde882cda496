"""Every intervention of the table: its control is as large as the edit, does not aim, and both are
the same every time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys

import pytest
import tiny
import torch

from auditgap.audits.intervene.rows import size_of
from auditgap.engines import constant
from auditgap.engines.hf import HFEngine
from auditgap.errors import UsageError
from auditgap.interventions import (
    CONTROL,
    EDIT,
    INTERVENTIONS,
    Bench,
    Settings,
    Trial,
    load_intervention,
)
from auditgap.interventions.directions import mean_difference, orthogonal, turned, unit
from auditgap.interventions.patching import tail
from auditgap.interventions.universal import search
from auditgap.types import ConstantEdit, Edit, Prompt, Site

VAULT = [
    "what is the colour of the vault ?",
    "say the colour of the vault",
    "is the vault red or blue ?",
    "who can open the vault ?",
    "tell now what colour the vault is",
    "open the vault",
]
KITCHEN = [
    "how can I bake bread ?",
    "why is the sea salt ?",
    "who can bake flour",
    "is the oven hot now ?",
]
SETTINGS = Settings(
    strengths=(-0.2, 0.1, 0.4), angles=(0.0, 40.0, 90.0), draws=2, steps=3, target="Sure here is"
)


def bench_at(site: Site, engine: HFEngine | None = None) -> Bench:
    engine = engine or HFEngine(tiny.load("llama"))
    vault, kitchen = ([engine.render(Prompt(t)) for t in some] for some in (VAULT, KITCHEN))
    vault_h, kitchen_h = (engine.activations(some, site) for some in (vault, kitchen))
    donors = [kitchen[2 + i % 2] for i in range(3)]
    return Bench(
        engine,
        site,
        constant.sites_of(engine),
        vault[:3],
        vault_h[:3],
        kitchen_h[:2],
        vault[3:],
        vault_h[3:],
        donors,
        [kitchen_h[2 + i % 2] for i in range(3)],
        [1.1 * h + 0.1 for h in vault_h[3:]],
    )


@pytest.fixture(scope="module", params=[1, 3], ids=lambda i: f"site{i}")
def bench(request):
    return bench_at(Site(request.param))


@pytest.mark.parametrize(
    "name", [name for name, entry in INTERVENTIONS.items() if not entry.input_only]
)
class TestEach:
    def test_its_control_is_as_large(self, name, bench):
        made = load_intervention(name, SETTINGS)
        learned = made.learn(bench)
        trials = list(made.trials())
        assert len(set(trials)) == len(trials) and {t.arm for t in trials} == {EDIT, CONTROL}
        for p, (one, h) in enumerate(zip(bench.asked, bench.asked_h, strict=True)):
            sizes: dict[float, set[float]] = {}
            for trial in trials:
                size = size_of(made.edit(bench, learned, p, trial), h, one.content)
                assert not size.problem and size.l2 > 0
                sizes.setdefault(trial.strength, set()).add(round(size.l2, 4))
            for strength, found in sizes.items():
                low, high = min(found), max(found)
                assert high == pytest.approx(low, rel=1e-3), (
                    f"{name} at {strength}: edit and control differ in size"
                )

    def test_it_is_the_same_every_time_and_each_draw_another(self, name, bench):
        made, again = (load_intervention(name, SETTINGS) for _ in range(2))
        learned = made.learn(bench)
        for key, tensor in again.learn(bench).items():
            assert torch.equal(tensor, learned[key]) and tensor.dtype == torch.float32
        controls = [t for t in made.trials() if t.arm == CONTROL]
        seen = {}
        for trial in reversed(controls):  # in another order
            for p in (2, 0):
                numbers = vector_of(again.edit(bench, learned, p, trial))
                assert torch.equal(numbers, vector_of(made.edit(bench, learned, p, trial)))
                seen[p, trial] = tuple(numbers.flatten()[-tiny.WIDTH :].tolist())
        assert len(set(seen.values())) == len(seen), (
            "draws and prompts have directions of their own"
        )

    def test_it_describes_what_changes_its_numbers(self, name):
        told = load_intervention(name, SETTINGS).describe()
        assert (
            told["intervention"] == name
            and told != load_intervention(name, Settings(draws=3, seed=1)).describe()
        )


def test_at_the_embedding_the_last_token_is_everybody_s():
    """It is the template's, so no direction is there, and nothing is made up; a universal edit
    there is as anywhere."""
    bench = bench_at(Site(-1))
    for name in ("steering", "ablation", "angle", "patching"):
        made = load_intervention(name, SETTINGS)
        learned = made.learn(bench)
        for trial in made.trials():
            size = size_of(
                made.edit(bench, learned, 0, trial), bench.asked_h[0], bench.asked[0].content
            )
            assert size.problem == "zero_edit"
    TestEach().test_its_control_is_as_large("universal", bench)


def vector_of(edit: Edit | ConstantEdit) -> torch.Tensor:
    return (
        edit.delta if isinstance(edit, Edit) else edit.write if edit.shift is None else edit.shift
    )


class TestDirections:
    def test_the_mean_difference_is_of_last_tokens(self):
        first = [torch.tensor([[9.0, 9.0], [1.0, 0.0]]), torch.tensor([[3.0, 1.0]])]
        second = [torch.tensor([[5.0, 5.0], [0.0, 2.0]])]
        assert torch.equal(mean_difference(first, second), torch.tensor([2.0, -1.5]))
        broken = torch.tensor([[math.nan, 0.0]])
        assert torch.equal(mean_difference([*first, broken], second), torch.tensor([2.0, -1.5]))
        assert not mean_difference([broken], second).any(), "no number, no direction"

    def test_a_turned_direction_keeps_its_norm(self):
        rng = torch.Generator().manual_seed(0)
        r = unit(torch.randn(32, generator=rng))
        u = orthogonal(r, rng)
        assert abs(float(u @ r)) < 1e-6 and float(u.norm()) == pytest.approx(1)
        for degrees in (0, 30, 90, 135):
            t = turned(r, u, degrees)
            assert float(t.norm()) == pytest.approx(1) and float(t @ r) == pytest.approx(
                math.cos(math.radians(degrees)), abs=1e-6
            )
        assert not unit(torch.zeros(4)).any()

    def test_two_equal_sets_have_none_and_nothing_is_told(self):
        bench = bench_at(Site(1))
        same = Bench(**{**vars(bench), "contrast_h": bench.fit_h})
        made = load_intervention("steering", SETTINGS)
        learned = made.learn(same)
        for trial in made.trials():
            assert (
                size_of(
                    made.edit(same, learned, 0, trial), same.asked_h[0], same.asked[0].content
                ).problem
                == "zero_edit"
            )


def test_steering_takes_the_direction_off_by_a_share_of_the_norm():
    bench = bench_at(Site(2))
    made = load_intervention("steering", SETTINGS)
    learned = made.learn(bench)
    r = learned["direction"]
    assert torch.equal(r, unit(mean_difference(bench.fit_h, bench.contrast_h)))
    own = torch.cat(
        [h[torch.tensor(one.content)] for h, one in zip(bench.fit_h, bench.fit, strict=True)]
    )
    assert float(learned["norm"]) == pytest.approx(own.norm(dim=1).mean().item(), rel=1e-5)
    edit = made.edit(bench, learned, 0, Trial(EDIT, 0.4))
    assert edit.sites == (Site(2),) and float(edit.shift @ r) == pytest.approx(
        -0.4 * float(learned["norm"]), rel=1e-4
    )
    back = made.edit(bench, learned, 0, Trial(EDIT, -0.2))
    assert float(back.shift @ r) == pytest.approx(0.2 * float(learned["norm"]), rel=1e-4)
    control = made.edit(bench, learned, 0, Trial(CONTROL, 0.4))
    assert abs(float(control.shift @ r)) < 1e-5 * float(control.shift.norm())


def test_ablation_is_at_every_site_of_prompt_and_answer():
    bench = bench_at(Site(2))
    made = load_intervention("ablation", SETTINGS)
    learned = made.learn(bench)
    assert bench.sites == tuple(Site(i) for i in range(-1, tiny.N_BLOCKS))
    for trial in made.trials():
        edit = made.edit(bench, learned, 0, trial)
        assert edit.sites == bench.sites and torch.equal(edit.read, learned["direction"])
        assert torch.equal(edit.write, learned["direction"]) == (trial.arm == EDIT)


def test_patching_exchanges_the_template_s_end_alone():
    bench = bench_at(Site(1))
    made = load_intervention("patching", SETTINGS)
    learned = made.learn(bench)
    for p, one in enumerate(bench.asked):
        k = tail(one)
        assert k == 3 and one.ids[-k:] == bench.donors[p].ids[-k:], "\\n assistant :"
        for arm in (EDIT, CONTROL):
            assert not made.edit(bench, learned, p, Trial(arm, 1.0)).delta[:-k].any()
        patched = bench.asked_h[p] + made.edit(bench, learned, p, Trial(EDIT, 1.0)).delta
        assert torch.allclose(patched[-k:], bench.donor_h[p][-k:], atol=1e-6)


def test_the_universal_search_equals_a_plain_one():
    """One prompt at a time, whole forwards, a hook that adds v to the prompt's positions."""
    engine, site, steps = HFEngine(tiny.load("llama")), Site(1), 4
    rendered = [engine.render(Prompt(t)) for t in VAULT[:4]]
    target = engine.encode("Sure here is")
    radius = 0.5
    (found,) = search(engine, rendered, target, site, [radius], steps)
    v = torch.zeros(tiny.WIDTH)
    for _ in range(steps):
        leaf = v.clone().requires_grad_(True)
        losses = []
        for one in rendered:
            n = len(one.ids)
            on = torch.tensor([1.0] * n + [0.0] * len(target))[:, None]
            handle = engine.blocks[1].register_forward_hook(
                lambda _m, _a, h, on=on, v=leaf: h + v * on
            )
            logits = engine.model(torch.tensor([[*one.ids, *target]])).logits[0, n - 1 : -1]
            handle.remove()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target)))
        (g,) = torch.autograd.grad(torch.stack(losses).mean(), leaf)
        v = v - 0.25 * radius * g / g.norm()
        v = v * min(1.0, radius / float(v.norm()))
    assert torch.allclose(found, v, atol=1e-4) and 0 < float(found.norm()) <= radius * (1 + 1e-6)


class TestTheTable:
    def test_an_unknown_name_is_helped(self):
        with pytest.raises(UsageError, match="Did you mean 'steering'"):
            load_intervention("stering", Settings())

    def test_what_wants_a_package_says_which(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nanogcg", None)
        with pytest.raises(UsageError, match="pip install --no-deps nanogcg"):
            load_intervention("suffix", Settings())
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert [i.name for i in INTERVENTIONS.listed() if not i.available] == ["suffix"]

    def test_plug_ins(self, monkeypatch):
        points = {
            "mine": "auditgap.interventions.ablation:Ablation",
            "broken": "no.such.module:thing",
            "odd": "builtins:repr",
            "steering": "builtins:repr",
        }
        made = [
            importlib.metadata.EntryPoint(n, v, "auditgap.interventions") for n, v in points.items()
        ]
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda group: made if group == "auditgap.interventions" else [],
        )
        assert load_intervention("mine", Settings()).name == "ablation"
        with pytest.raises(UsageError, match="plug-in that fails: ModuleNotFoundError"):
            load_intervention("broken", Settings())
        with pytest.raises(UsageError, match="which is no intervention"):
            load_intervention("odd", Settings())
        listed = {(i.name, i.available) for i in INTERVENTIONS.listed()}
        assert {
            ("mine", True),
            ("broken", False),
            ("steering", True),
            ("steering", False),
        } <= listed
