"""The time of an audit on a GPU, reckoned: steps of decoding by what one takes, the rest by FLOPs; and a
subject's sites over all GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from auditgap.audits.latent.audit import LATENT
from auditgap.audits.latent.plan import prepare
from auditgap.audits.latent.timing import completions, estimate, phases
from auditgap.audits.timing import H200, decoding

NEW = 128


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timing")
    tiny.save("llama", folder / "model")
    lines = [f"Which colour is number {i}?" for i in range(200)]
    (folder / "prompts.txt").write_text(chr(10).join(lines))

    def plan(**changes):
        asked = {
            "models": str(folder / "model"),
            "prompts": str(folder / "prompts.txt"),
            "layers": "all",
            "eps": "0.01,0.03,0.1",
            "attacks": "targeted,untargeted,random,random_matched,shuffled",
            "max_new_tokens": NEW,
            "longer": False,
            "dtype": "float32",
            "device": "cpu",
            "judge": "keyword",
            "out": str(folder / "run"),
            **changes,
        }
        return prepare(*LATENT.read(None, asked))

    return plan


def as_8b(plan):
    """The same questions of Llama 3.1 8B: 33 sites, 200 prompts of 65 tokens, one draw."""
    (outline,) = plan.outlines
    head = 128_256 * 4096
    large = replace(
        outline,
        n_blocks=32,
        width=4096,
        n_params=8_030_000_000,
        n_block_params=8_030_000_000 - 2 * head,
        n_head_params=head,
    )
    cells = plan.groups[0].cells
    groups = tuple(
        replace(
            plan.groups[0],
            cells=tuple(replace(c, site=replace(c.site, layer_index=i)) for c in cells),
        )
        for i in range(-1, 32)
    )
    return replace(plan, outlines=(large,), groups=groups)


def test_the_8b_audit_of_all_layers_on_one_h200(planned, monkeypatch):
    monkeypatch.setattr("auditgap.audits.latent.timing.mean_tokens", lambda *_: 65.0)
    plan = as_8b(planned())
    assert sum(completions(plan.config, g.cells, 200) for g in plan.groups) == 99_000
    minutes = {name: s / 60 for name, s in phases(plan, H200).items()}
    # packs of 92 rows took 152,000 steps, an hour; these take about an eighth of them
    assert 6 < minutes["decoding"] < 10, minutes
    assert 10 < minutes["search"] < 25 and 5 < minutes["forward"] < 12, minutes
    assert sum(minutes.values()) < 40, minutes
    eight = planned(engine="vllm", executor="ray", workers=8)
    assert len(eight.passes[1]) == min(8, len(eight.groups))


def test_targeted_beside_its_control_in_less_than_half_an_hour(planned, monkeypatch):
    """What an auditor asks of an 8B model on one card: all sites, three budgets, 200 prompts."""
    monkeypatch.setattr("auditgap.audits.latent.timing.mean_tokens", lambda *_: 65.0)
    plan = as_8b(planned(attacks="targeted,random_matched"))
    minutes = {name: s / 60 for name, s in phases(plan, H200).items()}
    assert 10 < sum(minutes.values()) < 25, minutes
    certified = as_8b(planned(attacks="targeted,random_matched", longer=True))
    longer = phases(certified, H200)["search"] / 60 - minutes["search"]
    assert 10 < longer < 30, "16 times the work, on 30 of the prompts"


def test_edits_that_are_kept_take_a_byte_a_value_where_their_values_are_few(planned):
    few, many, drawn = (
        estimate(as_8b(planned(**asked)), "cpu").disk_bytes
        for asked in ({"steps": 10}, {"steps": 20}, {"steps": 10, "restarts": 2})
    )
    assert many == drawn > few


def test_a_step_takes_as_long_with_few_rows_as_with_many(planned):
    (outline,) = as_8b(planned()).outlines
    few, many = (decoding(outline, n, 65, NEW, H200, 2) for n in (50, 600))
    assert few == many, "bound by its kernels"
    slow = replace(H200, bandwidth=1e11)
    assert decoding(outline, 600, 65, NEW, slow, 2) > decoding(outline, 50, 65, NEW, slow, 2)
    small = replace(H200, memory=20e9)
    assert decoding(outline, 600, 65, NEW, small, 2) > many, "fewer rows fit, so more steps"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"executor": "local"}, 1),
        ({"executor": "ray", "workers": 3}, 3),
        ({"executor": "ray", "workers": 99}, 5),
    ],
    ids=["local", "three", "more than sites"],
)
def test_under_vllm_sites_are_spread_over_the_workers(planned, options, parts):
    plan = planned(engine="vllm", **options)
    groups = plan.passes[1]
    assert len(groups) == parts and len({g.name for g in groups}) == parts
    cells = [c.key for g in groups for c in g.cells]
    assert sorted(cells) == sorted(c.key for g in plan.groups for c in g.cells)
    sizes = [len({c.site for c in g.cells}) for g in groups]
    assert max(sizes) - min(sizes) <= 1
